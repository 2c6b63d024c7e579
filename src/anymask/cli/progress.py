"""What people see while trainings run: bars on a terminal, a line for each training elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from anymask.sweep import Cell, Watcher

_ALL_SAMPLES = 1e9  # seconds: trainings are long, so the time left is judged by all that was seen, not by the last half minute


class Lines(Watcher):
    """One plain line for each finished training."""

    def __init__(self, console: Console) -> None:
        self.console, self.total, self.done = console, 0, 0
        self.running: Cell | None = None

    def begin(self, *, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._say(f"{total} training{'s' * (total != 1)}" + (f", {done} finished already" if done else ""))

    def cell(self, cell: Cell, *, epochs: int) -> None:
        self.running = cell

    def finished(self, row: dict[str, Any]) -> None:
        self.done += 1
        accuracy, seconds = row["accuracy"], row["time"]["seconds"]
        shown = ", ".join(f"{name} {100 * accuracy[name]:.2f}%" for name in ("test", "validation") if accuracy[name] is not None)
        self._say(f"[{self.done}/{self.total}] {self.running}: {shown}, {seconds:.1f} s")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Bars(Lines):
    """The same lines, above a bar of all trainings and a bar of the one that runs."""

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console)
        self.progress = progress
        self.all = progress.add_task("all", total=None, note="")
        self.one = progress.add_task("getting ready", total=None, note="")
        self.epochs = 1

    def begin(self, *, total: int, done: int) -> None:
        super().begin(total=total, done=done)
        self.progress.update(self.all, total=total, completed=done)

    def cell(self, cell: Cell, *, epochs: int) -> None:
        super().cell(cell, epochs=epochs)
        self.epochs = epochs
        self.progress.reset(self.one, total=epochs, description=str(cell), note="mask and first epoch")

    def epoch(self, epoch: int, figures: dict[str, Any]) -> None:
        validation = figures.get("validation_accuracy")
        note = f"loss {figures['train_loss']:.3f}" + ("" if validation is None else f", validation {100 * validation:.1f}%")
        self.progress.update(self.one, completed=epoch, note=note)
        self.progress.update(self.all, completed=self.done + epoch / self.epochs)

    def finished(self, row: dict[str, Any]) -> None:
        super().finished(row)
        self.progress.update(self.all, completed=self.done)


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
