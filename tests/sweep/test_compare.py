"""The paired comparison."""

import copy
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import anymask
from anymask import load_mask, prune
from anymask.config import Bench, Experiment
from anymask.errors import FileFormatError, MaskError, SettingError, UnknownName
from anymask.recipe import Recipe
from anymask.runlog import Ledger, processor
from anymask.sweep import Cell, Grid, Runner, Watcher, cells, compare, train_one
from anymask.sweep.claims import claimed
from anymask.sweep.compare import command
from anymask.sweep.masks import Masks, digests, dynamic_named
from anymask.train import Protocol

PROTOCOL = Protocol(epochs=2, batch_size=16, lr=0.05)
GRID = Grid(masks=("random-erk", "snip"), sparsity=(0.9,), recipes=("default", "tost:ghost_activation,label_smoothing"), seeds=2)


@pytest.fixture(scope="module")
def experiment(images: Path) -> Experiment:
    return Experiment(data="folder", data_dir=images, validation=0.2, device="cpu")


@pytest.fixture(scope="module")
def whole(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The rows of an undisturbed run."""
    return compare(GRID, tmp_path_factory.mktemp("whole"), experiment=experiment, protocol=PROTOCOL).rows()


def test_a_validation_folder_is_what_the_checkpoint_is_chosen_on(experiment: Experiment, tmp_path: Path) -> None:
    shutil.copytree(str(experiment.data_dir), tmp_path / "images")
    shutil.copytree(tmp_path / "images" / "test", tmp_path / "images" / "val")
    with pytest.warns(UserWarning, match="are validation images, too"):
        bench = Bench(replace(experiment, data_dir=tmp_path / "images"), PROTOCOL)
    train, validation, _ = bench.batches(0)
    assert (sum(len(y) for _, y in train), sum(len(y) for _, y in validation)) == (40, 12)
    assert bench.data_hash != Bench(experiment, PROTOCOL).data_hash


def test_what_a_grid_names_twice_is_one_training() -> None:
    once = list(cells(Grid(masks=("snip",), sparsity=(0.9,), recipes=("default", "tost"), seeds=2)))
    twice = Grid(masks=("snip", "snip"), sparsity=(0.9, 0.90), recipes=("default", "tost", "default"), seeds=2)
    assert list(cells(twice)) == once


class Log(Watcher):
    def __init__(self, *, stop_at: int | None = None) -> None:
        self.epochs, self.rows, self.stop_at = 0, 0, stop_at

    def epoch(self, cell: Cell, epoch: int, figures: dict[str, Any]) -> None:
        self.epochs += 1
        if self.epochs == self.stop_at:
            raise KeyboardInterrupt

    def finished(self, cell: Cell, row: dict[str, Any]) -> None:
        self.rows += 1


def without_times(rows: list[dict]) -> list[dict]:
    rows = copy.deepcopy(rows)
    for row in rows:
        del row["time"]
    return rows


def test_every_cell_is_trained_once_and_a_second_call_trains_nothing(experiment: Experiment, tmp_path: Path) -> None:
    ledger, first = compare(GRID, tmp_path, experiment=experiment, protocol=PROTOCOL), (tmp_path / "ledger.jsonl").read_bytes()
    assert len(ledger.ids()) == len(ledger.rows()) == len(list(cells(GRID))) == 2 * (1 + 2 * 2)
    watcher = Log()
    compare(GRID, tmp_path, experiment=experiment, protocol=PROTOCOL, watcher=watcher)
    assert watcher.epochs == watcher.rows == 0
    assert (tmp_path / "ledger.jsonl").read_bytes() == first
    assert not list((tmp_path / "unfinished").iterdir())


@pytest.mark.parametrize("stop_at", [1, 2, 5, 12])
def test_stopped_and_called_again_ends_with_the_ledger_of_an_undisturbed_run(
    stop_at: int, whole: list[dict], experiment: Experiment, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(GRID, tmp_path / "cut", experiment=experiment, protocol=PROTOCOL, watcher=Log(stop_at=stop_at))
    again = Log()
    cut = compare(GRID, tmp_path / "cut", experiment=experiment, protocol=PROTOCOL, watcher=again).rows()
    assert again.epochs == 2 * len(whole) - stop_at  # what was trained was not trained again
    assert without_times(cut) == without_times(whole)


def test_recipes_of_one_seed_share_initialisation_mask_split_and_order(experiment: Experiment, tmp_path: Path) -> None:
    bench = Bench(experiment, PROTOCOL)
    runner = Runner(bench, tmp_path)
    ours, theirs = (Cell("snip", 0.9, recipe, 3) for recipe in GRID.recipes)
    masks = [runner.start(cell, bench.model(3)).mask for cell in (ours, theirs)]
    assert masks[0] == masks[1] == load_mask(runner.mask_file("snip", 0.9, 3))
    for a, b in zip(bench.model(3).state_dict().values(), bench.model(3).state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(bench.batches(3), bench.batches(3), strict=True):
        for (x, y), (u, v) in zip(a.epoch(1), b.epoch(1), strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_seeds_differ_in_all_of_them(experiment: Experiment, tmp_path: Path) -> None:
    bench = Bench(experiment, PROTOCOL)
    runner = Runner(bench, tmp_path)
    first, second = (next(iter(bench.batches(seed)[0])) for seed in (0, 1))
    assert not torch.equal(first[0], second[0])
    models = [bench.model(seed) for seed in (0, 1)]
    assert not torch.equal(models[0].state_dict()["stem.conv1.weight"], models[1].state_dict()["stem.conv1.weight"])
    masks = [runner.start(Cell("snip", 0.9, "default", seed), models[seed]).mask for seed in (0, 1)]
    assert masks[0] != masks[1]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["/home/me/.venv/bin/anymask", "train", "--out", "a b"], "anymask train --out 'a b'"),
        ([f"{Path(anymask.__file__).parent}/__main__.py", "list"], "anymask list"),
        (["runs/mine.py", "--seed", "3"], "python runs/mine.py --seed 3"),
        (["-c"], None),
    ],
)
def test_the_command_is_as_it_can_be_typed_again(typed: list[str], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", typed)
    assert command() == said


def test_a_row_says_what_was_done(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mine.py", "1"])
    grid = Grid(masks=("random-erk",), sparsity=(0.9,), recipes=("tost:ghost_activation",), seeds=1, dense=False)
    (row,) = compare(grid, tmp_path, experiment=experiment, protocol=PROTOCOL).rows()
    assert row["settings"]["mask"] == "random-erk"
    assert row["techniques"] == Recipe.preset("tost:ghost_activation").settings()
    assert row["density"]["overall"] == pytest.approx(0.1, abs=1e-4)
    assert row["curves"]["epoch"] == [1, 2]
    assert len(row["curves"]["strength"]["ghost_activation"]) == 2
    assert set(row["accuracy"]) == {"validation", "test", "best_epoch", "last_validation", "last_test"}
    assert row["time"]["seconds"] > 0
    assert row["command"] == "python mine.py 1"
    assert row["machine"]["processor"] == processor()
    assert set(row["versions"]) == {"anymask", "torch", "python", "commit"}


def test_a_row_says_which_mask_it_began_with_and_the_same_to_recipes_of_one_seed(whole: list[dict]) -> None:
    said = {(row["settings"]["mask"], row["settings"]["seed"], row["settings"]["recipe"]): row["mask"] for row in whole}
    assert said["dense", 0, "default"] == {}
    for mask in GRID.masks:
        first, second = ({str(said[mask, seed, recipe]) for recipe in GRID.recipes} for seed in (0, 1))
        assert len(first) == len(second) == 1
        assert first != second


@pytest.mark.parametrize("there", [("snip", 0.9, 1), ("snip", 0.8, 0), ("random-erk", 0.9, 0), ("snip+erk", 0.9, 0)])
def test_a_mask_file_in_place_of_another_is_not_trained_with(there: tuple[str, float, int], experiment: Experiment, tmp_path: Path) -> None:
    bench = Bench(experiment, PROTOCOL)
    runner, (mask, sparsity, seed) = Runner(bench, tmp_path), there
    runner.start(Cell(mask, sparsity, "default", seed), bench.model(seed))
    file = runner.mask_file("snip", 0.9, 0)
    runner.mask_file(mask, sparsity, seed).rename(file)
    with pytest.raises(FileFormatError, match=r"snip-0\.9-seed0-.*\.mask holds another mask than its name says: "):
        runner.start(Cell("snip", 0.9, "default", 0), bench.model(0))
    file.unlink()
    assert runner.start(Cell("snip", 0.9, "default", 0), bench.model(0)).mask


def test_the_id_changes_with_every_setting_and_with_what_a_recipes_name_stands_for(experiment: Experiment, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[technique]]\nname = "label_smoothing"\neps = 0.1')
    cell = Cell("snip", 0.9, str(recipe), 0)
    first = Runner(Bench(experiment, PROTOCOL), tmp_path).name(cell)
    assert Runner(Bench(experiment, PROTOCOL), tmp_path / "elsewhere").name(cell) == first
    assert Runner(Bench(experiment, Protocol(epochs=3, batch_size=16, lr=0.05)), tmp_path).name(cell) != first
    recipe.write_text('[[technique]]\nname = "label_smoothing"\neps = 0.2')
    assert Runner(Bench(experiment, PROTOCOL), tmp_path).name(cell) != first


def test_a_mask_file_of_the_users_is_compared_like_a_method(experiment: Experiment, tmp_path: Path) -> None:
    mask = prune(Bench(experiment, PROTOCOL).model(0), "magnitude", sparsity=0.7, seed=0)
    mask.save(tmp_path / "mine.mask")
    grid = Grid(masks=(str(tmp_path / "mine.mask"),), recipes=("default",), seeds=1, dense=False)
    (row,) = compare(grid, tmp_path / "run", experiment=experiment, protocol=PROTOCOL).rows()
    assert row["density"]["overall"] == mask.density


def test_the_lottery_goes_on_between_rounds(experiment: Experiment, tmp_path: Path) -> None:
    bench = Bench(experiment, Protocol(epochs=1, batch_size=16, lr=0.05))
    cell = Cell("lottery", 0.5, "default", 0)
    whole = Runner(bench, tmp_path / "whole").start(cell, bench.model(0)).mask
    runner = Runner(bench, tmp_path / "cut")
    fits = 0

    def stop_in_third(*arguments: Any, folder: Path) -> None:
        nonlocal fits
        fits += 1
        if fits == 3:
            raise KeyboardInterrupt
        Masks.trainer(runner.masks, 0, folder=folder)(*arguments)

    runner.masks.trainer = lambda seed, folder: partial(stop_in_third, folder=folder)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        runner.start(cell, bench.model(0))
    assert Runner(bench, tmp_path / "cut").start(cell, bench.model(0)).mask == whole


def test_a_ticket_without_the_weights_that_it_begins_with_is_refused(experiment: Experiment, tmp_path: Path) -> None:
    bench = Bench(experiment, Protocol(epochs=12, batch_size=16, lr=0.05))
    cell, runner = Cell("lottery-rewind", 0.3, "default", 0), Runner(bench, tmp_path)
    assert runner.start(cell, bench.model(0)).step > 0
    (weights,) = (tmp_path / "masks").glob("*.safetensors")
    weights.unlink()
    with pytest.raises(FileFormatError, match=f"{weights.name}.*is not there"):
        runner.start(cell, bench.model(0))


@pytest.mark.parametrize("wrong", [{"masks": ("snpi",)}, {"recipes": ("tots",)}])
def test_unknown_names_are_refused_before_anything_is_read(wrong: dict) -> None:
    with pytest.raises(UnknownName, match=r"snip|tost"):
        Grid(**wrong)


def test_a_mask_file_that_is_not_there_is_not_taken_for_a_method() -> None:
    with pytest.raises(SettingError, match=r"no mask file at gone/mine.mask"):
        Grid(masks=("gone/mine.mask",))


@pytest.mark.parametrize("wrong", [{"sparsity": (1.0,)}, {"sparsity": (-0.1,)}, {"seeds": 0}, {"first_seed": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(SettingError):
        Grid(**wrong)


def test_a_device_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(SettingError, match="device 'cuba'"):
        Bench(Experiment(device="cuba"), PROTOCOL)


def test_a_mask_file_is_trained_once_at_its_own_sparsity_and_again_when_it_changes(experiment: Experiment, tmp_path: Path) -> None:
    model, file = Bench(experiment, PROTOCOL).model(0), tmp_path / "mine.mask"
    names = []
    for sparsity in (0.7, 0.6):
        prune(model, "magnitude", sparsity=sparsity, seed=0).save(file)
        (cell,) = cells(Grid(masks=(str(file),), sparsity=(0.9, 0.98), recipes=("default",), seeds=1, dense=False))
        assert cell.sparsity == pytest.approx(sparsity, abs=1e-4)
        names.append(Runner(Bench(experiment, PROTOCOL), tmp_path).name(cell))
    assert names[0] != names[1]


def test_a_recipe_file_that_is_changed_meanwhile_gives_no_row_under_the_id_of_what_it_was(experiment: Experiment, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[technique]]\nname = "label_smoothing"\neps = 0.1\n')
    grid = Grid(masks=("random-erk",), sparsity=(0.9,), recipes=("default", str(recipe)), seeds=1, dense=False)

    begun = set()

    class Editor(Watcher):
        def epoch(self, cell: Cell, epoch: int, figures: dict) -> None:
            begun.add(cell.recipe)

        def finished(self, cell: Cell, row: dict) -> None:
            recipe.write_text(recipe.read_text().replace("0.1", "0.9"))

    with pytest.raises(SettingError, match="was changed after this began"):
        compare(grid, tmp_path / "out", experiment=experiment, protocol=PROTOCOL, watcher=Editor())
    assert [row["settings"]["recipe"] for row in Ledger(tmp_path / "out" / "ledger.jsonl").rows()] == ["default"]
    assert begun == {"default"}  # nor was it trained in vain


def test_what_another_process_is_at_comes_last_and_is_not_trained_again(experiment: Experiment, tmp_path: Path) -> None:
    grid = Grid(masks=("random-erk",), sparsity=(0.9,), recipes=("default", "tost:label_smoothing"), seeds=1, dense=False)
    runner = Runner(Bench(experiment, PROTOCOL), tmp_path)
    first, second = cells(grid)
    other, order = ExitStack(), []
    assert other.enter_context(claimed(tmp_path / "claims" / f"{runner.name(first)}.lock"))

    class Other(Watcher):
        def finished(self, cell: Cell, row: dict) -> None:
            order.append(cell)
            if cell == second:
                runner.ledger.append({**row, "id": runner.name(first)})
                other.close()

    ledger = compare(grid, tmp_path, experiment=experiment, protocol=PROTOCOL, watcher=Other())
    assert (order, len(ledger.rows())) == ([second, first], 2)


@pytest.mark.parametrize(
    ("first", "reference"),
    [("best", "default"), ("tost", "default"), ("default@density_lr=true", "default"), ("default@lr=0.2", "default@lr=0.2")],
)
def test_the_dense_network_is_trained_without_techniques(first: str, reference: str) -> None:
    found = [(cell.mask, cell.recipe) for cell in cells(Grid(masks=("snip",), recipes=(first, "tost"), seeds=1))]
    assert found[:2] == [("dense", reference), ("snip", first)]


def test_a_file_called_like_a_method_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snip").write_text("not a mask")
    assert next(cells(Grid(masks=("snip",), dense=False))).sparsity == 0.98


def test_a_file_called_dense_does_not_hide_the_dense_network(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cell, bench = Cell("dense", 0.0, "default", 0), Bench(experiment, PROTOCOL)
    name = Runner(bench, tmp_path).name(cell)
    (tmp_path / "dense").write_text("not a mask")
    assert Runner(bench, tmp_path).name(cell) == name
    assert Runner(bench, tmp_path).start(cell, bench.model(0)).mask is None
    assert train_one(cell, tmp_path / "run", experiment=experiment, protocol=PROTOCOL)["id"] == name


def test_a_rewound_ticket_is_trained_from_its_weights_and_step_with_every_recipe(experiment: Experiment, tmp_path: Path) -> None:
    bench = Bench(experiment, Protocol(epochs=10, batch_size=16, lr=0.05))  # 20 steps, of which 5% are 1
    runner, model = Runner(bench, tmp_path), bench.model(0)
    initial = copy.deepcopy(model.state_dict())
    first = runner.start(Cell("lottery-rewind", 0.3, "default", 0), model)
    assert (first.step, first.mask.info["rewind_step"], first.mask.info["method"]) == (1, 1, "lottery-rewind")
    weights = model.state_dict()
    assert any(not torch.equal(weights[name], initial[name]) for name in first.mask)
    again = bench.model(0)
    second = runner.start(Cell("lottery-rewind", 0.3, "tost", 0), again)
    assert (second.mask, second.step) == (first.mask, 1)
    assert digests(first) == digests(second) != digests(replace(first, weights=initial))
    assert set(digests(first)) == {"digest", "weights"}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("mask", ["set+1it", "rigl+1it", "gmp+1it+global"])
def test_a_mask_that_moves_is_compared_like_one_that_stays(mask: str, experiment: Experiment, tmp_path: Path) -> None:
    recipes = ("default", "tost:ghost_activation,ghost_skip")
    grid = Grid(masks=(mask, "random-erk"), sparsity=(0.8,), recipes=recipes, seeds=1, dense=False)
    rows = compare(grid, tmp_path, experiment=experiment, protocol=Protocol(epochs=3, batch_size=16, lr=0.05)).rows()
    assert [row["settings"]["mask"] for row in rows] == [mask, mask, "random-erk", "random-erk"]
    for row in rows:
        assert row["density"]["overall"] == pytest.approx(0.2, abs=1e-4)
    assert rows[0]["density"]["layers"].keys() == rows[2]["density"]["layers"].keys()


def test_what_comes_after_the_plus_of_a_moving_mask_is_its_time_or_scope() -> None:
    assert (dynamic_named("set+2%+balanced").every, dynamic_named("set+2%+balanced").start) == ("2%", "random-balanced")
    assert (dynamic_named("gmp+1ep+erk").every, dynamic_named("gmp+1ep+erk").scope) == ("1ep", "erk")
    for wrong in ("rigl+25", "gmp+erkk", "set+global", "rigl+2:4"):
        with pytest.raises(SettingError):
            Grid(masks=(wrong,))


def test_a_sparsity_that_a_pattern_cannot_have_is_refused_before_anything_is_read() -> None:
    with pytest.raises(SettingError, match=r"sparsity came as 0\.98 with pattern 2:4.*Allowed: 0\.5"):
        Grid(masks=("magnitude+2:4",), sparsity=(0.5, 0.98))


def test_a_method_with_another_scope_and_pattern_is_compared_under_that_name(experiment: Experiment, tmp_path: Path) -> None:
    grid = Grid(masks=("magnitude+1:2", "snip+balanced+fan-in"), sparsity=(0.5,), recipes=("default",), seeds=1, dense=False)
    with pytest.raises(MaskError, match=r"does not fit stem\.conv1\.weight \(3 inputs\)"):
        compare(grid, tmp_path, experiment=experiment, protocol=PROTOCOL)
    grid = Grid(masks=("snip+balanced+fan-in",), sparsity=(0.5,), recipes=("default",), seeds=1, dense=False)
    (row,) = compare(grid, tmp_path, experiment=experiment, protocol=PROTOCOL).rows()
    assert row["settings"]["mask"] == "snip+balanced+fan-in"
    assert load_mask(next((tmp_path / "masks").glob("snip*"))).info["network"] == {"model": "demonet", "classes": 2, "input": [3, 16, 16]}


def test_a_checkpoint_of_others_whose_mask_is_its_zeros_is_compared_at_its_sparsity_of_the_whole_network(
    experiment: Experiment, tmp_path: Path
) -> None:
    model = Bench(experiment, PROTOCOL).model(0)
    mask = prune(model, "magnitude", sparsity=0.9, exclude=["fc"])  # fc has no zero, and counts all the same
    mask.apply(model)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "theirs.pth")
    grid = Grid(masks=(str(tmp_path / "theirs.pth"),), recipes=("default",), seeds=1, dense=False)
    (row,) = compare(grid, tmp_path / "run", experiment=experiment, protocol=PROTOCOL).rows()
    total = mask.total + model.fc.weight.numel()
    assert row["density"]["overall"] == pytest.approx((mask.kept + model.fc.weight.numel()) / total)
    assert row["settings"]["sparsity"] == round(1 - row["density"]["overall"], 6)
