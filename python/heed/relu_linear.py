"""Linear attention with rectified features (L2ViT)."""

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._gradients import may_follow
from heed._numbers import number
from heed._overrides import overridable


@overridable
def relu_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *, clamp: float = 100.0
) -> Tensor:
    """Linear attention with ``max(x, 0)`` as features, a clamped denominator and a learned factor.

    ``out_i = temperature[h] / max(s_i, clamp) * sum_j (Q_i . K_j) v_j`` with ``Q = max(q, 0)``, ``K
    = max(k, 0)`` and ``s_i = sum_j Q_i . K_j`` over all keys. The weights of a query sum to its
    head's temperature, and to less where the clamp holds. A query without a positive element gives
    0.

    Args:
        q: ``[B, H, Lq, D]``, not rectified yet; types and strides as in
            :func:`heed.flash_attention`.
        k: ``[B, Hkv, Lk, D]``, same type; ``H`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, Lk, Dv]``, same type.
        temperature: ``[H]`` of any floating type; the published models start from ``D**-0.5``.
        clamp: the smallest denominator, positive.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k, v and temperature.

    Source: The Linear Attention Resurrection in Vision Transformer (arXiv 2501.16182).
    """
    q, k, v = autocast(q, k, v)
    clamp = number("relu_linear_attention", "clamp", clamp)
    # The state spares the backward a sum over all keys.
    in_backward = may_follow(q, k, v, temperature)
    return torch.ops.heed.relu_linear_attention(q, k, v, temperature, clamp, in_backward)[0]
