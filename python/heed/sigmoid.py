"""Sigmoid attention."""

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._masks import Window, window_sides
from heed._numbers import number
from heed._overrides import overridable


@overridable
def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: float | Tensor | None = None,
    causal: bool = False,
    window: Window = (-1, -1),
    lengths: Tensor | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention whose weights are sigmoids of the scores: every key on its own, no row sum.

    ``out[b,h,i] = sum_j sigmoid(scale * q[b,h,i] . k[b,g,j] + bias[h] + position) v[b,g,j]`` over
    the keys that query ``i`` sees, with ``g = h // (H // Hkv)``.

    Args:
        q: ``[B, H, Lq, D]``; shapes, types, strides and masks as in :func:`heed.flash_attention`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        bias: added to every score: a number for all heads or a tensor ``[H]`` of any
            floating type. ``None`` is ``-log(Lk)``, so that the weights of a query sum to about 1
            at the start of training; give the number for the longest length of training where
            lengths vary.
        causal, window, lengths, scale: as in :func:`heed.flash_attention`.
        alibi_slopes: ``[H]`` or ``[B, H]`` of any floating type:
            ``position = -slope[h] * |i + Lk - Lq - j|``.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; 0 for a query that sees no key.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k, v, bias and alibi_slopes.

    Source: Theory, Analysis, and Best Practices for Sigmoid Self-Attention (arXiv 2409.04431).
    """
    q, k, v = autocast(q, k, v)
    left, right = window_sides("sigmoid_attention", window)
    per_head = isinstance(bias, Tensor)
    return torch.ops.heed.sigmoid_attention(
        q,
        k,
        v,
        None if per_head else bias,
        bias if per_head else None,
        causal,
        left,
        right,
        lengths,
        number("sigmoid_attention", "scale", scale),
        alibi_slopes,
    )
