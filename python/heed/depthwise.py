"""Depthwise causal convolution."""

import torch
from torch import Tensor

from heed._autocast import autocast
from heed._overrides import overridable


@overridable
def depthwise_causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution along the tokens that sees no later token, each channel on its own.

    ``out[b,h,t,e] = bias[h,e] + sum_a weight[h,e,a] x[b,h,t - (W - 1) + a,e]``, 0 before ``t = 0``.

    Args:
        x: ``[B, H, L, D]``, float64, float32, bfloat16 or float16, any strides.
        weight: ``[D, W]``, shared by the heads, or ``[H, D, W]``; of any floating
            type.
        bias: ``[D]`` or ``[H, D]`` of any floating type; ``None`` is zero.

    Returns:
        ``out [B, H, L, D]`` of x's type.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`heed.flash_attention`.

    Differentiable in x, weight and bias.

    Source: Primer (arXiv 2109.08668), RCMHA (arXiv 2308.03429).
    """
    (x,) = autocast(x)
    return torch.ops.heed.depthwise_causal_conv(x, weight, bias)
