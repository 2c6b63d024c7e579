"""A plan, trained: every training once, whoever is stopped, killed or started beside."""

import copy
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymask.config import Bench, Experiment
from anymask.data import Dataset
from anymask.errors import SettingError, naming
from anymask.ranks import ranks
from anymask.runlog import Ledger, settings_id
from anymask.sweep.claims import Busy, clear_halves
from anymask.sweep.compare import Cell, Runner, Watcher, cells, now, once
from anymask.sweep.hopeless import check_disk, check_gpu
from anymask.sweep.masks import is_dynamic, is_mask_file
from anymask.sweep.pace import Pace
from anymask.sweep.plan import Part, Plan
from anymask.train import Computing

if TYPE_CHECKING:
    from anymask.sweep.turns import Turns

LOOK_AGAIN = 0.5  # seconds between looks at what other processes are doing
_PIECE = re.compile(r"(\d+(?:\.\d+)?)\s*([hms])")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Placed(Cell):
    """A training that says on which data, with which network."""

    data: str = ""
    model: str = ""
    task: str = ""  # the id of its row, which is not shown: two blocks may differ in their protocols alone

    def __str__(self) -> str:
        return f"{self.data}, {self.model}, {super().__str__()}"


@dataclass(frozen=True)
class Task:
    """One training of a plan; its name is the id of its row, the hash of its settings."""

    name: str
    cell: Placed
    part: Part
    settings: Mapping[str, Any] = field(compare=False, repr=False)  # what its name is the hash of
    mask: Path | None = None  # where the mask that it begins with is kept; None where it begins dense, or with a file of the user's


@dataclass(frozen=True)
class Failed:
    """A training that failed as often as it was to be tried."""

    task: Task
    tries: int
    reason: str  # of the last of them


@dataclass(frozen=True)
class Outcome:
    """What became of the trainings of a plan."""

    finished: tuple[Task, ...]
    failed: tuple[Failed, ...]
    left: tuple[Task, ...]
    died: tuple[int, ...] = ()  # exit codes of worker processes that ended before their work did


class Stopped(Exception):
    """The time is up; what was trained is kept."""


@dataclass(frozen=True)
class Clock:
    """When a sweep has to end: at `deadline` of time.monotonic(), and with the process that started it."""

    deadline: float | None = None

    @classmethod
    def within(cls, budget: str | float | None) -> "Clock":
        """One that ends after `budget`: seconds, or a time as `budget_seconds` reads it; never for None."""
        seconds = budget_seconds(budget) if isinstance(budget, str) else budget
        return cls(None if seconds is None else time.monotonic() + seconds)

    def check(self, *, needs: float = 0.0) -> None:
        """Raise Stopped where fewer than `needs` seconds are left."""
        parent = multiprocessing.parent_process()
        if self.deadline is not None and time.monotonic() + needs >= self.deadline:
            raise Stopped
        if parent is not None and not parent.is_alive():
            raise Stopped


def budget_seconds(text: str) -> float:
    """A time such as "25m", "2h", "90s" or "1h30m", in seconds.

    Raises:
        SettingError: for anything else, and for none.

    Example:
        >>> budget_seconds("25m"), budget_seconds("1h30m"), budget_seconds("90s")
        (1500.0, 5400.0, 90.0)
    """
    pieces = _PIECE.findall(text)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in pieces)
    if _PIECE.sub("", text).strip() or seconds <= 0:
        raise SettingError(f"budget came as {text!r}", allowed="hours, minutes or seconds: 2h, 25m, 90s, 1h30m", fix="write 25m, say")
    return seconds


def sweep(
    plan: Plan,
    folder: str | Path,
    *,
    budget: str | float | None = None,
    workers: int = 1,
    streams: int = 1,
    ray: str | None = None,
    computing: Computing | None = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Train what `folder`/ledger.jsonl lacks of `plan`, in its order.

    May be stopped or killed at any moment and called again, or beside another process on the same folder: finished trainings are
    kept, stopped ones go on from their last epoch, and none is trained by two at once. What fails is in `folder`/failures.jsonl,
    and is tried again when all others have been.

    Args:
        plan: of `read_plan`.
        folder: made when it is not there.
        budget: "25m", "2h", "90s" or seconds; then the training that runs stops at the end of its epoch, or one epoch earlier
            where the last epoch took longer than what is left; so do the rounds of a lottery ticket. On Ray all stop at once.
        workers: how many processes train beside each other, >= 1; they share the cores.
        streams: how many trainings each process has beside each other, >= 1; on a GPU with compile="graph" or "fused" only.
        ray: the address of a Ray cluster to train on, instead of here: see `anymask.sweep.on_ray`.
        computing: how.
        watcher: told of progress; on Ray of finished and failed trainings only.

    Raises:
        AnymaskError: for data or settings that do not fit, naming the block; nothing is written before.
        KeyboardInterrupt, MemoryError, and AnymaskError for a full disk or a lost GPU: what is finished is kept.
    """
    if workers < 1:
        raise SettingError(f"workers came as {workers}", allowed="a number >= 1", fix="as many as there are cores, at most")
    if ray is not None and (workers > 1 or streams > 1):
        name, number = ("workers", workers) if workers > 1 else ("streams", streams)
        raise SettingError(
            f"{name} came as {number} with ray", allowed="one of the two", fix=f"leave {name} out: the cluster says how many"
        )
    if streams < 1 or (streams > 1 and not (computing or Computing()).records):
        raise SettingError(
            f"streams came as {streams}" + (" without compile='graph' or 'fused'" if streams > 1 else ""),
            allowed="1, or more with compile='graph' or 'fused'",
            fix="give --compile graph, or leave streams out",
        )
    clock = Clock.within(budget)
    folder, watcher = Path(folder), watcher or Watcher()
    benches = Benches() if ray is None and max(workers, streams) == 1 else None  # what others train with they read; none is kept here
    planned = tasks(plan, folder, computing, device=None if ray is None else "cpu", benches=benches)
    worker = Worker(planned, folder, retries=plan.retries, computing=computing, clock=clock, benches=benches)
    done = worker.ledger.ids()
    for task in planned:
        if task.name in done:  # its process was killed before it could remove that
            (folder / "unfinished" / f"{task.name}.pt").unlink(missing_ok=True)
    watcher.begin(total=len(planned), done=sum(task.name in done for task in planned))
    waiting = sum(task.name not in done for task in planned)
    died: tuple[int, ...] = ()
    if ray is not None and waiting:
        from anymask.sweep.on_ray import on_ray

        with suppress(Stopped):
            on_ray(worker, ray, watcher=watcher)
    elif min(max(workers, streams), waiting) > 1:
        from anymask.sweep.workers import side_by_side

        died = side_by_side(worker, min(workers, waiting), streams=streams, watcher=watcher)
    else:
        with suppress(Stopped):
            worker.work(watcher)
    return replace(worker.outcome(), died=died)


def tasks(
    plan: Plan, folder: str | Path, computing: Computing | None = None, *, device: str | None = None, benches: "Benches | None" = None
) -> list[Task]:
    """The trainings of `plan` in its order: block by block, in a block seed by seed; each once. Writes nothing.

    Args:
        device: where to look at them, when the plan's device is not here; they are the same on any.
        benches: where the data are read; new ones if left out.

    Raises:
        AnymaskError: for data or settings that do not fit, naming the block.
    """
    found: dict[tuple[int, int, int], list[Task]] = {}
    places = [(block, place, part) for block, parts in enumerate(plan.blocks) for place, part in enumerate(parts)]
    benches = benches or Benches(device)
    for block, place, part in sorted(places, key=lambda entry: (entry[2].experiment.data, str(entry[2].experiment.data_dir))):
        with naming(part.block):
            runner = benches.runner(part, folder, computing)
            model = runner.bench.model(part.seeds[0]) if any(map(is_mask_file, part.grid.masks)) else None
            targets = list(cells(part.grid, model))
            for turn, seed in enumerate(part.seeds):
                found[block, turn, place] = [_task(runner, part, replace(cell, seed=seed)) for cell in targets]
    once: dict[str, Task] = {}
    for task in (task for key in sorted(found) for task in found[key]):
        once.setdefault(task.name, task)
    return list(once.values())


def make_masks(plan: Plan, folder: str | Path, computing: Computing | None = None, *, told: Callable[[Task], None] | None = None) -> int:
    """Make the masks that trainings of `plan` begin with, where `folder` lacks them: another machine may train with a copy of it.

    May be stopped at any moment and called again; the search for a lottery ticket goes on in the middle of a round.

    Args:
        told: called before each mask that is made.

    Returns:
        How many masks of the plan are in `folder`.
    """
    benches, wanted = Benches(), dict[Path, Task]()
    for task in tasks(plan, folder, computing, benches=benches):
        if task.mask is not None:
            wanted.setdefault(task.mask, task)
    for file, task in wanted.items():
        if not file.exists():
            if told is not None:
                told(task)
            runner = benches.runner(task.part, folder, computing)
            runner.start(task.cell, runner.bench.model(task.cell.seed))
    return len(wanted)


def _task(runner: Runner, part: Part, cell: Cell) -> Task:
    settings = runner.named_by(cell)
    where = {"data": part.experiment.data, "model": part.experiment.model, "task": settings_id(settings)}
    file = runner.masks.file(cell.mask, sparsity=cell.sparsity, seed=cell.seed)
    return Task(where["task"], Placed(cell.mask, cell.sparsity, cell.recipe, cell.seed, **where), part, settings, file)


class Benches:
    """Makes benches when they are needed, and keeps one; the next one takes its data, where they are the same.

    Args:
        device: instead of that of their parts.
        cut, tests: as `Bench` has them.
    """

    def __init__(self, device: str | None = None, *, cut: Callable[[Dataset], Dataset] | None = None, tests: bool = True) -> None:
        self.bench: Bench | None = None
        self.device, self.cut, self.tests = device, cut, tests

    def of(self, part: Part) -> Bench:
        """The bench of `part`."""
        experiment = replace(part.experiment, device=self.device or part.experiment.device)
        if self.bench is None or _data(self.bench.experiment) != _data(experiment):
            self.bench = None  # the old data go before the new ones come
            bench = Bench(experiment, part.protocol, cut=self.cut, tests=self.tests)
        else:
            bench = copy.copy(self.bench)
            bench.experiment, bench.protocol = experiment, part.protocol
        self.bench = bench
        return bench

    def runner(self, part: Part, folder: str | Path, computing: Computing | None, pace: Pace | None = None) -> Runner:
        """The runner of `part`."""
        return Runner(self.of(part), folder, computing, moves=any(map(is_dynamic, part.grid.masks)), pace=pace)


def _data(experiment: Experiment) -> tuple[Any, ...]:
    return experiment.data, experiment.data_dir, experiment.download, experiment.device


class Worker:
    """Trains what nobody else does, until nothing is left.

    Args:
        planned: all trainings, in their order.
        seen: how many rows of failures.jsonl are of earlier sweeps, whose trainings are tried anew; None for all that are there.
        benches: where the data are read; new ones if left out.
        turns: which it takes with others of this process.
    """

    def __init__(
        self,
        planned: Sequence[Task],
        folder: Path,
        *,
        retries: int,
        computing: Computing | None = None,
        clock: Clock,
        seen: int | None = None,
        benches: Benches | None = None,
        turns: "Turns | None" = None,
    ) -> None:
        if ranks() > 1:
            raise SettingError(
                f"a sweep was started on {ranks()} ranks", allowed="one process, which starts others by itself", fix="give workers, or ray"
            )
        self.planned, self.folder, self.retries, self.computing, self.clock = planned, folder, retries, computing, clock
        self.ledger, self.failures = Ledger(folder / "ledger.jsonl"), Ledger(folder / "failures.jsonl")
        self.seen = len(self.failures.rows()) if seen is None else seen
        self.benches, self.turns = benches or Benches(), turns

    def work(self, watcher: Watcher) -> None:
        """Train; what failed, or was another's, is looked at again when the rest is done.

        Raises:
            Stopped: when the time is up.
        """
        done, again = self.ledger.ids(), False
        waiting = [task for task in self.planned if task.name not in done]
        while waiting:
            failed, left = self.failed(), list[Task]()
            for task in waiting:
                tries = len(failed.get(task.name, ()))
                if tries > self.retries:
                    continue
                if tries and not again:
                    left.append(task)
                    continue
                self.clock.check()
                if not once(self.ledger, task.cell, task.name, partial(self._try, task, watcher, tries=tries), watcher):
                    left.append(task)
            idle, waiting, again = again and len(left) == len(waiting), left, True
            if idle:
                self.clock.check()
                (time.sleep if self.turns is None else self.turns.rest)(LOOK_AGAIN)

    def _try(self, task: Task, watcher: Watcher, *, tries: int) -> dict[str, Any] | None:
        """The row of `task`, which failed so often; None where it fails once more, another process is at its mask, or has failed since."""
        if len(self.failed().get(task.name, ())) > tries:
            return None
        try:
            return self._train(task, watcher)
        except Busy:
            watcher.left(task.cell, None)
        except (MemoryError, Stopped):
            raise
        except Exception as error:
            check_disk(error, self.folder)
            watcher.left(task.cell, self.note(task, error))
            check_gpu(error)
        return None

    def _train(self, task: Task, watcher: Watcher) -> dict[str, Any]:
        beside: dict[str, Any] = {} if self.turns is None else {"on_step": self.turns.step, "streams": self.turns.number}
        pace = Pace(wait=False, between=self.clock.check, **beside)
        runner = self.benches.runner(task.part, self.folder, self.computing, pace)
        clear_halves(runner.checkpoint_file(task.name))
        return runner.run(task.cell, task.name, watcher)

    def note(self, task: Task, error: BaseException) -> str:
        """Remember that a try of `task` failed; why."""
        reason = {"type": type(error).__name__, "message": str(error)}
        what = {"training": str(task.cell), "block": task.part.block, "settings": task.settings}
        self.failures.append({"id": task.name, **what, **reason, "time": now()})
        return f"{type(error).__name__}: {error}"

    def failed(self) -> Mapping[str, list[str]]:
        """The reasons of all tries that failed since this sweep began, by the name of their training."""
        found: dict[str, list[str]] = {}
        for row in self.failures.rows()[self.seen :]:
            found.setdefault(row["id"], []).append(f"{row['type']}: {row['message']}")
        return found

    def outcome(self) -> Outcome:
        """What became of the trainings so far."""
        done, reasons = self.ledger.ids(), self.failed()
        finished = tuple(task for task in self.planned if task.name in done)
        rest = [(task, reasons.get(task.name, [])) for task in self.planned if task.name not in done]
        failed = tuple(Failed(task, len(why), why[-1]) for task, why in rest if len(why) > self.retries)
        return Outcome(finished, failed, tuple(task for task, why in rest if len(why) <= self.retries))
