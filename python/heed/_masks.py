"""Arguments that several operators share."""

from heed._numbers import whole_pair

Window = tuple[int, int]


def window_sides(op: str, window: Window) -> Window:
    """The two numbers of ``window``, or an error that says what was found."""
    needed = "two whole numbers (left, right), -1 for an open side"
    return whole_pair(op, "window", window, needed)
