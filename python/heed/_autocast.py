"""What torch.autocast does to the inputs of PyTorch's own attention, for heed's."""

import torch
from torch import Tensor, is_autocast_enabled


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in autocast's type where it is on for the CPU; float64 stays, as in PyTorch.

    Masks and biases keep their type: the operators take any floating type beside 16-bit inputs.
    """
    if not is_autocast_enabled("cpu"):
        return query, key, value
    dtype = torch.get_autocast_dtype("cpu")
    return _cast(query, dtype), _cast(key, dtype), _cast(value, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, Tensor):  # the operators say what is needed
        return tensor
    casts = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if casts else tensor
