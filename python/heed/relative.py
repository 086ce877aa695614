"""Attention with scores by relative position."""

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._numbers import number
from heed._overrides import overridable


@overridable
def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_key: Tensor,
    rel_bias: Tensor,
    content_bias: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention whose scores depend on relative positions through learned tables.

    The score of query ``i`` and key ``j`` at the distance ``n = j - (i + Lk - Lq)`` is

    ``scale * ((q[i] + content_bias) . k[j] + q[i] . rel_key[P + n] + rel_bias[P + n])``

    for each head. No ``[Lq, Lq + Lk]`` buffer exists: every tile of scores meets the few rows of
    the table that its distances need.

    Args:
        q: ``[B, H, Lq, D]``; shapes, types and strides as in :func:`heed.flash_attention`.
        k: ``[B, Hkv, Lk, D]``. Memory of earlier segments is concatenated before the keys and
            values of the segment, so ``Lk > Lq``.
        v: ``[B, Hkv, Lk, Dv]``.
        rel_key: ``[2P, H, D]`` of any floating type, any strides. Row ``P`` is distance 0, the rows
            before it are keys to the left. ``P >= Lk - 1``; without ``causal`` ``P >= Lq`` too, with
            it ``P >= 1``.
        rel_bias: ``[2P, H]`` of any floating type.
        content_bias: ``[H, D]`` of any floating type.
        causal: query ``i`` sees keys ``j <= i + Lk - Lq``: all of the memory and itself.
        scale: factor of all terms; ``None`` is ``1 / sqrt(D)``.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; 0 for a query that sees no key.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k, v, rel_key, rel_bias and content_bias. Rows of the tables that no score
    reads have gradient 0.

    Transformer-XL is ``rel_key[P - n] = W_R r_n``, ``rel_bias[P - n] = v . W_R r_n`` with its ``u``
    as content_bias; RCMHA is this after ``depthwise_causal_conv`` of q, k and v.

    Source: RCMHA (arXiv 2308.03429), Transformer-XL (arXiv 1901.02860).
    """
    q, k, v = autocast(q, k, v)
    scale = number("relative_attention", "scale", scale)
    return torch.ops.heed.relative_attention(
        q, k, v, rel_key, rel_bias, content_bias, causal, scale
    )[0]
