"""The half of a study that searches: it sees tuning seeds and tuning images, and no test image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from anymask.errors import AnymaskError, TechniqueError
from anymask.report.table import Table, markdown
from anymask.runlog import Ledger
from anymask.sweep.compare import Watcher
from anymask.sweep.halves import Cut
from anymask.sweep.plan import Part, Plan
from anymask.sweep.run import Benches, Clock, Task, Worker, tasks
from anymask.sweep.studyfile import Study
from anymask.sweep.variants import LR, variant_name
from anymask.sweep.winner import Winner
from anymask.train import Computing

_SHOWN = 20  # trials in the table


@dataclass(frozen=True)
class Rate:
    """The baseline with one learning rate.

    Args:
        name: the recipe with it.
        lr: of the choices.
        accuracies: on validation data in %, training by training; empty where one of them failed, as it does when it diverges.
    """

    name: str
    lr: float
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Args:
        recipe: its name.
        points: mean paired difference of its trainings; None before the first.
        trainings: how many pairs that is the mean of.
        end: "finished", "pruned", or why it failed.
    """

    recipe: str
    points: float | None
    trainings: int
    end: str


class Tuning:
    """Trains recipes on the tuning half and tells their validation accuracy, each training once.

    Args:
        study: what is searched.
        folder: ledger.jsonl, masks/ and unfinished/ are in it.
        cut: what there is of the data.
        computing, clock, watcher: as a sweep has them.
    """

    def __init__(self, study: Study, folder: Path, *, cut: Cut, computing: Computing | None, clock: Clock, watcher: Watcher) -> None:
        self.study, self.folder, self.computing, self.clock, self.watcher = study, folder, computing, clock, watcher
        self.benches = Benches(cut=cut, tests=False)
        self.reason = ""  # of the last training that failed
        planned = self.tasks(study.baseline)
        self.trainings, self.first = len(planned), sum(task.cell.seed == planned[0].cell.seed for task in planned)
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.known = {row["id"]: 100 * row["accuracy"]["validation"] for row in self.ledger.rows()}
        watcher.begin(total=(len(study.space[LR].values) + study.trials) * self.trainings, done=len(self.known))

    def tasks(self, recipe: str) -> list[Task]:
        """The trainings of `recipe`, seed by seed.

        Raises:
            AnymaskError: where its settings do not go together.
        """
        return tasks(Plan((with_recipes(self.study.tune, recipe),)), self.folder, self.computing, benches=self.benches)

    def accuracy(self, task: Task) -> float | None:
        """The validation accuracy of `task` in %; None where it failed.

        Raises:
            Stopped: when the time is up.
        """
        if task.name not in self.known:
            worker = Worker([task], self.folder, retries=0, computing=self.computing, clock=self.clock, benches=self.benches)
            worker.work(self.watcher)
            self.known = {row["id"]: 100 * row["accuracy"]["validation"] for row in self.ledger.rows()}
            self.reason = worker.failed().get(task.name, [self.reason])[-1]
        return self.known.get(task.name)

    def rates(self) -> list[Rate]:
        """The baseline with each learning rate, in their order."""
        return [self._rate(lr) for lr in self.study.space[LR].values]

    def _rate(self, lr: float) -> Rate:
        name, found = variant_name(self.study.baseline, {LR: lr}), []
        for task in self.tasks(name):
            accuracy = self.accuracy(task)
            if accuracy is None:
                return Rate(name, lr, ())
            found.append(accuracy)
        return Rate(name, lr, tuple(found))

    def best(self, rates: Sequence[Rate]) -> Rate:
        """The one of the highest mean, the first of equals.

        Raises:
            TechniqueError: where each of them failed.
        """
        whole = [rate for rate in rates if rate.accuracies]
        if not whole:
            raise TechniqueError(
                f"{self.study.baseline} failed with each learning rate ({self.reason})",
                allowed="at least one with which it can be trained",
                fix="give lr in [space] lower choices",
            )
        return max(whole, key=lambda rate: fmean(rate.accuracies))


def with_recipes(parts: Sequence[Part], *recipes: str) -> tuple[Part, ...]:
    """`parts`, which train these recipes."""
    return tuple(replace(part, grid=replace(part.grid, recipes=recipes)) for part in parts)


def where(study: Study, half: str) -> str:
    """Which seeds, data and networks a half has, in words."""
    parts: tuple[Part, ...] = getattr(study, half)
    names = [", ".join(dict.fromkeys(getattr(part.experiment, what) for part in parts)) for what in ("data", "model")]
    return f"{names[0]}; {names[1]}; seeds {', '.join(map(str, parts[0].seeds))}"


def tuning_table(study: Study, rates: Sequence[Rate], trials: Sequence[Trial], winner: Winner) -> str:
    """Markdown: what tuning saw, and what it chose."""
    first = Table(
        f"Learning rate of {study.baseline}",
        ["lr", "validation accuracy, %", "trainings"],
        [[f"{rate.lr:g}", f"{fmean(rate.accuracies):.2f}" if rate.accuracies else "failed", str(len(rate.accuracies))] for rate in rates],
        [f"Chosen: {winner.baseline}."] + ["It had no choice: with one learning rate the baseline is not tuned."] * (len(rates) == 1),
    )
    ranked = sorted(trials, key=lambda trial: (trial.end != "finished", -trial.trainings, -(trial.points or 0.0)))
    ends = [sum(trial.end == end for trial in trials) for end in ("finished", "pruned")]
    second = Table(
        f"Settings of {study.base}",
        ["recipe", "mean of paired differences, points", "trainings", "end"],
        [[t.recipe, "-" if t.points is None else f"{t.points:+.2f}", str(t.trainings), t.end] for t in ranked[:_SHOWN]],
        [
            f"{len(trials)} settings were tried: {ends[0]} finished, {ends[1]} were pruned, {len(trials) - sum(ends)} failed.",
            "Validation accuracies, of seeds and images that the search has seen. The best of many is better here than it is.",
        ],
    )
    return markdown([first, second])


def reason_of(error: AnymaskError) -> str:
    """An error in one line, for a table."""
    return f"{type(error).__name__}: {error.came}"
