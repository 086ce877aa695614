"""Attention on CPUs: fast kernels as PyTorch operators.

All operators take tensors in the layout ``[B, H, L, D]`` (batch, heads, tokens, head dim), as
``torch.nn.functional.scaled_dot_product_attention`` does, on the CPU, in float64, float32, bfloat16
or float16. They use as many threads as ``torch.set_num_threads`` says, fewer where a call is too short
for them; results have the same bits for any number of threads, gradients for the same number of
threads. They work under ``torch.compile``, and under ``torch.autocast`` for the CPU, in its type
(float64 stays float64).
Where a function says so it is differentiable once; second derivatives and forward-mode derivatives
raise a ``RuntimeError``.
"""

from heed import _library
from heed import nn as nn
from heed.affine_scaled import affine_scaled_attention
from heed.decode import decode_attention, merge_attention
from heed.depthwise import depthwise_causal_conv
from heed.distillation import attention_distillation_loss
from heed.features import feature_map
from heed.flash import flash_attention, flash_attention_varlen
from heed.head_gated import head_gated_attention
from heed.kernelized_rpe import kernelized_rpe_attention
from heed.lightning import lightning_attention, lightning_slopes
from heed.linear import linear_attention
from heed.local_linear import local_linear_attention
from heed.magnitude_aware import magnitude_aware_linear_attention
from heed.moh import moh_router
from heed.neighborhood import na1d, na2d, na3d
from heed.parallax import parallax_attention
from heed.recurrent_softmax import recurrent_softmax_attention
from heed.relative import relative_attention
from heed.relu_linear import relu_linear_attention
from heed.sdpa import scaled_dot_product_attention
from heed.sigmoid import sigmoid_attention
from heed.stochastic import random_permutation, stochastic_attention
from heed.taylor_state import taylor_state_attention

__version__: str = _library.version()

__all__ = [
    "affine_scaled_attention",
    "attention_distillation_loss",
    "decode_attention",
    "depthwise_causal_conv",
    "feature_map",
    "flash_attention",
    "flash_attention_varlen",
    "head_gated_attention",
    "kernelized_rpe_attention",
    "lightning_attention",
    "lightning_slopes",
    "linear_attention",
    "local_linear_attention",
    "magnitude_aware_linear_attention",
    "merge_attention",
    "moh_router",
    "na1d",
    "na2d",
    "na3d",
    "parallax_attention",
    "random_permutation",
    "recurrent_softmax_attention",
    "relative_attention",
    "relu_linear_attention",
    "scaled_dot_product_attention",
    "sigmoid_attention",
    "stochastic_attention",
    "taylor_state_attention",
]
