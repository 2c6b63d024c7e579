"""A sweep in several processes of this machine."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from anymask.config import pick_device
from anymask.errors import AnymaskError, note
from anymask.sweep.compare import Cell, Watcher
from anymask.sweep.run import LOOK_AGAIN, Benches, Stopped, Worker
from anymask.sweep.turns import taking_turns

INTERRUPTED, NO_MEMORY = 130, 3
FAULTS = tuple(getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL") if hasattr(signal, name))
_PATIENCE = 5.0  # seconds for a worker to end after Ctrl-C, before it is made to; nothing is lost then


def side_by_side(worker: Worker, number: int, *, streams: int, watcher: Watcher) -> tuple[int, ...]:
    """Let `number` processes do the work of `worker`, each with its share of the cores; the exit codes of those that died.

    In each of them `streams` trainings take turns. None has more threads than this process, which OMP_NUM_THREADS may have told.

    Raises:
        MemoryError: when it ran out in one of them.
        KeyboardInterrupt: when all of them have stopped.
    """
    threads = min(torch.get_num_threads(), max(1, _cores() // number))
    context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    settings = {name: getattr(worker, name) for name in ("planned", "folder", "retries", "computing", "clock", "seen")}

    def hire() -> _Member:
        here, there = context.Pipe(duplex=False)  # one each: whoever is killed holds nothing that others wait for
        process = context.Process(target=_work, args=(settings, threads, streams, there), daemon=True)
        with there:
            process.start()
        return _Member(process, here)

    crew = list[_Member]()
    try:
        with _deaf():
            for _ in range(number):
                crew.append(hire())
        _report(worker, crew, watcher, hire=hire if streams == 1 else None)
    finally:
        _end([member.process for member in crew])
    codes = [member.process.exitcode or 0 for member in crew]
    if NO_MEMORY in codes:
        raise MemoryError
    return tuple(code for code in codes if code)


class _Sent(Watcher):
    """Sends what it is told of trainings that run; the ledger tells of those that are finished."""

    def __init__(self, news: Connection) -> None:
        self.news = news

    def cell(self, cell: Cell, *, epochs: int) -> None:
        self._send(Watcher.cell, cell, epochs=epochs)

    def epoch(self, cell: Cell, epoch: int, figures: dict[str, Any]) -> None:
        self._send(Watcher.epoch, cell, epoch, figures)

    def left(self, cell: Cell, why: str | None) -> None:
        self._send(Watcher.left, cell, why)

    def _send(self, what: Callable[..., None], *args: Any, **named: Any) -> None:
        with suppress(OSError):  # the first process has ended, and this one will see it
            self.news.send((what.__name__, args, named))


class Crashed(Exception):
    """A training whose process died of a fault in compiled code."""


@dataclass
class _Member:
    """A process that works, and the pipe through which it tells how far it is."""

    process: BaseProcess
    news: Connection
    at: Cell | None = None  # what it began last

    def pass_on(self, watcher: Watcher) -> None:
        """Tell `watcher` what it sent."""
        for what, args, named in self._sent():
            self.at = args[0] if what == Watcher.cell.__name__ else self.at
            getattr(watcher, what)(*args, **named)

    def _sent(self) -> Iterator[Any]:
        try:
            while self.news.poll():
                yield self.news.recv()
        except (EOFError, OSError):  # it has ended; what `watcher` raises does not come here
            return


def how_it_ended(code: int) -> str:
    """How a process ended, by its exit code.

    Example:
        >>> how_it_ended(-signal.SIGSEGV), how_it_ended(3)
        ('by SIGSEGV, of a fault in compiled code; where, is said above', 'with exit code 3')
    """
    if code >= 0:
        return f"with exit code {code}"
    found = signal.Signals(-code)
    whys = dict.fromkeys(FAULTS, "of a fault in compiled code; where, is said above")
    return f"by {found.name}, {whys.get(found, 'which the system sends when memory is full, among others')}"


def _report(worker: Worker, crew: list[_Member], watcher: Watcher, *, hire: Callable[[], _Member] | None) -> None:
    """Tell `watcher` of what the processes send and of what comes into the ledger, until all have ended.

    Args:
        hire: starts another one for one that crashed, whose training has failed once more then; None where it may have been at several.
    """
    alive, seen = True, worker.ledger.size()
    waiting, known = {task.name: task for task in worker.planned}, worker.ledger.ids()
    while alive:
        alive = any(member.process.is_alive() for member in crew)
        # To read 500 rows at each look took a tenth of a core from those who train.
        before, seen = seen, worker.ledger.size()
        rows = worker.ledger.by_id() if seen != before else {}
        for member in crew:  # after the ledger was read: a training that it holds has been told of
            member.pass_on(watcher)
        for name, row in rows.items():
            if name in waiting and name not in known:
                known.add(name)
                watcher.finished(waiting[name].cell, row)
        for place, member in enumerate(crew):
            code = member.process.exitcode or 0
            if hire is None or -code not in FAULTS:
                continue
            left = [task for task in worker.planned if task.cell == member.at and task.name not in known]
            if len(left) == 1:
                watcher.left(left[0].cell, worker.note(left[0], Crashed(f"its process died {how_it_ended(code)}")))
                with _deaf():  # or a Ctrl-C could come when it runs and is not in the crew yet
                    crew[place], alive = hire(), True
        if alive:
            time.sleep(LOOK_AGAIN)


def _end(processes: list[BaseProcess]) -> None:
    """Stop those that still run; after Ctrl-C on a terminal they have heard it already."""
    started = [process for process in processes if process.pid is not None]
    for process in started:
        if process.is_alive() and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
    until = time.monotonic() + _PATIENCE
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.terminate()
            process.join()


def _work(settings: dict[str, Any], threads: int, streams: int, news: Connection) -> None:
    """The work of one process."""
    faulthandler.enable()  # says where a fault in compiled code came up; without it the exit code alone is known
    watcher = _Sent(news)
    signal.signal(signal.SIGINT, _once)
    warnings.showwarning = note
    torch.set_num_threads(threads)
    try:
        if streams > 1:
            settings |= {"benches": Benches()}  # the data once for all of them
            device = pick_device(settings["planned"][0].part.experiment.device)
            taking_turns(lambda turns: Worker(**settings, turns=turns).work(watcher), streams, device=device)
            return
        with suppress(Stopped):
            Worker(**settings).work(watcher)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except MemoryError:
        sys.exit(NO_MEMORY)
    except AnymaskError as error:  # after which it cannot go on
        print(error, file=sys.stderr)
        sys.exit(2)


def _once(*_: Any) -> None:
    """Ctrl-C, of which only the first counts: a terminal sends it to all processes, and the first one sends it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _deaf() -> Iterator[None]:
    """No Ctrl-C in the block; processes that are started in it hear none before they ask for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
