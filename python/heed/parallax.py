"""Parallax: softmax attention with a learned linear correction."""

from typing import Literal, overload

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._gradients import may_follow
from heed._masks import Window, window_sides
from heed._numbers import number
from heed._overrides import overridable


@overload
def parallax_attention(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: Window = ...,
    lengths: Tensor | None = ...,
    scale: float | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def parallax_attention(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: Window = ...,
    lengths: Tensor | None = ...,
    scale: float | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
@overridable
def parallax_attention(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = (-1, -1),
    lengths: Tensor | None = None,
    scale: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax attention minus the covariance of values and keys times a learned probe ``r``.

    With the softmax weights ``p[i,j]`` of ``scale * q[i] . k[j]`` over the keys that query ``i``
    sees and ``t[i,j] = r[i] . k[j]``, which is never scaled,

    ``out[i] = v_mean[i] - sum_j p[i,j] (v[j] - v_mean[i]) (t[i,j] - t_mean[i])``

    where ``v_mean[i] = sum_j p[i,j] v[j]`` is softmax attention and ``t_mean[i] = sum_j p[i,j]
    t[i,j]``. Keys and values are read once, for twice the products of softmax attention. Rotary
    positions rotate ``r`` like ``q``. ``r = 0`` gives softmax attention with a gradient for ``r``
    that is not zero, so a softmax model can be trained on from there. The correction is linear in
    ``r``: a gate of it is a factor of ``r`` (``gate[..., None] * r``).

    Args:
        q: ``[B, H, Lq, D]``; shapes, types, strides and masks as in :func:`heed.flash_attention`.
        r: ``[B, H, Lq, D]``, q's type, stride 1 in the last dimension.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        causal, window, lengths: as in :func:`heed.flash_attention`.
        scale: factor of ``q . k``; ``None`` is ``1 / sqrt(D)``.
        return_stats: also return the statistics.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; with ``return_stats``, ``(out, v_mean, t_mean, lse)``
        with ``v_mean [B, H, Lq, Dv]``, ``t_mean [B, H, Lq]`` and the logarithm of the sum of
        exponentials ``lse [B, H, Lq]`` in float32 (float64 for float64). A query that sees no key
        has ``out``, ``v_mean`` and ``t_mean`` 0, ``lse = -inf`` and gradients 0.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, r, k and v, through ``out`` and ``lse``. ``v_mean`` and ``t_mean`` are
    statistics without a gradient, as if detached: a loss through them trains nothing, without an
    error where another term of it has a gradient (``v_mean`` with one is ``heed.flash_attention(q,
    k, v)``).

    Source: Parallax: Parameterized Local Linear Attention for Language Modeling (arXiv 2605.29157).
    """
    q, r, k, v = autocast(q, r, k, v)
    left, right = window_sides("parallax_attention", window)
    results = torch.ops.heed.parallax_attention(
        q,
        r,
        k,
        v,
        causal,
        left,
        right,
        lengths,
        number("parallax_attention", "scale", scale),
        return_stats or may_follow(q, r, k, v),
    )
    return results if return_stats else results[0]
