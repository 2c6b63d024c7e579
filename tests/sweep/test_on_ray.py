"""A sweep on a real Ray cluster, of two nodes on this machine: what a node takes with it is trained again, and nothing else."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed", exc_type=ImportError)

from anymask.config import Bench, Experiment
from anymask.errors import AnymaskError, DataError, SettingError, UnknownName
from anymask.runlog import Ledger
from anymask.sweep import Cell, on_ray, read_plan, sweep, tasks
from anymask.sweep.run import Clock, Worker
from anymask.train import Protocol
from tests.sweep.plans import CELLS, DENSELY, FAILING, PLAN, write_plan
from tests.sweep.test_sweep_run import Log, rows, settled

QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 5}  # a dead node is noticed
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with one core."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": QUICK})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def plan(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of `CELLS` trainings, each long enough to be cut off."""
    return write_plan(tmp_path_factory.mktemp("plan") / "plan.toml", images, PLAN.replace("epochs = 2", "epochs = 12"))


@pytest.fixture(scope="module")
def whole(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep in this process."""
    folder = tmp_path_factory.mktemp("whole")
    sweep(read_plan(plan).on("cpu"), folder, computing=DENSELY)
    return folder


def at_work(parent: int) -> list[int]:
    """The processes under `parent` that train right now: Ray gives them the name of what they do."""
    found = []
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            name = Path(f"/proc/{child}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [int(child)] * name.startswith("ray::train")
    return found


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def until(found: Callable[[], Any]) -> Any:
    """What `found` gives as soon as that is something."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.005)
    raise AssertionError("in 60 seconds it did not come to that")


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Does `work` in a thread while the block runs."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


class Counting(Log):
    """Notes how many tries had failed when a training was finished."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.ledger, self.failures = Ledger(folder / "failures.jsonl"), []

    def finished(self, cell: Cell, row: dict[str, Any]) -> None:
        super().finished(cell, row)
        self.failures.append(len(self.ledger.rows()))


def by_id(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(settled(found), key=lambda row: row["id"])


def masks(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "masks").iterdir()}


def test_of_two_nodes_one_is_lost_and_every_training_is_in_the_ledger_once_as_if_nothing_had_been(
    cluster: Any, plan: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/anymask", "sweep", "my plan.toml"])
    node, log, cut = cluster.add_node(**NODE), Log(), []

    def remove() -> None:
        until(lambda: log.names)
        cut.extend(until(lambda: at_work(raylet(node))))
        cluster.remove_node(node, allow_graceful=False)

    with beside(remove):
        outcome = sweep(read_plan(plan).on("cpu"), tmp_path, computing=DENSELY, ray=cluster.address, watcher=log)
    assert len(cut) == 1
    assert (len(outcome.finished), outcome.failed, outcome.left) == (CELLS, (), ())
    assert by_id(rows(tmp_path)) == by_id(rows(whole))
    assert {row["command"] for row in rows(tmp_path)} == {"anymask sweep 'my plan.toml'"}
    assert sorted(log.names) == sorted(row["id"] for row in rows(tmp_path))
    assert masks(tmp_path) == masks(whole)
    assert not (tmp_path / "failures.jsonl").exists()
    assert not [*(tmp_path / "claims").iterdir(), *(tmp_path / "unfinished").iterdir()]
    again = Log()
    assert sweep(read_plan(plan).on("cpu"), tmp_path, ray="127.0.0.1:1", watcher=again) == outcome  # nothing left: Ray is not asked
    assert again.names == []


def test_one_node_trains_in_the_order_of_the_plan_and_what_fails_is_tried_again_at_the_end(
    cluster: Any, images: Path, tmp_path: Path
) -> None:
    dense = PLAN.split("[[block]]")[1].replace('["random-erk", "snip"]', "[]").replace("seeds = 2", "seeds = 4")
    text = f"retries = 2\n[protocol]\nepochs = 1\nbatch_size = 16\n{FAILING}\n[[block]]\n{dense}"
    wanted, folder = read_plan(write_plan(tmp_path / "plan.toml", images, text)).on("cpu"), tmp_path / "run"
    log = Counting(folder)
    outcome = sweep(wanted, folder, computing=DENSELY, ray=cluster.address, watcher=log)
    bad, *good = tasks(wanted, folder)
    assert log.names == [task.name for task in good]
    assert max(log.failures[:3]) == 1
    (failed,) = outcome.failed
    assert (failed.task, failed.tries, outcome.left) == (bad, 3, ())
    assert failed.reason.startswith("TechniqueError: the training loss became")


def test_what_another_process_has_trained_meanwhile_is_told_of(plan: Path, whole: Path) -> None:
    planned, log = tasks(read_plan(plan).on("cpu"), whole), Log()
    driver = SimpleNamespace(room=lambda: 1, running={}, worker=Worker(planned, whole, retries=1, clock=Clock()), watcher=log)
    assert on_ray._Driver._begin(driver, planned) == []  # type: ignore[arg-type]
    assert log.names == [task.name for task in planned]
    driver._begin = partial(on_ray._Driver._begin, driver)
    on_ray._Driver.work(driver)  # type: ignore[arg-type]
    assert len(log.names) == CELLS  # what was there before is not told of


def test_a_budget_stops_and_the_next_call_does_what_is_left(cluster: Any, plan: Path, whole: Path, tmp_path: Path) -> None:
    wanted = read_plan(plan).on("cpu")
    begun = time.monotonic()
    outcome = sweep(wanted, tmp_path, computing=DENSELY, ray=cluster.address, budget=0.1)
    assert time.monotonic() - begun < 10
    until(lambda: not at_work(raylet(cluster.head_node)))
    assert len(outcome.left) >= CELLS - 2
    assert not outcome.failed
    assert not sweep(wanted, tmp_path, computing=DENSELY, ray=cluster.address).left
    assert by_id(rows(tmp_path)) == by_id(rows(whole))


def test_a_process_that_dies_more_often_than_it_may_is_a_try_that_failed(
    cluster: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "LOST", 0)
    text = PLAN.replace("seeds = 2", "seeds = 1").replace("epochs = 2", "epochs = 20").replace('["random-erk", "snip"]', "[]")
    wanted = read_plan(write_plan(tmp_path / "plan.toml", images, text)).on("cpu")
    head = raylet(cluster.head_node)
    with beside(lambda: os.kill(until(lambda: at_work(head))[0], signal.SIGKILL)):
        outcome = sweep(wanted, tmp_path / "run", computing=DENSELY, ray=cluster.address)
    assert (len(outcome.finished), outcome.failed) == (1, ())
    (line,) = Ledger(tmp_path / "run" / "failures.jsonl").rows()
    assert line["type"] == "WorkerCrashedError"


def test_a_node_without_anymask_stops_the_sweep_and_says_so(cluster: Any, plan: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "anymask").mkdir(parents=True)
    (tmp_path / "other" / "anymask" / "__init__.py").write_text("raise ImportError('no anymask here')")
    node = cluster.add_node(**NODE, env_vars={"PYTHONPATH": str(tmp_path / "other")})
    with pytest.raises(AnymaskError, match=r"a node cannot begin a training .*no anymask here"):
        sweep(read_plan(plan).on("cpu"), tmp_path / "run", computing=DENSELY, ray=cluster.address)
    cluster.remove_node(node)
    assert not list((tmp_path / "run" / "claims").iterdir())


def test_ctrl_c_stops_what_runs_on_the_cluster_and_keeps_what_is_finished(cluster: Any, images: Path, tmp_path: Path) -> None:
    text = PLAN.replace("seeds = 2", "seeds = 1").replace("epochs = 2", "epochs = 40")
    plan, out = write_plan(tmp_path / "plan.toml", images, text), tmp_path / "run"
    command = [sys.executable, "-m", "anymask", "sweep", plan, "--out", out, "--device", "cpu", "--ray", cluster.address]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("[1/"):
        assert line, "it ended before its first training"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"finished trainings are kept in {out}; the same command goes on from there." in err
    assert "Traceback" not in err
    until(lambda: not at_work(raylet(cluster.head_node)))
    assert 1 <= len(rows(out)) < 5
    assert not list((out / "claims").iterdir())


# -- what a node does ---------------------------------------------------------------------------------------------------


def order(plan: Path, folder: Path, whole: Path) -> on_ray.Order:
    """To train with SNIP's mask, away from the run folder."""
    task = next(task for task in tasks(read_plan(plan), whole) if task.cell.mask == "snip")
    assert task.mask is not None
    return on_ray.Order(task, DENSELY, Path.cwd(), folder, folder / "claims" / "gone.lock", {task.mask.name: task.mask.read_bytes()})


def test_a_node_that_does_not_see_the_run_folder_gives_the_same_rows_and_masks_and_writes_nothing_there(
    plan: Path, whole: Path, tmp_path: Path
) -> None:
    away = order(plan, tmp_path / "run", whole)
    assert settled([on_ray.train(away)]) == settled([row for row in rows(whole) if row["id"] == away.task.name])
    assert on_ray.make_mask(replace(away, masks={})) == away.masks
    assert not list(tmp_path.iterdir())


def test_where_the_run_folder_is_seen_a_training_that_was_cut_off_goes_on(plan: Path, whole: Path, tmp_path: Path) -> None:
    there = order(plan, tmp_path, whole)
    there.claim.parent.mkdir()
    there.claim.touch()
    row = on_ray.train(there)
    kept = tmp_path / "unfinished" / f"{there.task.name}.pt"
    begun = kept.stat().st_mtime_ns
    assert on_ray.train(there)["accuracy"] == row["accuracy"]
    assert kept.stat().st_mtime_ns == begun  # its end was there


def test_a_node_with_other_data_is_refused(plan: Path, images: Path, whole: Path, tmp_path: Path) -> None:
    away = order(plan, tmp_path / "run", whole)
    shutil.copytree(images, tmp_path / "images")
    next((tmp_path / "images").rglob("*.png")).unlink()
    part = replace(away.task.part, experiment=replace(away.task.part.experiment, data_dir=tmp_path / "images"))
    with pytest.raises(DataError, match="has other data, mask files or settings"):
        on_ray.train(replace(away, task=replace(away.task, part=part)))


def test_a_node_that_lacks_a_module_of_the_users_stops_the_sweep() -> None:
    """It would fail all that is left, one by one."""
    lacking = replace(Experiment(), plugins=("nowhere_to_be_found",))
    with pytest.raises(UnknownName, match="module 'nowhere_to_be_found' cannot be imported") as caught:
        Bench(lacking, Protocol())
    driver = SimpleNamespace(ray=importlib.import_module("ray"))
    with pytest.raises(UnknownName):
        on_ray._Driver._reason(driver, caught.value)  # type: ignore[arg-type]


def test_cuda_asks_for_a_gpu_and_auto_does_where_there_is_one(plan: Path, whole: Path) -> None:
    def needs(device: str, **there: float) -> dict[str, int]:
        return on_ray._needs(tasks(read_plan(plan).on(device), whole, device="cpu"), there=there)

    assert needs("cuda") == needs("auto", CPU=1.0, GPU=2.0) == {"CPU": 1, "GPU": 1}
    assert needs("cpu", GPU=2.0) == needs("auto", CPU=1.0) == {"CPU": 1}


def test_a_cluster_that_can_train_nothing_is_refused(cluster: Any, plan: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="a cluster without a CPU and a GPU"):
        sweep(read_plan(plan).on("cuda"), tmp_path, ray=cluster.address)
