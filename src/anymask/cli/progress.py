"""What people see while trainings run: bars on a terminal, a line for each training elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from anymask.sweep import Cell, Watcher

_ALL_SAMPLES = 1e9  # seconds: trainings are long, so the time left is judged by all that was seen, not by the last half minute
_SILENCE = 300.0  # seconds, after which a line says how far the trainings are


class _Told(Watcher):
    """One plain line for each training that ended."""

    def __init__(self, console: Console) -> None:
        self.console, self.total, self.done = console, 0, 0

    def begin(self, *, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._say(f"{total} training{'s' * (total != 1)}" + (f", {done} finished already" if done else ""))

    def finished(self, cell: Cell, row: dict[str, Any]) -> None:
        self.done += 1
        accuracy, seconds = row["accuracy"], row["time"]["seconds"]
        shown = ", ".join(f"{name} {100 * accuracy[name]:.2f}%" for name in ("test", "validation") if accuracy[name] is not None)
        self._say(f"[{self.done}/{self.total}] {cell}: {shown}, {seconds:.1f} s")

    def left(self, cell: Cell, why: str | None) -> None:
        if why is not None:
            self._say(f"Failed: {cell}: {why}")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Lines(_Told):
    """And now and then how far those are that run."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.running: dict[Cell, int] = {}  # and how many epochs they have
        self.said = time.monotonic()

    def cell(self, cell: Cell, *, epochs: int) -> None:
        self.running[cell] = epochs

    def epoch(self, cell: Cell, epoch: int, figures: dict[str, Any]) -> None:
        if time.monotonic() - self.said > _SILENCE:
            self._say(f"[{self.done}/{self.total}] {cell}: epoch {epoch} of {self.running[cell]}, {_figures(figures)}")

    def _say(self, line: str) -> None:
        super()._say(line)
        self.said = time.monotonic()


class Bars(_Told):
    """And a bar of all trainings, and one of each that runs."""

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console)
        self.progress = progress
        self.all = progress.add_task("all", total=None, note="")
        self.ready = progress.add_task("getting ready", total=None, note="")
        self.running: dict[Cell, TaskID] = {}

    def begin(self, *, total: int, done: int) -> None:
        super().begin(total=total, done=done)
        self.progress.update(self.all, total=total, completed=done)

    def cell(self, cell: Cell, *, epochs: int) -> None:
        self._remove(cell)  # whose process was killed
        self.progress.update(self.ready, visible=False)
        self.running[cell] = self.progress.add_task(str(cell), total=epochs, note="mask and first epoch")

    def epoch(self, cell: Cell, epoch: int, figures: dict[str, Any]) -> None:
        self.progress.update(self.running[cell], completed=epoch, note=_figures(figures))
        self._count()

    def finished(self, cell: Cell, row: dict[str, Any]) -> None:
        super().finished(cell, row)
        self.progress.update(self.ready, visible=False)  # Ray's nodes tell of no beginning
        self._remove(cell)

    def left(self, cell: Cell, why: str | None) -> None:
        super().left(cell, why)
        self._remove(cell)

    def _remove(self, cell: Cell) -> None:
        bar = self.running.pop(cell, None)
        if bar is not None:
            self.progress.remove_task(bar)
        self._count()

    def _count(self) -> None:
        bars = self.running.values()
        parts = sum(task.completed / (task.total or 1) for task in self.progress.tasks if task.id in bars)
        self.progress.update(self.all, completed=self.done + parts)


def _figures(figures: dict[str, Any]) -> str:
    validation = figures.get("validation_accuracy")
    return f"loss {figures['train_loss']:.3f}" + ("" if validation is None else f", validation {100 * validation:.1f}%")


@contextmanager
def watching(console: Console | None = None) -> Iterator[Watcher]:
    """A watcher that shows what happens on stderr, so that stdout holds results only."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))
    with Progress(*columns, *left, console=console, speed_estimate_period=_ALL_SAMPLES, transient=True) as progress:
        yield Bars(console, progress)
