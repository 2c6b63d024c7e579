"""When a training stops between two of its epochs."""

import time
from collections.abc import Callable
from typing import Any


def paced(check: Callable[..., None], *, epochs: int, since: float | None = None) -> Callable[[int, Any], None]:
    """What to call after each epoch, by its number from 1: `check(needs=)` with the seconds of an epoch, but after the last one.

    Args:
        since: when the first one began, by time.monotonic(); None where much else came before it, which is not to count.

    Example:
        >>> after = paced(lambda needs: print("another one?"), epochs=2)
        >>> after(1, {})
        another one?
        >>> after(2, {})
    """
    last = since

    def after(epoch: int, _figures: Any) -> None:
        nonlocal last
        took = 0.0 if last is None else time.monotonic() - last
        last = time.monotonic()
        if epoch < epochs:
            check(needs=took)

    return after
