"""The loss that fits feature maps of linear attention to softmax attention."""

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._gradients import may_follow
from heed._numbers import number
from heed._overrides import overridable


@overridable
def attention_distillation_loss(
    q: Tensor,
    k: Tensor,
    feature_q: Tensor,
    feature_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Cross-entropy of softmax weights (the teacher) against those of linear attention.

    With the softmax weights ``P[i,j]`` of ``scale * q_i . k_j`` and the linear weights ``A[i,j] =
    feature_q_i . feature_k_j / sum_m feature_q_i . feature_k_m`` over the keys that query ``i`` sees,
    the loss is the mean over batch, heads and queries of ``-sum_j P[i,j] log max(A[i,j], 1e-12)``.
    It is the entropy of the teacher plus the Kullback-Leibler divergence. Computed in tiles: memory
    does not grow with ``Lq * Lk``.

    Args:
        q: ``[B, H, Lq, D]``; types and strides as in :func:`heed.flash_attention`.
        k: ``[B, Hkv, Lk, D]``, same type; ``H`` is a multiple of ``Hkv``.
        feature_q: ``[B, H, Lq, F]``, any ``F``; q's type or, beside 16 bits, float32.
        feature_k: ``[B, Hf, Lk, F]``, feature_q's type; ``H`` is a multiple of ``Hf``.
        causal: query ``i`` sees the keys ``j <= i + Lk - Lq``. One that sees none adds 0.
        scale: factor of the teacher's scores; ``None`` is ``1 / sqrt(D)``.

    Returns:
        The loss, a float32 scalar (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in feature_q and feature_k. The teacher is detached: q and k get no gradient.

    Source: The Hedgehog & the Porcupine (arXiv 2402.04347).
    """
    q, k, feature_q, feature_k = autocast(q, k, feature_q, feature_k)
    gradients = may_follow(feature_q, feature_k)  # made with the loss, from the same products
    return torch.ops.heed.attention_distillation_loss(
        detached(q),
        detached(k),
        feature_q,
        feature_k,
        causal,
        number("attention_distillation_loss", "scale", scale),
        gradients,
    )[0]


def detached(t: Tensor) -> Tensor:
    return t.detach() if isinstance(t, Tensor) else t  # the operator says what is wrong with others
