"""Where settings come from: the command line before the file, the file before the defaults."""

import json

import pytest

from anymask.kernels import available

needs_kernels = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")

GRID = "masks = ['snip']\nsparsity = [0.9]\nseeds = 1\nepochs = 5\n"


@pytest.fixture
def plan(anymask, tmp_path, small):
    """The trainings of `compare` with a file of settings and more options, and the last line about them."""

    def show(name, text, *more):
        (tmp_path / name).write_text(text)
        said = anymask("compare", "--config", tmp_path / name, *more, *small, "--dry-run", "--out", tmp_path / "run")
        assert said.code == 0, said.err
        return said.out.splitlines(), said.err.splitlines()[-1]

    return show


def test_a_toml_and_a_yaml_file_of_the_same_settings_are_equal(plan):
    yaml = "# a comment\nmasks: [snip]\nsparsity: [0.9]\nseeds: 1\nepochs: 5\n"
    assert plan("a.toml", GRID) == plan("a.yaml", yaml) == plan("a.yml", yaml)
    assert plan("a.toml", GRID) == (
        ["dense, default, seed 0", *(f"snip 0.9, {recipe}, seed 0" for recipe in ("default", "tost", "best"))],
        "4 of 4 trainings would run, 5 epochs each.",
    )
    marked = "\ufeff"  # as some editors begin a file
    assert plan("a.toml", GRID) == plan("a.toml", marked + GRID) == plan("a.yaml", marked + yaml)


def test_the_home_folder_is_meant_where_no_shell_says_so(anymask, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert anymask("prune", "random", "--sparsity", "0.9", "--out=~/here.mask").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here.mask"]


def test_options_override_the_file_and_leave_the_rest_of_it(plan):
    lines, last = plan("a.toml", GRID, "--masks", "synflow", "magnitude", "--no-dense", "--epochs", "2")
    assert [line.split(",")[0] for line in lines] == ["synflow 0.9"] * 3 + ["magnitude 0.9"] * 3
    assert last == "6 of 6 trainings would run, 2 epochs each."


def test_a_file_may_hold_any_option_with_underscores_or_hyphens(plan, tmp_path):
    for key in ("first_seed", "first-seed"):
        lines, _ = plan("a.toml", GRID + f"{key} = 7\ndense = false\nrecipes = 'default'\nvalidation = 0.2\n")
        assert lines == ["snip 0.9, default, seed 7"]


def test_an_empty_file_leaves_the_defaults(plan):
    assert plan("a.toml", "") == plan("a.yaml", "# nothing yet\n")
    assert plan("a.toml", "")[1] == "30 of 30 trainings would run, 12 epochs each."


def test_several_values_stand_one_after_the_other_or_between_commas_or_repeat_the_option(plan):
    words = [
        ("--masks", "snip", "magnitude", "--sparsity", "0.5", "0.9"),
        ("--masks", "snip,magnitude", "--sparsity", "0.5,0.9"),
        ("--masks", "snip", "--masks", "magnitude", "--sparsity=0.5", "--sparsity=0.9"),
    ]
    plans = [plan("a.toml", GRID, *more) for more in words]
    assert plans[0] == plans[1] == plans[2]
    assert len(plans[0][0]) == 1 + 2 * 2 * 3


def test_a_comma_in_a_recipe_picks_techniques_of_it(plan):
    lines, _ = plan("a.toml", GRID, "--recipes", "default", "tost:lrsi,ghost_skip", "--no-dense")
    assert lines == ["snip 0.9, default, seed 0", "snip 0.9, tost:lrsi,ghost_skip, seed 0"]


def test_train_and_prune_take_files_of_settings_too(anymask, tmp_path, small):
    (tmp_path / "a.toml").write_text("sparsity = 0.75\nseed = 3\n")
    said = anymask("prune", "random", "--config", tmp_path / "a.toml", "--out", tmp_path / "m.mask", *small)
    assert said.code == 0
    assert "sparsity 0.75, seed 3" in said.out


@pytest.fixture
def rows(anymask, tmp_path, small):
    """The rows in the ledger that a command with a file of settings leaves."""

    def train(command, name, text, *more):
        (tmp_path / name).write_text(text)
        options = ["--config", tmp_path / name, "--sparsity", "0.9", "--epochs", "1", "--out", tmp_path / f"run-{name}", *more]
        said = anymask(command, *options, *small)
        assert said.code == 0, said.err
        return [json.loads(line) for line in (tmp_path / f"run-{name}" / "ledger.jsonl").read_text().splitlines()]

    return train


@needs_kernels
def test_sparse_layers_are_chosen_by_file_or_option_said_in_the_row_and_change_no_id(rows):
    ((on,), (off,), (yaml_on,), (yaml_off,), (option,)) = (
        rows("train", "on.toml", 'sparse = "on"', "--mask", "random"),
        rows("train", "off.toml", 'sparse = "off"', "--mask", "random"),
        rows("train", "on.yaml", "sparse: on", "--mask", "random"),
        rows("train", "off.yaml", "sparse: off", "--mask", "random"),
        rows("train", "option.toml", 'sparse = "off"', "--mask", "random", "--sparse", "on"),
    )
    layers = len(on["density"]["layers"])
    assert [row["sparse_layers"] for row in (on, off, yaml_on, yaml_off, option)] == [layers, 0, layers, 0, layers]
    assert len({row["id"] for row in (on, off, yaml_on, yaml_off, option)}) == 1
    assert on["accuracy"] == yaml_on["accuracy"] == option["accuracy"]
    assert off["accuracy"] == yaml_off["accuracy"]


@needs_kernels
def test_a_comparison_on_sparse_layers_trains_its_dense_reference_dense(rows):
    dense, masked = rows("compare", "a.toml", "sparse = 'on'", "--masks", "random", "--recipes", "tost", "--seeds", "1")
    assert (dense["sparse_layers"], masked["sparse_layers"]) == (0, len(masked["density"]["layers"]))


@needs_kernels
def test_a_lottery_ticket_is_found_on_sparse_layers_but_for_its_first_round(rows):
    (row,) = rows("train", "a.toml", "sparse = 'on'", "--mask", "lottery", "--recipe", "default")
    assert row["sparse_layers"] == len(row["density"]["layers"])
