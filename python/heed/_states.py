"""Running states that calls take and return."""

from collections.abc import Sequence

from torch import Tensor


def parts_of(op: str, state: Sequence[Tensor] | None, names: tuple[str, ...]) -> Sequence:
    """The tensors of ``initial_state``, a ``None`` for each without one, or a TypeError."""
    if state is None:
        return (None,) * len(names)
    whole = isinstance(state, (tuple, list)) and len(state) == len(names)
    if not whole or not all(isinstance(part, Tensor) for part in state):
        raise TypeError(
            f"{op}: initial_state is {describe(state)}, needed are the tensors "
            f"({', '.join(names)}) that return_state=True gives"
        )
    return state


def whole_of(op: str, state: Tensor | None) -> Tensor | None:
    """``initial_state`` where it is one tensor, or a TypeError."""
    if state is not None and not isinstance(state, Tensor):
        raise TypeError(
            f"{op}: initial_state is {describe(state)}, needed is the tensor that "
            "return_state=True gives"
        )
    return state


def describe(state: object) -> str:
    if isinstance(state, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in state)})"
    return f"a {type(state).__name__}"
