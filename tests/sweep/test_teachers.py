"""The dense network that recipes with distillation learn from: trained once for each seed, kept, gone on with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from anymask.config import Bench, Experiment
from anymask.runlog import Ledger
from anymask.sweep import Cell, Grid, compare, train_one
from anymask.sweep.claims import Busy, claimed
from anymask.sweep.compare import Runner, Watcher
from anymask.sweep.teachers import Teachers
from anymask.train import Protocol
from tests.sweep.plans import DENSELY, write_images

TAUGHT = "default@distillation=true"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    images = write_images(tmp_path_factory.mktemp("images"))
    experiment = Experiment(data="folder", data_dir=images, model="resnet8-0.25x", validation=0.2, device="cpu")
    return Bench(experiment, Protocol(epochs=2, batch_size=16, lr=0.05))


def test_one_teacher_a_seed_serves_all_and_is_the_dense_network_of_that_seed(bench: Bench, tmp_path: Path) -> None:
    grid = Grid(masks=("random-erk",), sparsity=(0.5, 0.9), recipes=("default", TAUGHT), seeds=1, dense=True)
    rows = compare(grid, tmp_path, experiment=bench.experiment, protocol=bench.protocol, computing=DENSELY).rows()
    taught = [row for row in rows if row["settings"]["recipe"] == TAUGHT]
    assert [set(row["found"]) for row in taught] == [{"distillation"}] * 2
    assert len({row["teacher"] for row in taught}) == 1
    assert taught[0]["time"]["teacher_seconds"] > 5 * taught[1]["time"]["teacher_seconds"]
    assert all("teacher_seconds" not in row["time"] for row in rows if row not in taught)
    (file,) = (tmp_path / "teachers").iterdir()
    runner = Runner(bench, tmp_path, DENSELY)
    assert runner.teachers.file(0) == file
    dense = runner.train(Cell("dense", 0.0, "default", 0), "again", Watcher()).model
    for name, value in runner.teachers.of(0).state_dict().items():
        assert torch.equal(value, dense.state_dict()[name]), name


def test_a_teacher_that_was_stopped_goes_on_and_of_another_process_is_waited_for(bench: Bench, tmp_path: Path) -> None:
    runner, calls = Runner(bench, tmp_path, DENSELY), []

    def stop(**_: float) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    runner.pace.wait, runner.pace.between = False, stop
    with pytest.raises(KeyboardInterrupt):
        runner.teachers.of(0)
    assert [file.suffix for file in (tmp_path / "teachers").iterdir()] == [".pt"]
    with claimed(runner.teachers.file(0).with_suffix(".lock")), pytest.raises(Busy):
        runner.teachers.of(0)
    runner.pace.between = lambda **_: calls.append(1)
    model = runner.teachers.of(0)
    assert len(calls) == 1  # after the first epoch, which was before; after the last one there is nothing to stop
    whole = Runner(bench, tmp_path / "whole", DENSELY).teachers.of(0)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), whole.parameters(), strict=True))


def test_a_single_training_that_is_stopped_in_its_teacher_goes_on(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"experiment": bench.experiment, "protocol": bench.protocol, "computing": DENSELY}
    whole = train_one(Cell("random-erk", 0.9, TAUGHT, 0), tmp_path / "whole", **how)
    begin = Teachers.__init__

    def stopping(self: Teachers, *args: Any) -> None:
        begin(self, *args)

        def between(**_: float) -> None:
            raise KeyboardInterrupt

        self.pace.between = between

    with monkeypatch.context() as patch:
        patch.setattr(Teachers, "__init__", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_one(Cell("random-erk", 0.9, TAUGHT, 0), tmp_path / "parts", **how)
    row = train_one(Cell("random-erk", 0.9, TAUGHT, 0), tmp_path / "parts", **how, resume=True)
    assert row["accuracy"] == whole["accuracy"]
    assert not (tmp_path / "parts" / "unfinished").exists()


def test_a_single_training_leaves_no_teacher(bench: Bench, tmp_path: Path) -> None:
    how: dict[str, Any] = {"experiment": bench.experiment, "protocol": bench.protocol, "computing": DENSELY}
    row = train_one(Cell("random-erk", 0.9, TAUGHT, 0), tmp_path, **how)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ledger.jsonl", "mask.mask", "model.safetensors"]
    assert Ledger(tmp_path / "ledger.jsonl").rows() == [row]
