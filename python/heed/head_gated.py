"""Mixture-of-Head attention: heads that are gated token by token."""

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._gradients import may_follow
from heed._masks import Window, window_sides
from heed._numbers import number
from heed._overrides import overridable


@overridable
def head_gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    causal: bool = False,
    window: Window = (-1, -1),
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention times a gate for every head and token; zero gates cost nothing.

    ``out[b,h,i] = gates[b,h,i] * attention[b,h,i]`` with the softmax attention of
    :func:`heed.flash_attention`. Rows whose gate is zero are not computed, forward or backward:
    half the gates is half the time. :func:`heed.moh_router` makes gates.

    Args:
        q: ``[B, H, Lq, D]``; shapes, types, strides and masks as in :func:`heed.flash_attention`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        gates: ``[B, H, Lq]`` of any floating type.
        causal, window, lengths, scale: as in :func:`heed.flash_attention`.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; 0 where the gate is 0.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k, v and gates. The gradient of a gate that is 0 is 0: what was not
    computed has none.

    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842).
    """
    q, k, v = autocast(q, k, v)
    left, right = window_sides("head_gated_attention", window)
    return torch.ops.heed.head_gated_attention(
        q,
        k,
        v,
        gates,
        causal,
        left,
        right,
        lengths,
        number("head_gated_attention", "scale", scale),
        may_follow(q, k, v, gates),
    )[0]
