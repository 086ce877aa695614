"""Exact local linear attention."""

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._numbers import number
from heed._overrides import overridable


@overridable
def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: float = 0.1,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention as regression: the intercept of a weighted linear fit of values to keys.

    With ``w_m = exp(scale q . k_m)`` and ``z_m = k_m - q``, the result is the value at ``z = 0`` of
    the line that fits ``v_m`` to ``z_m`` under the weights ``w_m``, with ``ridge`` times the sum of
    the weights on the diagonal of its equations. As ridge grows it becomes softmax attention.

    Args:
        q: ``[B, H, Lq, D]``; shapes, types and strides as in :func:`heed.flash_attention`. All
            arithmetic is float64: a system of ``D`` equations is solved for every query.
        k: ``[B, Hkv, Lk, D]``.
        v: ``[B, Hkv, Lk, Dv]``.
        ridge: positive. The error of the fit is about ``1e-16 D |k|^2 / ridge`` of its terms: one
            that is 1e15 times smaller than ``|k|^2`` leaves nothing right, or NaN.
        causal: query ``i`` sees keys ``j <= i + Lk - Lq``.
        scale: factor of the scores; ``None`` is ``1 / sqrt(D)``.

    Returns:
        ``out [B, H, Lq, Dv]`` of q's type; 0 for a query that sees no key.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in q, k and v.

    Source: local linear attention (arXiv 2510.01450), the exact estimator behind Parallax.
    """
    q, k, v = autocast(q, k, v)
    op = "local_linear_attention"
    return torch.ops.heed.local_linear_attention(
        q, k, v, number(op, "ridge", ridge), causal, number(op, "scale", scale)
    )
