"""Where work that keeps a processor busy lets others of its process tell the GPU what to do."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_here = threading.local()


@contextmanager
def pauses(pause: Callable[[], None], aside: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """In the block and on this thread, `pause()` and `aside()` are those given."""
    before = vars(_here).get("both")
    _here.both = pause, aside
    try:
        yield
    finally:
        _here.both = before


def pause() -> None:
    """Let others go on for a moment, where there are some: in the middle of work for the device.

    Raises:
        Whatever they end all of them with.

    Example:
        >>> from contextlib import nullcontext
        >>> with pauses(lambda: print("others"), nullcontext):
        ...     pause()
        others
    """
    both = vars(_here).get("both")
    if both is not None:
        both[0]()


def aside() -> AbstractContextManager[None]:
    """Others go on while the block computes by itself, without the device and without drawing at random."""
    both = vars(_here).get("both")
    return nullcontext() if both is None else both[1]()


def arrive() -> None:
    """Others go on until the GPU has done what this thread told it, which can be hundreds of steps: before a number is read from it."""
    if vars(_here).get("both") is not None and torch.cuda.is_initialized():
        told = torch.cuda.Event(blocking=True)
        told.record()
        with aside():
            told.synchronize()
