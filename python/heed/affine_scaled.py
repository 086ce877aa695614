"""Affine-scaled attention."""

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._gradients import may_follow
from heed._masks import Window, window_sides
from heed._numbers import number
from heed._overrides import overridable


@overridable
def affine_scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    alpha_mean: Tensor,
    *,
    causal: bool = False,
    window: Window = (-1, -1),
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention whose weights are scaled and shifted for each query and head.

    ``out = alpha * (softmax attention - u) + alpha_mean * u`` where ``u`` is the plain mean of the
    values that a query sees.

    Args:
        q: ``[B, H, Lq, D]``; shapes, types, strides and masks as in :func:`heed.flash_attention`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        alpha: ``[B, H, Lq]`` of any floating type; usually a sigmoid of a projection of the input.
        alpha_mean: ``[H]`` of any floating type: the moving average of alpha over training steps.
        causal, window, lengths, scale: as in :func:`heed.flash_attention`.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; 0 for a query that sees no key.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k, v, alpha and alpha_mean (detach the average to train as the paper does).

    Source: Affine-Scaled Attention (arXiv 2602.23057).
    """
    q, k, v = autocast(q, k, v)
    left, right = window_sides("affine_scaled_attention", window)
    return torch.ops.heed.affine_scaled_attention(
        q,
        k,
        v,
        alpha,
        alpha_mean,
        causal,
        left,
        right,
        lengths,
        number("affine_scaled_attention", "scale", scale),
        may_follow(q, k, v, alpha, alpha_mean),
    )[0]
