"""What torch.autocast does to the inputs of PyTorch's own attention, for heed's."""

import torch
from torch import Tensor, is_autocast_enabled


def autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Them in autocast's type where it is on for the CPU; float64 stays, as in PyTorch.

    Only inputs whose types have to be equal: masks, biases, parameters and states keep theirs, which
    the operators take beside 16-bit inputs.
    """
    if not is_autocast_enabled("cpu"):
        return inputs
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(_cast(tensor, dtype) for tensor in inputs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, Tensor):  # the operators say what is needed
        return tensor
    casts = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if casts else tensor
