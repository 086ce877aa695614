"""Stochastic attention: a sliding window over randomly permuted tokens."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._numbers import number, whole_number
from heed._overrides import overridable
from heed._seeds import signed_seed


@overload
def stochastic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    permutation: Tensor,
    *,
    window: int,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def stochastic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    permutation: Tensor,
    *,
    window: int,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overridable
def stochastic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    permutation: Tensor,
    *,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention among tokens whose random slots are neighbours, in time ``O(L * window)``.

    Token ``i`` sees token ``j`` if ``abs(permutation[i] - permutation[j]) <= window // 2`` and, if
    causal, ``j <= i``. With an independent permutation in every layer, information reaches all
    tokens in about ``log(L) / log(window)`` layers; one permutation shared by all layers mixes
    nothing. Positions (RoPE) are those of the tokens: apply them before the call. Leave padding
    tokens out of the call.

    Args:
        q: ``[B, H, L, D]``; types and strides as in :func:`heed.flash_attention`.
        k: ``[B, Hkv, L, D]``, same type; ``H`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, L, Dv]``, same type.
        permutation: ``[L]`` for all heads, ``[H, L]`` or ``[B, H, L]``, int64: the slot of every
            token, each slot once. :func:`heed.random_permutation` makes one.
        window: slots that a token sees, ``window // 2`` to each side, without wrap; at least 1.
        causal: hide later tokens. About half of a window is later; early tokens see few keys.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        return_lse: also return the natural logarithm of the sum of ``exp(score)`` of each query.

    Returns:
        ``out [B, H, L, Dv]`` of q's type; with ``return_lse``, ``(out, lse)`` with
        ``lse [B, H, L]`` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k and v, through ``out`` and ``lse``.

    Source: Stochastic Attention (arXiv 2604.00754).
    """
    op = "stochastic_attention"
    q, k, v = autocast(q, k, v)
    window, scale = number(op, "window", window), number(op, "scale", scale)
    out, lse = torch.ops.heed.stochastic_attention(q, k, v, permutation, window, causal, scale)
    return (out, lse) if return_lse else out


def random_permutation(seed: int, shape: int | Sequence[int]) -> Tensor:
    """Uniformly random permutations along the last axis, a function of seed and shape alone.

    Args:
        seed: any 64-bit number; give every layer and training step its own.
        shape: ``L``, ``[L]``, ``[H, L]`` or ``[B, H, L]``, as in :func:`heed.stochastic_attention`.

    Returns:
        int64 tensor of that shape; every row is a permutation of ``0 .. L - 1`` of its own.

    Raises:
        ValueError: a shape without axes or with more than three, a negative size.
        TypeError: a size that is not a whole number.

    Source: Stochastic Attention (arXiv 2604.00754); random numbers by Philox 4x32-10.
    """
    sizes = list(shape) if isinstance(shape, (tuple, list)) else [shape]
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"random_permutation: shape is {sizes}, needed are 1 to 3 axes")
    try:
        sizes = [whole_number(size) for size in sizes]
    except TypeError:
        raise TypeError(
            f"random_permutation: shape is {shape!r}, needed are 1 to 3 axes of whole numbers"
        ) from None
    return torch.ops.heed.random_permutation(signed_seed(seed), sizes)
