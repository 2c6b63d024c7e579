"""A sweep on a real Ray cluster, of two nodes on this machine: what a node takes with it is trained again, and nothing else."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed", exc_type=ImportError)

from anymask.errors import DataError, SettingError
from anymask.sweep import on_ray, read_plan, sweep, tasks
from tests.sweep.plans import CELLS, FAILING, PLAN, write_images, write_plan
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
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plan(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plan(tmp_path_factory.mktemp("plan") / "plan.toml", images)


@pytest.fixture(scope="module")
def whole(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep in this process."""
    folder = tmp_path_factory.mktemp("whole")
    sweep(read_plan(plan).on("cpu"), folder, sparse="off")
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
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.005)
    raise AssertionError("in 20 seconds it did not come to that")


class Remover(Log):
    """Takes a node away, while it trains, as soon as the first training is finished."""

    def __init__(self, cluster: Any, node: Any) -> None:
        super().__init__()
        self.cluster, self.node, self.cut = cluster, node, 0

    def finished(self, row: dict[str, Any]) -> None:
        super().finished(row)
        if len(self.names) == 1:
            self.cut = len(until(lambda: at_work(raylet(self.node))))
            self.cluster.remove_node(self.node, allow_graceful=False)


def by_id(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(settled(found), key=lambda row: row["id"])


def masks(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "masks").iterdir()}


def test_of_two_nodes_one_is_lost_and_every_training_is_in_the_ledger_once_as_if_nothing_had_been(
    cluster: Any, plan: Path, whole: Path, tmp_path: Path
) -> None:
    log = Remover(cluster, cluster.add_node(**NODE))
    outcome = sweep(read_plan(plan).on("cpu"), tmp_path, sparse="off", ray=cluster.address, watcher=log)
    assert log.cut == 1
    assert (len(outcome.finished), outcome.failed, outcome.left) == (CELLS, (), ())
    assert by_id(rows(tmp_path)) == by_id(rows(whole))
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
    block = PLAN.split("[[block]]")[1].replace("seeds = 2", "seeds = 1")
    text = f"retries = 2\n[protocol]\nepochs = 1\nbatch_size = 16\n{FAILING}\n[[block]]\n{block}"
    wanted = read_plan(write_plan(tmp_path / "plan.toml", images, text))
    log, folder = Log(), tmp_path / "run"
    outcome = sweep(wanted, folder, sparse="off", ray=cluster.address, watcher=log)
    good = [task.name for task in tasks(wanted, folder)[1:]]
    assert sorted(log.names) == sorted(good)
    assert log.names[0] == good[0]
    (failed,) = outcome.failed
    assert failed.tries == 3
    assert failed.reason.startswith("TechniqueError: the training loss became")
    assert not outcome.left


def test_a_budget_stops_and_the_next_call_does_what_is_left(cluster: Any, plan: Path, whole: Path, tmp_path: Path) -> None:
    wanted = read_plan(plan).on("cpu")
    begun = time.monotonic()
    outcome = sweep(wanted, tmp_path, sparse="off", ray=cluster.address, budget=0.1)
    assert time.monotonic() - begun < 10
    assert len(outcome.left) >= CELLS - 2
    assert not outcome.failed
    assert not sweep(wanted, tmp_path, sparse="off", ray=cluster.address).left
    assert by_id(rows(tmp_path)) == by_id(rows(whole))


def test_a_process_that_dies_more_often_than_it_may_is_a_try_that_failed(
    cluster: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "LOST", 0)
    text = PLAN.replace("seeds = 2", "seeds = 1").replace("epochs = 2", "epochs = 20").replace('["random-erk", "snip"]', "[]")
    wanted = read_plan(write_plan(tmp_path / "plan.toml", images, text)).on("cpu")
    head = raylet(cluster.head_node)
    killer = threading.Thread(target=lambda: os.kill(until(lambda: at_work(head))[0], signal.SIGKILL))
    killer.start()
    outcome = sweep(wanted, tmp_path / "run", sparse="off", ray=cluster.address)
    killer.join()
    assert (len(outcome.finished), outcome.failed) == (1, ())
    (line,) = rows(tmp_path / "run").__class__(on_ray_failures(tmp_path / "run"))
    assert line["type"] == "WorkerCrashedError"


# -- what a node does ---------------------------------------------------------------------------------------------------


def order(plan: Path, folder: Path, whole: Path) -> on_ray.Order:
    """To train with SNIP's mask, away from the run folder."""
    task = next(task for task in tasks(read_plan(plan), whole) if task.cell.mask == "snip")
    assert task.mask is not None
    return on_ray.Order(task, "off", Path.cwd(), folder, folder / "claims" / "gone.lock", {task.mask.name: task.mask.read_bytes()})


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
    with pytest.raises(DataError, match=r"the data on .* are others"):
        on_ray.train(replace(away, task=replace(away.task, part=part)))


def test_cuda_asks_for_a_gpu_and_auto_does_where_there_is_one(plan: Path, whole: Path) -> None:
    def needs(device: str, **there: float) -> dict[str, int]:
        return on_ray._needs(tasks(read_plan(plan).on(device), whole, device="cpu"), there=there)

    assert needs("cuda") == needs("auto", CPU=1.0, GPU=2.0) == {"CPU": 1, "GPU": 1}
    assert needs("cpu", GPU=2.0) == needs("auto", CPU=1.0) == {"CPU": 1}


def test_a_cluster_that_can_train_nothing_is_refused(cluster: Any, plan: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="a cluster without a CPU and a GPU"):
        sweep(read_plan(plan).on("cuda"), tmp_path, ray=cluster.address)
