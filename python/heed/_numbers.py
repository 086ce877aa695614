"""Numbers as the operators take them."""

import operator
from collections.abc import Mapping

import torch
from torch import Tensor


def number(op: str, name: str, value: float | None) -> float | None:
    """The value, or a TypeError where PyTorch would turn a tensor of floats into a number."""
    if value is None or type(value) is float:  # as most are
        return value
    if isinstance(value, Tensor) and value.is_floating_point():
        raise TypeError(f"{op}: {name} is a tensor, needed is a number (a gradient would be lost)")
    return value


def whole_number(value: int) -> int:
    """A whole number of any kind, NumPy's and tensors too, or a TypeError."""
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def whole_pair(op: str, name: str, pair: tuple[int, int], needed: str) -> tuple[int, int]:
    """Both numbers, or an error that says what was found: a ValueError beyond 64 bits."""
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        first, second = pair
        try:
            if not (type(first) is int and type(second) is int):  # seldom
                first, second = whole_number(first), whole_number(second)
            if not (-(2**63) <= first < 2**63 and -(2**63) <= second < 2**63):
                raise ValueError(f"{op}: {name} is {pair!r}, needed are numbers of 64 bits")
            return first, second
        except TypeError:
            pass
    raise TypeError(f"{op}: {name} is {pair!r}, needed are {needed}")


def checked_whole_number(op: str, name: str, value: int) -> int:
    """A whole number as :func:`whole_number` takes it, or a TypeError that names the argument."""
    try:
        return whole_number(value)
    except TypeError:
        raise TypeError(f"{op}: {name} is {value!r}, needed is a whole number") from None


def check_sizes(op: str, sizes: Mapping[str, int]) -> None:
    """Raises an error under the name of the first that is not a whole number of at least 0."""
    for name, size in sizes.items():
        if checked_whole_number(op, name, size) < 0:
            raise ValueError(f"{op}: {name} is {size}, needed is 0 or more")
