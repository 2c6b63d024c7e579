"""A sweep loses nothing and does nothing twice, whatever stops it."""

import copy
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anymask.config import Bench
from anymask.errors import SettingError
from anymask.runlog import Ledger, settings_id
from anymask.sweep import Cell, Outcome, Runner, Watcher, make_masks, read_plan, sweep, tasks
from anymask.sweep.claims import claimed, make_once
from anymask.sweep.masks import Masks
from anymask.sweep.run import Benches, Clock, Stopped, Worker
from anymask.train import Computing
from tests.sweep.plans import CELLS, DENSELY, FAILING, PLAN, failing, write_plan

KILLS = 8
CONTEXT = multiprocessing.get_context("forkserver")  # its children have torch from the beginning, and no threads of this process
CONTEXT.set_forkserver_preload(["anymask.sweep.run", "anymask.sweep.workers"])


@pytest.fixture(scope="module")
def plan(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan file of `CELLS` trainings of 2 epochs."""
    return write_plan(tmp_path_factory.mktemp("plan") / "plan.toml", images)


@pytest.fixture(scope="module")
def whole(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], float]:
    """The rows of an undisturbed sweep, and how long it took in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    process, begun = begin(plan, folder)
    process.join()
    assert process.exitcode == 0
    return rows(folder), time.monotonic() - begun


class Log(Watcher):
    """Notes what it is told; a Ctrl-C at an epoch, or when so many trainings are finished."""

    def __init__(self, *, stop_at: int | None = None, enough: int | None = None) -> None:
        self.cells: list[str] = []
        self.running: set[Cell] = set()
        self.why: list[str | None] = []
        self.names: list[str] = []
        self.epochs, self.stop_at, self.enough, self.counts = 0, stop_at, enough, (0, 0)

    def begin(self, *, total: int, done: int) -> None:
        self.counts = (total, done)

    def cell(self, cell: Cell, *, epochs: int) -> None:
        self.cells.append(str(cell))
        self.running.add(cell)

    def epoch(self, cell: Cell, epoch: int, figures: dict[str, Any]) -> None:
        assert cell in self.running
        self.epochs += 1
        if self.epochs == self.stop_at:
            raise KeyboardInterrupt

    def left(self, cell: Cell, why: str | None) -> None:
        self.running.discard(cell)  # no news of trainings come from Ray's nodes but this
        self.why.append(why)

    def finished(self, cell: Cell, row: dict[str, Any]) -> None:
        self.running.discard(cell)  # another process may have trained it
        self.names.append(row["id"])
        if len(self.names) == self.enough:
            raise KeyboardInterrupt


class Told(Watcher):
    """Tells the test by a pipe when the sweep begins, and in a file of each epoch that it has trained."""

    def __init__(self, pipe: Any, file: Path) -> None:
        self.pipe, self.file = pipe, file

    def begin(self, *, total: int, done: int) -> None:
        self.pipe.send(total)

    def epoch(self, cell: Cell, epoch: int, figures: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(cell.task + "\n")  # type: ignore[attr-defined]


def _sweep(plan: Path, folder: Path, pipe: Any, file: Path) -> None:
    sweep(read_plan(plan), folder, computing=DENSELY, watcher=Told(pipe, file))


def begin(plan: Path, folder: Path) -> tuple[Any, float]:
    """A process that sweeps, and when it began to; its log is beside `folder`."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_sweep, args=(plan, folder, there, folder.parent / f"{folder.name}-{random.random()}.log"))
    process.start()
    there.close()
    here.recv()
    return process, time.monotonic()


def rows(folder: Path) -> list[dict[str, Any]]:
    return Ledger(folder / "ledger.jsonl").rows()


def settled(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what may differ between two sweeps of one plan."""
    found = copy.deepcopy(found)
    for row in found:
        for key in ("time", "versions", "machine", "command"):
            del row[key]
    return found


def test_everything_is_trained_in_its_order_and_a_second_call_trains_nothing(plan: Path, whole: Any, tmp_path: Path) -> None:
    first, second = Log(), Log()
    outcome = sweep(read_plan(plan), tmp_path, computing=DENSELY, watcher=first)
    planned = tasks(read_plan(plan), tmp_path)
    assert first.names == [row["id"] for row in rows(tmp_path)] == [task.name for task in planned]
    assert outcome == Outcome(tuple(planned), (), ())
    assert settled(rows(tmp_path)) == settled(whole[0])
    assert sweep(read_plan(plan), tmp_path, watcher=second) == outcome
    assert (second.counts, second.epochs, second.names) == ((CELLS, CELLS), 0, [])
    assert not list((tmp_path / "claims").iterdir())
    assert not list((tmp_path / "unfinished").iterdir())


def test_killed_at_random_moments_it_ends_with_the_ledger_of_an_undisturbed_sweep(plan: Path, whole: Any, tmp_path: Path) -> None:
    (undisturbed, seconds), folder, seed = whole, tmp_path / "run", int(time.time())
    lots, kills = random.Random(seed), 0
    while True:
        process, begun = begin(plan, folder)
        if kills < KILLS:
            process.join(lots.uniform(0, seconds / KILLS))  # in all less than a whole sweep takes
        else:
            process.join(60)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        assert time.monotonic() - begun < 60
    assert process.exitcode == 0
    assert kills >= 6, f"lots of seed {seed}"
    assert settled(rows(folder)) == settled(undisturbed), f"lots of seed {seed}"
    left = [path.name for place in ("claims", "unfinished", "masks") for path in (folder / place).iterdir() if path.suffix != ".mask"]
    assert not left, f"lots of seed {seed}"


def test_two_processes_on_one_folder_never_do_a_training_twice(plan: Path, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    both = [begin(plan, folder)[0] for _ in range(2)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    done = [path.read_text().split() for path in tmp_path.glob("run-*.log")]
    assert len(done) == 2
    assert all(done)
    assert sorted(row["id"] for row in rows(folder)) == sorted(row["id"] for row in whole[0])
    assert sorted(done[0] + done[1]) == sorted(2 * [row["id"] for row in whole[0]])  # both epochs of each, once
    by_name = {row["id"]: row["accuracy"] for row in whole[0]}
    assert {row["id"]: row["accuracy"] for row in rows(folder)} == by_name


def test_what_another_process_holds_is_left_to_it_until_it_lets_go(plan: Path, tmp_path: Path) -> None:
    planned = tasks(read_plan(plan), tmp_path)
    with claimed(tmp_path / "claims" / f"{planned[0].name}.lock"), pytest.raises(KeyboardInterrupt):
        sweep(read_plan(plan), tmp_path, computing=DENSELY, watcher=Log(enough=CELLS - 1))
    assert [row["id"] for row in rows(tmp_path)] == [task.name for task in planned[1:]]
    assert not sweep(read_plan(plan), tmp_path, computing=DENSELY).left
    assert [row["id"] for row in rows(tmp_path)] == [task.name for task in [*planned[1:], planned[0]]]


def test_a_mask_that_another_process_makes_is_not_waited_for(plan: Path, tmp_path: Path) -> None:
    planned = tasks(read_plan(plan), tmp_path)
    theirs = [task for task in planned if (task.cell.mask, task.cell.seed) == ("snip", 0)]
    file = Benches().runner(theirs[0].part, tmp_path, computing=DENSELY).mask_file("snip", 0.9, 0)
    with claimed(file.with_suffix(".lock")), pytest.raises(KeyboardInterrupt):
        sweep(read_plan(plan), tmp_path, computing=DENSELY, watcher=Log(enough=CELLS - 2))
    assert {row["id"] for row in rows(tmp_path)} == {task.name for task in planned if task not in theirs}
    assert not sweep(read_plan(plan), tmp_path, computing=DENSELY).left


@pytest.mark.parametrize("retries", [0, 2])
def test_what_fails_is_tried_again_at_the_end_and_then_reported_with_its_reason(retries: int, images: Path, tmp_path: Path) -> None:
    both = f"retries = {retries}\n[protocol]\nepochs = 1\nbatch_size = 16\n{FAILING}\n{FAILING.split('[block.protocol]')[0]}"
    path, log = write_plan(tmp_path / "plan.toml", images, both), Log()
    outcome = sweep(read_plan(path), tmp_path / "run", computing=DENSELY, watcher=log)
    assert len(log.cells) == 2 + retries  # the good one came before the bad one was tried again
    assert (len(outcome.finished), len(outcome.left)) == (1, 0)
    (failed,) = outcome.failed
    assert failed.tries == 1 + retries
    assert failed.reason.startswith("TechniqueError: the training loss became")
    assert log.why == [failed.reason] * (1 + retries)  # told at once
    lines = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [failed.task.name] * (1 + retries)
    assert settings_id(lines[0]["settings"]) == failed.task.name
    assert lines[0]["type"] == "TechniqueError"
    assert "plan.toml" in lines[0]["block"]
    assert sweep(read_plan(path), tmp_path / "run", computing=DENSELY).failed[0].tries == 1 + retries  # a later sweep begins anew


def test_ctrl_c_keeps_what_is_trained(plan: Path, whole: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(read_plan(plan), tmp_path, computing=DENSELY, watcher=Log(stop_at=5))
    assert len(rows(tmp_path)) == 2
    log = Log()
    assert not sweep(read_plan(plan), tmp_path, computing=DENSELY, watcher=log).left
    assert log.epochs == 2 * CELLS - 5
    assert settled(rows(tmp_path)) == settled(whole[0])


class Slow(Log):
    def epoch(self, cell: Cell, epoch: int, figures: dict[str, Any]) -> None:
        super().epoch(cell, epoch, figures)
        time.sleep(0.3)


def test_a_budget_stops_between_epochs_and_the_next_call_goes_on_to_the_same_numbers(plan: Path, whole: Any, tmp_path: Path) -> None:
    epochs, calls, outcome = 0, 0, None
    while outcome is None or outcome.left:
        log = Slow()
        outcome = sweep(read_plan(plan), tmp_path, computing=DENSELY, budget="1s" if calls < 3 else None, watcher=log)
        assert outcome.left or calls >= 3
        epochs, calls = epochs + log.epochs, calls + 1
    assert epochs == 2 * CELLS  # none was trained twice
    assert settled(rows(tmp_path)) == settled(whole[0])


@pytest.mark.parametrize("stop", [2, 3, 4])  # after an epoch of the first round, before the second one, in it
def test_a_budget_stops_the_search_for_a_lottery_ticket_anywhere(stop: int, plan: Path, tmp_path: Path) -> None:
    (task, *_) = tasks(read_plan(plan), tmp_path)
    runner, rounds = Benches().runner(task.part, tmp_path, computing=DENSELY), []

    def between(**needs: float) -> None:
        rounds.append("epoch" if needs else "round")
        if len(rounds) == stop:
            Clock(time.monotonic()).check()

    runner.masks.pace.between = between
    cell = Cell("lottery", 0.3, "default", 0)
    with pytest.raises(Stopped):
        runner.start(cell, runner.bench.model(0))
    assert len(list((tmp_path / "masks").rglob("round-*.mask"))) == rounds.count("round") - 1
    assert bool(list((tmp_path / "masks").rglob("unfinished.pt"))) == (rounds[-1] == "epoch")
    assert not list((tmp_path / "masks").glob("*.lock"))
    runner.masks.pace.between = lambda **_: None
    ours = runner.start(cell, runner.bench.model(0)).mask
    theirs = Runner(runner.bench, tmp_path / "whole", computing=DENSELY).start(cell, runner.bench.model(0)).mask
    assert ours == theirs
    assert not list(tmp_path.rglob("unfinished.pt"))


def test_a_mask_that_was_made_while_this_process_waited_is_not_made_again(plan: Path, tmp_path: Path) -> None:
    (task, *_) = tasks(read_plan(plan), tmp_path)
    runner = Benches().runner(task.part, tmp_path, computing=DENSELY)
    made = Masks.make(runner.masks, "snip", sparsity=0.9, seed=0, model=runner.bench.model(0))
    file = runner.mask_file("snip", 0.9, 0)
    made.save(file)
    runner.masks.make = None  # type: ignore[assignment, method-assign]  # would raise
    make_once(file, lambda: runner.masks.make_file(file, "snip"), wait=True)
    assert runner.start(Cell("snip", 0.9, "default", 0), runner.bench.model(0)).mask == made


class Murderer(Log):
    """Kills one of the workers when the first training is finished."""

    def finished(self, cell: Cell, row: dict[str, Any]) -> None:
        super().finished(cell, row)
        if len(self.names) == 1:
            victim = multiprocessing.active_children()[0]
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)


def test_of_two_workers_one_is_killed_and_the_other_does_the_rest_each_once(plan: Path, whole: Any, tmp_path: Path) -> None:
    log = Murderer()
    outcome = sweep(read_plan(plan), tmp_path, computing=DENSELY, workers=2, watcher=log)
    assert (len(outcome.finished), outcome.failed, outcome.left, outcome.died) == (CELLS, (), (), (-signal.SIGKILL,))
    assert sorted(log.names) == sorted(row["id"] for row in rows(tmp_path)) == sorted(row["id"] for row in whole[0])
    assert {row["id"]: row["accuracy"] for row in rows(tmp_path)} == {row["id"]: row["accuracy"] for row in whole[0]}
    assert len(set(log.cells)) == CELLS  # that of the killed one is told of twice, and those whose mask another was making
    assert CELLS <= len(log.cells) <= CELLS + 1 + len(log.why)
    assert 2 * CELLS - 1 <= log.epochs <= 2 * CELLS + 1
    assert not log.running


def test_what_another_process_failed_at_just_now_counts_among_the_tries(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed between this one's look at failures.jsonl and its claim."""
    tried: list[str] = []
    monkeypatch.setattr(Runner, "train", failing(ValueError("ours"), tried))
    (task, *_) = tasks(read_plan(plan), tmp_path)
    worker, theirs = (Worker([task], tmp_path, retries=1, computing=DENSELY, clock=Clock()) for _ in range(2))

    @contextmanager
    def late(path: Path, *, wait: bool) -> Iterator[bool]:
        if not theirs.failed():
            theirs.note(task, ValueError("theirs"))
        with claimed(path, wait=wait) as mine:
            yield mine

    monkeypatch.setattr(sys.modules[Runner.__module__], "claimed", late)
    worker.work(Watcher())
    assert worker.failed() == {task.name: ["ValueError: theirs", "ValueError: ours"]}
    assert len(tried) == 1


def test_what_another_process_finishes_meanwhile_is_told_of(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is another's when this one comes to it, and is finished, as is the third, while this one trains the second."""
    first, second, third, *_ = tasks(read_plan(plan), tmp_path)
    worker, log, other = Worker([first, second, third], tmp_path, retries=1, computing=DENSELY, clock=Clock()), Log(), ExitStack()
    other.enter_context(claimed(tmp_path / "claims" / f"{first.name}.lock"))

    def run(self: Runner, cell: Cell, name: str, watcher: Watcher) -> dict[str, Any]:
        other.close()
        for task in (first, second, third):
            worker.ledger.append({"id": task.name})
        return {"id": name}

    monkeypatch.setattr(Runner, "run", run)
    worker.work(log)
    assert log.names == [second.name, third.name, first.name]


def test_masks_that_were_made_elsewhere_are_trained_with(plan: Path, whole: Any, tmp_path: Path) -> None:
    told: list[str] = []
    assert make_masks(read_plan(plan), tmp_path / "there", DENSELY, told=lambda task: told.append(str(task.cell))) == 4
    assert len(told) == 4
    assert make_masks(read_plan(plan), tmp_path / "there", DENSELY, told=lambda task: told.append("again")) == 4
    assert "again" not in told
    assert not rows(tmp_path / "there")
    shutil.copytree(tmp_path / "there", tmp_path / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masks, "make", None)  # nothing is left to make
        sweep(read_plan(plan), tmp_path / "here", computing=DENSELY)
    assert {row["id"]: row["accuracy"] for row in rows(tmp_path / "here")} == {row["id"]: row["accuracy"] for row in whole[0]}


def test_the_data_are_read_once_for_planning_and_training(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, begin = [], Bench.__init__
    monkeypatch.setattr(Bench, "__init__", lambda self, *args, **how: (read.append(args), begin(self, *args, **how))[1])
    make_masks(read_plan(plan), tmp_path, DENSELY)
    with pytest.raises(KeyboardInterrupt):
        sweep(read_plan(plan), tmp_path, computing=DENSELY, watcher=Log(stop_at=1))
    assert len(read) == 2  # one for each of the two


def test_several_trainings_in_one_process_end_as_each_alone(plan: Path, whole: Any, tmp_path: Path) -> None:
    outcome = sweep(read_plan(plan), tmp_path, computing=replace(DENSELY, compile="graph"), streams=3)
    assert (len(outcome.finished), outcome.failed, outcome.left, outcome.died) == (CELLS, (), (), ())
    assert {row["id"]: row["accuracy"] for row in rows(tmp_path)} == {row["id"]: row["accuracy"] for row in whole[0]}
    assert len(rows(tmp_path)) == CELLS
    assert {row["machine"]["threads"] for row in rows(tmp_path)} == {torch.get_num_threads()} == {1}  # as asked for in tests/conftest.py


def test_a_plan_that_fits_nowhere_writes_nothing(plan: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(plan.read_text() + PLAN.split("[[block]]")[1].join(["[[block]]", ""]).replace("{images}", str(tmp_path / "gone")))
    with pytest.raises(ValueError, match=r"block 2 of .*: no folder in"):
        sweep(read_plan(path), tmp_path / "run")
    with pytest.raises(SettingError, match="workers came as 0"):
        sweep(read_plan(plan), tmp_path / "run", workers=0)
    with pytest.raises(SettingError, match="streams came as 2 without compile='graph'"):
        sweep(read_plan(plan), tmp_path / "run", streams=2)
    with pytest.raises(SettingError, match="streams came as 2 with ray"):
        sweep(read_plan(plan), tmp_path / "run", streams=2, ray="auto", computing=Computing(compile="graph"))
    assert not (tmp_path / "run").exists()
