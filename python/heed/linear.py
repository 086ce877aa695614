"""Linear attention: a product of features in the place of softmax."""

from typing import Literal, overload

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._gradients import may_follow
from heed._numbers import number
from heed._overrides import overridable
from heed._states import parts_of, whole_of

LinearState = tuple[Tensor, Tensor] | Tensor


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    normalize: bool = ...,
    eps: float = ...,
    lengths: Tensor | None = ...,
    initial_state: LinearState | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    normalize: bool = ...,
    eps: float = ...,
    lengths: Tensor | None = ...,
    initial_state: LinearState | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, LinearState]: ...
@overridable
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-12,
    lengths: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention whose weights are products of features, in time linear in the number of tokens.

    ``out_i = q_i S / (q_i . z + eps)`` with ``S = sum_j k_j^T v_j`` and ``z = sum_j k_j`` over the
    keys that query ``i`` sees. q and k are features already: :func:`heed.feature_map` makes them.

    Args:
        q: ``[B, H, Lq, F]``; types and strides as in :func:`heed.flash_attention`, any ``F``.
        k: ``[B, Hkv, Lk, F]``, same type; ``H`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, Lk, Dv]``, same type, any ``Dv``.
        causal: query ``i`` sees the keys ``j <= i + Lk - Lq``, else all.
        normalize: divide by ``q_i . z + eps``; ``False`` gives ``q_i S``.
        eps: added to the denominator, not negative. A denominator that is 0, or too small for its
            inverse to be finite (below 2.9e-39 in float32), gives 0.
        lengths: ``[B]`` int32 or int64: keys of sequence ``b`` at and after ``lengths[b]`` do not
            exist.
        initial_state: what ``return_state`` gave for the tokens before these; ``None`` is zero.
            With causal it needs ``Lq <= Lk``.
        return_state: also return the state after the last token.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type, 0 where nothing is seen; with ``return_state``, ``(out,
        state)`` with ``state = (S [B, H, F, Dv], z [B, H, F])``, or only ``S`` without
        ``normalize``, float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Features of both signs can have denominators ``d`` near 0; nothing hides them: their relative
    error is about ``6e-8 |q| |z| / |d|`` (float64: 1e-16). On processors with bfloat16 products,
    bfloat16 calls of 32 keys and more round the float32 state, and what keys and queries of a
    chunk make of each other, where products read them: numerators are about ``2e-3 |q| |S|`` off,
    which shows where they cancel.

    Differentiable in q, k, v and initial_state, through ``out`` and the state.

    Source: The Hedgehog & the Porcupine (arXiv 2402.04347), Transformers are RNNs (arXiv
    2006.16236).
    """
    op = "linear_attention"
    s, z = (
        parts_of(op, initial_state, ("S", "z"))
        if normalize
        else (whole_of(op, initial_state), None)
    )
    q, k, v = autocast(q, k, v)
    # Not causal, the state spares the backward a sum over all keys.
    in_backward = not causal and may_follow(q, k, v)
    out, s, z = torch.ops.heed.linear_attention(
        q,
        k,
        v,
        causal,
        normalize,
        number(op, "eps", eps),
        lengths,
        s,
        z,
        return_state or in_backward,
    )
    if not return_state:
        return out
    return out, (s, z) if normalize else s
