"""Kernelized attention with relative positions, by FFT or directly."""

from typing import Literal

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._overrides import overridable

RpeFeatures = Literal["nprf", "prf", "trf", "elu1"]
RpePath = Literal["auto", "fft", "direct"]


@overridable
def kernelized_rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor,
    projection: Tensor | None,
    *,
    features: RpeFeatures = "nprf",
    causal: bool = False,
    grid: tuple[int, int] | None = None,
    path: RpePath = "auto",
) -> Tensor:
    """Linear attention with a learned weight for every relative position.

    ``out_i = sum_j A[i,j] v_j / sum_j A[i,j]`` with ``A[i,j] = exp(rpb[h, j - i]) phi(q_i) .
    phi(k_j)`` and, with ``W = projection[h]``,

    ========  ====================================================================================
    ``nprf``  ``exp(W x / |x|)``, positive; a zero vector gives ``exp(0)``
    ``prf``   ``exp(W y - |y|^2 / 2)`` with ``y = x / D**0.25``, positive
    ``trf``   ``exp(|y|^2 / 2) [sin W y, cos W y]``; may be negative, and the sum of ``A`` vanish
    ``elu1``  ``x + 1`` where ``x > 0``, else ``exp(x)``
    ========  ====================================================================================

    Args:
        q: ``[B, H, L, D]``; types and strides as in :func:`heed.flash_attention`.
        k: ``[B, Hkv, L, D]``, same type; ``H`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, L, Dv]``, same type.
        rpb: ``[H, 2R - 1]`` with ``R >= L``, of which the centre is used: entry ``R - 1 + j - i``.
            On a grid ``[H, 2 Gy - 1, 2 Gx - 1]``. Of any floating type. An entry of ``-inf`` masks
            its offset.
        projection: ``[H, M, D]`` of any floating type (:func:`heed.nn.random_projection`); ``None``
            for ``elu1``.
        features: one of the names above.
        causal: query ``i`` sees the keys ``j <= i``; on a grid those earlier in its order.
        grid: rows and columns ``(Gy, Gx)`` of tokens that lie row by row, ``L = Gy * Gx``.
        path: ``"direct"`` computes all pairs, ``"fft"`` takes ``O(L log L)``; the same numbers.
            ``"fft"`` needs ``exp(rpb)`` of a head within a factor of 1e6. ``"auto"`` takes the one
            that should be faster.

    Returns:
        ``out [B, H, L, Dv]`` of q's type, 0 for a query that sees nothing.

    Raises:
        ValueError: projection requires grad while gradients are recorded; it has none.
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k, v and rpb.

    Source: Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding (arXiv
    2106.12566).
    """
    if getattr(projection, "requires_grad", False) and torch.is_grad_enabled():
        raise ValueError(
            "kernelized_rpe_attention: projection requires grad, but has no gradient: pass "
            "projection.detach()"
        )
    q, k, v = autocast(q, k, v)
    return torch.ops.heed.kernelized_rpe_attention(
        q, k, v, rpb, projection, features, causal, grid, path
    )
