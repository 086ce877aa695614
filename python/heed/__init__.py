"""Attention on CPUs: fast kernels as PyTorch operators.

All operators take tensors in the layout ``[B, H, L, D]`` (batch, heads, tokens, head dim), as
``torch.nn.functional.scaled_dot_product_attention`` does, on the CPU, in float64, float32, bfloat16
or float16. They use as many threads as ``torch.set_num_threads`` says, and the result has the same
bits for any number of threads. They work under ``torch.compile``. Where a
function says so it is differentiable once; second derivatives raise a ``RuntimeError``.
"""

from heed import _library
from heed.decode import decode_attention, merge_attention
from heed.flash import flash_attention, flash_attention_varlen
from heed.sdpa import scaled_dot_product_attention
from heed.sigmoid import sigmoid_attention

__version__: str = _library.version()

__all__ = [
    "decode_attention",
    "flash_attention",
    "flash_attention_varlen",
    "merge_attention",
    "scaled_dot_product_attention",
    "sigmoid_attention",
]
