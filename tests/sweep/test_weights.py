"""Trainings that begin with a trained network: which it is, what is made of it, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anymask import models
from anymask.config import Bench, Experiment
from anymask.errors import MissingFile, SettingError
from anymask.report import paired
from anymask.report.cells import cells, groups
from anymask.sweep import Cell, Grid, compare, train_one
from anymask.sweep.compare import Runner
from anymask.sweep.plan import read_plan
from anymask.sweep.run import sweep
from anymask.train import Protocol
from tests.sweep.plans import DENSELY, write_images

TAUGHT = "default@distillation=true"
STILL = Protocol(epochs=1, batch_size=16, lr=1e-9, augment=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and of a checkpoint for each of two seeds."""
    here = write_images(tmp_path_factory.mktemp("images"))
    for seed in (0, 1):
        model = models.build("resnet8-0.25x", classes=2, channels=3, seed=10 + seed)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, here / f"net{seed}.safetensors")
    return here


def experiment(place: Path, weights: str) -> Experiment:
    return Experiment(data="folder", data_dir=place, model="resnet8-0.25x", validation=0.2, device="cpu", weights=place / weights)


def test_masks_and_trainings_begin_with_the_checkpoint_of_their_seed(place: Path, tmp_path: Path) -> None:
    bench = Bench(experiment(place, "net{seed}.safetensors"), STILL)
    for seed in (0, 1):
        theirs = load_file(place / f"net{seed}.safetensors")
        assert all(torch.equal(t, theirs[n]) for n, t in bench.model(seed).state_dict().items())
    cell = Cell("magnitude", 0.5, "default", 1)
    train_one(cell, tmp_path, experiment=bench.experiment, protocol=STILL, computing=DENSELY)
    trained = load_file(tmp_path / "model.safetensors")
    weight = theirs["layer1.0.body.conv1.weight"]
    kept = trained["layer1.0.body.conv1.weight"] != 0
    torch.testing.assert_close(trained["layer1.0.body.conv1.weight"][kept], weight[kept], atol=1e-5, rtol=0)
    assert weight[kept].abs().min() > weight[~kept].abs().max() > 0


def test_the_checkpoint_is_the_teacher_and_seeds_of_one_cell_are_paired(place: Path, tmp_path: Path) -> None:
    grid = Grid(masks=("magnitude",), sparsity=(0.5,), recipes=("default", TAUGHT), seeds=2, dense=False)
    rows = compare(grid, tmp_path, experiment=experiment(place, "net{seed}.safetensors"), protocol=STILL, computing=DENSELY).rows()
    assert not (tmp_path / "teachers").exists()
    assert {row["settings"]["weights"] for row in rows} == {str(place / "net{seed}.safetensors")}
    hashes = {(row["settings"]["seed"], row["settings"]["weights_hash"]) for row in rows}
    assert len(hashes) == len({digest for _, digest in hashes}) == 2
    (group,) = groups(rows)
    assert group.title.endswith("1 epoch from given weights, 2 seeds")
    (cell,) = group.cells
    assert sorted(cell.runs) == [("default", 0), ("default", 1), (TAUGHT, 0), (TAUGHT, 1)]
    one = compare(grid, tmp_path, experiment=experiment(place, "net0.safetensors"), protocol=STILL, computing=DENSELY).rows()
    assert len(one) == 8  # another way to say which, for all seeds
    assert len(cells(one)) == 2


def test_runs_of_different_files_under_one_name_are_no_pair(place: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"protocol": STILL, "computing": DENSELY}
    begins = replace(experiment(place, ""), weights=tmp_path / "at{seed}.safetensors")
    for recipe, source in (("default", "net0"), ("tost:label_smoothing", "net1")):
        (tmp_path / "at0.safetensors").write_bytes((place / f"{source}.safetensors").read_bytes())
        grid = Grid(masks=("random",), sparsity=(0.5,), recipes=(recipe,), seeds=1, dense=False)
        rows = compare(grid, tmp_path / "run", experiment=begins, **how).rows()
    (comparison,) = paired(rows)
    assert (comparison.pairs, comparison.unlike) == ({}, (0,))


def test_a_recipe_that_initialises_the_trained_network_is_told(place: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"experiment": experiment(place, "net0.safetensors"), "protocol": STILL, "computing": DENSELY}
    with pytest.warns(UserWarning, match="tost:lrsi initialises a trained network anew"):
        train_one(Cell("magnitude", 0.5, "tost:lrsi", 0), tmp_path, **how)


def test_another_file_at_the_same_path_is_another_training(place: Path, tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes((place / "net0.safetensors").read_bytes())
    names = []
    for source in ("net0", "net1"):
        (tmp_path / "net.safetensors").write_bytes((place / f"{source}.safetensors").read_bytes())
        bench = Bench(replace(experiment(place, ""), weights=tmp_path / "net.safetensors"), STILL)
        names.append(Runner(bench, tmp_path).name(Cell("magnitude", 0.5, "default", 0)))
    assert len(set(names)) == 2


def test_other_shards_of_the_same_index_are_other_weights_and_another_mask(place: Path, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(place / "net0.safetensors"), "shard.safetensors")}))
    bench, plain = Bench(replace(experiment(place, ""), weights=index), STILL), Bench(replace(experiment(place, ""), weights=None), STILL)
    hashes = []
    for source in ("net0", "net1"):
        (tmp_path / "shard.safetensors").write_bytes((place / f"{source}.safetensors").read_bytes())
        begun, masked = bench.settings(0), Runner(plain, tmp_path).settings(Cell(str(index), 0.5, "default", 0))
        hashes += [begun["weights_hash"], masked["mask_hash"]]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def test_a_plan_has_it_in_a_block(place: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    text = f"""
    [[block]]
    data = "folder"
    data_dir = "{place}"
    weights = "{place}/net{{seed}}.safetensors"
    model = "resnet8-0.25x"
    masks = "magnitude"
    sparsity = 0.5
    recipes = "{TAUGHT}"
    seeds = 2
    dense = false
    [block.protocol]
    epochs = 1
    batch_size = 16
    lr = 0.01
    """
    plan.write_text(text)
    outcome = sweep(read_plan(plan), tmp_path / "run", computing=DENSELY)
    assert (len(outcome.finished), outcome.failed, outcome.left) == (2, (), ())
    plan.write_text(text.replace("net{seed}", "net_{seed}"))
    with pytest.raises(MissingFile, match=r"block 1 .*no checkpoint at .*net_0.safetensors"):
        sweep(read_plan(plan), tmp_path / "other", computing=DENSELY)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("weights", "error", "said"),
    [
        ("gone.safetensors", MissingFile, "no checkpoint at .*gone.safetensors"),
        ("train", MissingFile, "no checkpoint at .*train"),  # a folder
        ("net{sede}.safetensors", MissingFile, r"no checkpoint at .*net\{sede\}"),
        ("wider.safetensors", SettingError, "not those of resnet8-0.25x .*size mismatch"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_before_the_work(
    place: Path, tmp_path: Path, weights: str, error: type[Exception], said: str
) -> None:
    save_file(models.build("resnet8-0.5x", classes=2, channels=3, seed=0).state_dict(), place / "wider.safetensors")
    how: dict[str, Any] = {"experiment": experiment(place, weights), "protocol": STILL, "computing": DENSELY}
    with pytest.raises(error, match=said):
        compare(Grid(masks=("magnitude",), sparsity=(0.5,), seeds=1), tmp_path / "compare", **how)
    with pytest.raises(error, match=said):
        train_one(Cell("magnitude", 0.5, "default", 0), tmp_path / "train", **how)
    assert not list((tmp_path).rglob("*.jsonl"))
