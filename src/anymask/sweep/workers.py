"""A sweep in several processes of this machine."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from anymask.config import pick_device
from anymask.errors import AnymaskError
from anymask.sweep.compare import Watcher
from anymask.sweep.run import LOOK_AGAIN, Benches, Stopped, Worker
from anymask.sweep.turns import taking_turns

INTERRUPTED, NO_MEMORY = 130, 3
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
    settings = {"retries": worker.retries, "computing": worker.computing, "clock": worker.clock, "seen": worker.seen}
    args = (worker.planned, worker.folder, settings, threads, streams)
    processes: list[BaseProcess] = [context.Process(target=_work, args=args, daemon=True) for _ in range(number)]
    try:
        with _deaf():
            for process in processes:
                process.start()
        _report(worker, processes, watcher)
    finally:
        _end(processes)
    codes = [process.exitcode or 0 for process in processes]
    if NO_MEMORY in codes:
        raise MemoryError
    return tuple(code for code in codes if code)


def _report(worker: Worker, processes: list[BaseProcess], watcher: Watcher) -> None:
    """Tell `watcher` of what comes into the ledger, until all have ended."""
    alive, seen = True, worker.ledger.size()
    waiting, known = {task.name: task for task in worker.planned}, worker.ledger.ids()
    while alive:
        alive = any(process.is_alive() for process in processes)
        # To read 500 rows at each look took a tenth of a core from those who train.
        before, seen = seen, worker.ledger.size()
        for row in worker.ledger.rows() if seen != before else ():
            if row["id"] in waiting and row["id"] not in known:
                known.add(row["id"])
                task = waiting[row["id"]]
                watcher.cell(task.cell, epochs=task.part.protocol.epochs)
                watcher.finished(row)
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


def _work(planned: Any, folder: Any, settings: dict[str, Any], threads: int, streams: int) -> None:
    """The work of one process."""
    signal.signal(signal.SIGINT, _once)
    warnings.showwarning = _note
    torch.set_num_threads(threads)
    try:
        if streams > 1:
            settings |= {"benches": Benches()}  # the data once for all of them
            device = pick_device(planned[0].part.experiment.device)
            taking_turns(lambda turns: Worker(planned, folder, **settings, turns=turns).work(Watcher()), streams, device=device)
            return
        with suppress(Stopped):
            Worker(planned, folder, **settings).work(Watcher())
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


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"Note: {message}", file=sys.stderr)


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
