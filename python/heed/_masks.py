"""Arguments that several operators share."""

Window = tuple[int, int]


def window_sides(op: str, window: Window) -> Window:
    """The two numbers of ``window``, or an error that says what was found."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(
            f"{op}: window is {window!r}, needed are two numbers (left, right), -1 for an open side"
        )
    return window[0], window[1]
