"""Seeds as the operators take them."""

import torch
from torch import Tensor

from heed._numbers import whole_number


def drawn_seed() -> Tensor:
    """One from PyTorch's generator."""
    return torch.randint(2**62, ())


def dropout_seeds(seed: int | None, dropout_p: float) -> tuple[int, Tensor | None]:
    """``seed`` and ``drawn_seed`` of an operator: for ``None`` one is drawn, if anything is dropped.

    It stays a tensor: as a number it would end the graph of ``torch.compile``.
    """
    if seed is not None:
        return signed_seed(seed), None
    return 0, drawn_seed() if dropout_p != 0.0 else None


def signed_seed(seed: int) -> int:
    """Any whole number as the 64 bits of it that count, in the range of int64."""
    try:
        seed = whole_number(seed)  # integers of NumPy and tensors end at 64 bits
    except TypeError:
        raise TypeError(f"seed is {seed!r}; a whole number is needed") from None
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_true

        # One that is traced has 64 bits and cannot be compared.
        if guard_or_true(-(2**63) <= seed) and guard_or_true(seed < 2**63):
            return seed
    if -(2**63) <= seed < 2**63:
        return seed
    return (seed + 2**63) % 2**64 - 2**63
