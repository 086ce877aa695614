"""Softmax attention read as a recurrent network."""

from typing import Literal

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._gradients import may_follow
from heed._numbers import number
from heed._overrides import overridable

Normalizer = Literal["softmax", "l2", "rms", "layer", "divide_by_count", "clamped", "none"]


@overridable
def recurrent_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: Normalizer = "softmax",
    order: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    gate: Tensor | None = None,
    score_clamp: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Softmax attention with another denominator, or with a Taylor polynomial for the exponential.

    With the scores ``x_m = min(scale q . k_m, score_clamp)`` of the keys that a query sees, ``S`` of
    them, the weights ``w = exp(x)`` or, with ``order=p``, ``w = sum of x**n / n! for n <= p``, and
    ``num = sum w_m v_m``, ``den = sum w_m``, the result is

    ===================  ==========================================================================
    ``softmax``          ``num / den`` (with an order: a ``den`` below 1e-12 in size counts as that)
    ``l2``               ``num / max(|num|, 1e-12)``, norms and means over the head dim
    ``rms``              ``num / sqrt(mean(num**2) + eps)``
    ``layer``            ``(num - mean(num)) / sqrt(var(num) + eps)``
    ``divide_by_count``  ``num / S``
    ``clamped``          ``num / max(den, 1)``
    ``none``             ``num``
    ===================  ==========================================================================

    times ``gate``. Under the norms no exponential overflows, whatever the scores
    are; a polynomial of ``order`` does when the scores to that power do.

    Args:
        q: ``[B, H, Lq, D]``; shapes, types and strides as in :func:`heed.flash_attention`.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        normalizer: one of the names above.
        order: degree of the polynomial, 0 to 100; ``None`` is the exponential. An odd order may
            have denominators of either sign. Below scores of about -5 its terms cancel in float32.
        causal: query ``i`` sees the keys ``j <= i + Lk - Lq``.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.
        gate: ``[B, H, Lq]`` of any floating type.
        score_clamp: scores above it become it; the paper's code uses 5 with every normalizer but
            ``softmax`` and the headline's ``l2``.
        eps: inside the root of ``rms`` and ``layer``.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; 0 for a query that sees no key.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k, v and gate.

    Source: On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective
    (arXiv 2507.23632).
    """
    q, k, v = autocast(q, k, v)
    op = "recurrent_softmax_attention"
    return torch.ops.heed.recurrent_softmax_attention(
        q,
        k,
        v,
        normalizer,
        number(op, "order", order),
        causal,
        number(op, "scale", scale),
        gate,
        number(op, "score_clamp", score_clamp),
        number(op, "eps", eps),
        may_follow(q, k, v, gate),
    )[0]
