"""Ctrl-C: what it must not cut in two, and what it leaves behind."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside the block comes at its end: around short changes of a model, half of which nobody could undo.

    Example:
        >>> import signal
        >>> done = []
        >>> try:
        ...     with uninterrupted():
        ...         signal.raise_signal(signal.SIGINT)
        ...         done.append("whole")
        ... except KeyboardInterrupt:
        ...     print(done)
        ['whole']
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():  # not from Python; nothing comes elsewhere
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *_: came.append(True))
    wakened = signal.set_wakeup_fd(-1)  # of an event loop, which would hear of it twice
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakened)
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


class Mode(TorchFunctionMode):
    """A function mode that leaves by itself, with those that were entered after it and are dead by then.

    PyTorch's own exit takes away whichever mode was entered last: one of a call that Ctrl-C ended, for which modules call no hooks.
    """

    def __exit__(self, *_: Any) -> None:
        withdraw(self, above=True)


def withdraw(mode: TorchFunctionMode, *, above: bool = False) -> None:
    """Exit a mode wherever it is among those that are entered, and those `above` it, too; nothing if it is not.

    Example:
        >>> mode = Mode().__enter__()
        >>> withdraw(mode); withdraw(mode)
    """
    entered = _get_current_function_mode_stack()
    places = [place for place, other in enumerate(entered) if other is mode]
    if places:
        later = entered[places[-1] + 1 :]
        for _ in range(len(later) + 1):
            _pop_mode()
        for other in () if above else later:
            _push_mode(other)
