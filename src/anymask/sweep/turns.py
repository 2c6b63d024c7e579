"""Several trainings in one process: threads that take turns in telling a GPU what to do, each in a stream of its own."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch

from anymask.pauses import pauses
from anymask.sweep.run import Stopped
from anymask.train.graphs import own_stream, timing_algorithms

_STEPS = 8  # of the optimiser in a turn: to pass it on takes about 20 microseconds


class Turns:
    """Of the threads that have entered, one runs, until it passes its turn on: in the order in which they came.

    What each of them draws at random with PyTorch's global generators is what it would draw alone; a network that draws on the GPU in
    recorded steps (dropout) is not: graphs of one device share where they draw from.

    Args:
        number: how many there will be.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.stopped = False  # set it to end all of them at their next turn
        self._lock, self._waiting, self._taken = threading.Lock(), deque[threading.Semaphore](), False
        self._steps = threading.local()

    def __enter__(self) -> "Turns":
        with self._lock:
            if not self._taken:
                self._taken = True
                return self
            mine = threading.Semaphore(0)
            self._waiting.append(mine)
        mine.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def step(self) -> None:
        """After a step: let the next one run, every few steps.

        Raises:
            Stopped: where all are to end.
        """
        made = self._steps.made = getattr(self._steps, "made", 0) + 1
        if made % _STEPS == 0:
            self.rest(0.0)

    def rest(self, seconds: float) -> None:
        """Let others run for at least so long.

        Raises:
            Stopped: where all are to end.
        """
        with self.aside():
            if seconds:
                time.sleep(seconds)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Others run while the block does: it is to leave the device alone, and PyTorch's global generators.

        Raises:
            Stopped: after it, where all are to end: a checkpoint that is written is written.
        """
        cuda = torch.cuda.is_initialized()
        drawn = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
            torch.set_rng_state(drawn[0])
            if drawn[1] is not None:
                torch.cuda.set_rng_state(drawn[1])
        if self.stopped:
            raise Stopped


def taking_turns(work: Callable[[Turns], None], number: int, *, device: str) -> None:
    """Call `work` in `number` threads, until all have ended.

    Args:
        device: where they work; on a GPU each thread has a stream of its own.

    Raises:
        Whatever the first that failed raised; the others then end at their next turn.
    """
    turns, errors = Turns(number), list[BaseException]()
    cuda = device.startswith("cuda")
    aside = turns.aside if cuda else nullcontext  # on a CPU it would change with how many threads the others compute

    def run() -> None:
        with turns:
            if turns.stopped:
                return
            try:
                with own_stream(torch.device(device)) if cuda else nullcontext(), suppress(Stopped), pauses(lambda: turns.rest(0.0), aside):
                    work(turns)
            except BaseException as error:
                errors.append(error)
                turns.stopped = True

    threads = [threading.Thread(target=run, daemon=True) for _ in range(number)]
    try:
        with timing_algorithms() if cuda else nullcontext():  # a switch of the process, not of a thread
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    except BaseException:  # Ctrl-C comes to this thread
        turns.stopped = True
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if errors:
        raise errors[0]
