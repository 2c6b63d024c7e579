"""The commands do their work: files, tables, Ctrl-C, resuming."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from anymask import load_mask
from anymask.cli import main
from anymask.cli.progress import watching
from anymask.config import Bench, Experiment
from anymask.sweep import Cell, cell_of
from anymask.sweep.claims import claimed
from anymask.train import Protocol, accuracy
from tests.cli.test_cli_mistakes import check

GRID = ["--masks", "snip", "--recipes", "default", "tost", "--sparsity", "0.9", "--seeds", "2", "--epochs", "1"]


def rows(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    """The run folder of an undisturbed comparison, and what was said."""
    folder, out, err = tmp_path_factory.mktemp("compare") / "run", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["compare", *GRID, *small, "--out", str(folder)])
    assert code == 0, err.getvalue()
    return folder, out.getvalue(), err.getvalue()


def test_compare_writes_a_ledger_a_table_and_a_page_and_prints_the_table(finished):
    folder, out, _ = finished
    assert {path.name for path in folder.iterdir()} >= {"ledger.jsonl", "table.md", "report.html", "masks"}
    assert [row["settings"]["recipe"] for row in rows(folder)] == ["default", "default", "tost"] * 2
    assert out == (folder / "table.md").read_text()
    assert "| 90% | snip |" in out
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert "snip" in page
    assert not list((folder / "unfinished").glob("*"))


def test_off_a_terminal_there_is_one_plain_line_for_each_finished_training(finished):
    lines = finished[2].splitlines()
    assert lines[0] == "6 trainings"
    shapes = [re.fullmatch(r"\[(\d)/6\] .*: test \d+\.\d\d%, validation \d+\.\d\d%, \d+\.\d s", line) for line in lines[1:7]]
    assert [shape and shape[1] for shape in shapes] == list("123456")
    assert [line.split(":")[0] for line in lines[7:]] == ["Table", "Page"]
    assert "\x1b" not in finished[2]


def test_compare_again_trains_nothing_and_says_the_same(finished, anymask, small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = (folder / "ledger.jsonl").read_bytes()
    said = anymask("compare", *GRID, *small, "--out", folder)
    assert said.code == 0
    assert said.out == finished[1]
    assert (folder / "ledger.jsonl").read_bytes() == before
    assert said.err.splitlines()[0] == "6 trainings, 6 finished already"
    assert anymask("compare", *GRID, *small, "--out", folder, "--dry-run").out == ""


def test_ctrl_c_in_a_comparison_keeps_what_is_finished_and_the_same_command_completes_it(finished, anymask, small, tmp_path):
    folder = tmp_path / "run"
    command = ["compare", *GRID, *small, "--out", str(folder)]
    process = subprocess.Popen([sys.executable, "-m", "anymask", *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("[1/6]"):
        assert line, "it ended before its first training"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert re.search(rf"Stopped\. \d finished trainings are kept in {folder}; the same command goes on from there", err)
    assert 1 <= len(rows(folder)) < 6
    assert out == (folder / "table.md").read_text()  # of what is finished
    assert anymask(*command).code == 0
    results = [{row["id"]: row["accuracy"] for row in rows(place)} for place in (folder, finished[0])]
    assert results[0] == results[1]
    assert len(results[0]) == 6


def test_without_plotly_the_table_is_written_and_what_to_install_is_said(finished, anymask, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished[0] / "ledger.jsonl", folder)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    said = anymask("inspect", folder, "--page")
    assert said.code == 0
    assert "pip install 'anymask[report]'" in said.err
    assert [path.name for path in sorted(folder.iterdir())] == ["ledger.jsonl", "table.md"]


def test_inspect_shows_the_table_of_a_run_folder_and_of_its_ledger(finished, anymask):
    folder, out, _ = finished
    assert anymask("inspect", folder).out == anymask("inspect", folder / "ledger.jsonl").out == out


def test_a_baseline_that_was_not_run_and_a_table_of_somebody_else_are_told_before_anything_is_written(finished, anymask, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished[0] / "ledger.jsonl", folder)
    (folder / "table.md").write_text("before")
    said = anymask("inspect", folder, "--page", "--baseline", "defualt")
    assert (said.code, said.out) == (2, "")
    assert "unknown recipe in these ledgers: 'defualt'" in said.err
    (folder / "ledger.jsonl").unlink()
    said = anymask("compare", "--out", folder)
    assert (said.code, said.out) == (2, "")
    assert f"{folder / 'table.md'} is there already" in said.err
    assert (folder / "table.md").read_text() == "before"


def test_prune_saves_the_mask_that_compare_uses(finished, anymask, small, tmp_path):
    out = tmp_path / "new" / "snip.mask"
    said = anymask("prune", "snip", "--sparsity", "0.9", "--seed", "1", "--out", out, *small)
    assert said.code == 0
    assert "10.00%" in said.out
    (compared,) = (finished[0] / "masks").glob("snip-0.9-seed1-*.mask")
    assert load_mask(out) == load_mask(compared)


def test_prune_says_which_layers_collapsed_and_warns_nowhere_else(anymask, small, tmp_path):
    said = anymask("prune", "magnitude", "--sparsity", "0.9995", "--out", tmp_path / "m.mask", *small)
    collapsed = load_mask(tmp_path / "m.mask").collapsed()
    assert said.code == 0
    assert collapsed
    assert "nothing passes, in: " + ", ".join(collapsed) in said.out.replace("\n", " ")
    assert said.err == f"Mask: {tmp_path / 'm.mask'}\n"


def test_a_lottery_ticket_can_be_pruned_and_leaves_only_its_file(anymask, small, tmp_path):
    said = anymask("prune", "lottery", "--sparsity", "0.3", "--epochs", "1", "--out", tmp_path / "l.mask", *small)
    assert said.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["l.mask"]


def test_train_keeps_the_weights_that_it_reports(anymask, small, tmp_path):
    out = tmp_path / "t"
    said = anymask("train", "--mask", "snip", "--sparsity", "0.9", "--epochs", "2", "--out", out, *small)
    assert said.code == 0, said.err
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "mask.mask", "ledger.jsonl"}
    (row,) = rows(out)
    assert f"{100 * row['accuracy']['test']:.2f}%" in said.out
    weights, mask = load_file(out / "model.safetensors"), load_mask(out / "mask.mask")
    assert all(tensor.is_contiguous() for tensor in weights.values())
    bench = Bench(Experiment(data="folder", data_dir=Path(small[3]), model=small[5]), Protocol(batch_size=27))
    model = bench.model(1)
    model.load_state_dict(weights)
    assert accuracy(model, bench.batches(0)[2]) == row["accuracy"]["test"]
    assert all(not weights[name][~mask[name]].any() for name in mask)
    assert row["density"]["overall"] == mask.density


@pytest.mark.parametrize(("mask", "sparsity"), [("snip+1:4", 0.75), ("snip+channel", 0.98), ("rigl+er", 0.98)])
def test_train_takes_the_sparsity_that_a_pattern_has(mask, sparsity):
    assert cell_of(mask, sparsity=None, recipe=None, seed=0).sparsity == sparsity
    assert cell_of(mask, sparsity=0.5, recipe=None, seed=0).sparsity == 0.5  # which `train_one` checks


def test_a_recipe_file_that_was_changed_is_named(anymask, small, tmp_path):
    recipe, command = tmp_path / "r.toml", ["train", "--mask", "dense", "--epochs", "1", "--out", tmp_path / "t", *small]
    recipe.write_text('[[technique]]\nname = "label_smoothing"\neps = 0.1\n')
    assert anymask(*command, "--recipe", recipe).code == 0
    assert anymask(*command, "--recipe", recipe, "--resume").code == 0
    recipe.write_text(recipe.read_text().replace("0.1", "0.2"))
    check(anymask(*command, "--recipe", recipe, "--resume"), f"with other settings: what is in the recipe {recipe} has changed")


def test_train_takes_a_mask_file_and_its_sparsity(anymask, small, tmp_path):
    anymask("prune", "random", "--sparsity", "0.75", "--out", tmp_path / "my.mask", *small)
    said = anymask("train", "--mask", tmp_path / "my.mask", "--recipe", "default", "--epochs", "1", "--out", tmp_path / "t", *small)
    assert said.code == 0, said.err
    assert rows(tmp_path / "t")[0]["settings"]["sparsity"] == 0.75
    assert load_mask(tmp_path / "t" / "mask.mask") == load_mask(tmp_path / "my.mask")


def test_train_stopped_by_ctrl_c_and_resumed_ends_bit_equal_to_one_undisturbed(anymask, small, tmp_path):
    common = ["train", "--mask", "snip", "--sparsity", "0.9", "--epochs", "12", *small]
    assert anymask(*common, "--out", tmp_path / "whole").code == 0
    out = tmp_path / "parts"

    def stop_after_an_epoch():
        while not list((out / "unfinished").glob("*.pt")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_after_an_epoch, daemon=True).start()
    said = anymask(*common, "--out", out)
    assert said.code == 130
    assert "Stopped; what is finished of it is kept. The same command with --resume goes on" in said.err
    assert not (out / "ledger.jsonl").exists()

    refused = anymask(*common, "--out", out)
    assert refused.code == 2
    assert "add --resume" in refused.err
    check(anymask(*common, "--momentum", "0.5", "--out", out, "--resume"), "a training that was stopped with other settings")

    assert anymask(*common, "--out", out, "--resume").code == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert load_mask(out / "mask.mask") == load_mask(tmp_path / "whole" / "mask.mask")
    assert rows(out)[0]["accuracy"] == rows(tmp_path / "whole")[0]["accuracy"]
    assert not (out / "unfinished").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "mask.mask"])
@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_train_does_not_replace_what_no_training_there_has_made(anymask, small, tmp_path, name, more):
    (tmp_path / name).write_text("mine")
    said = anymask("train", "--mask", "random", "--epochs", 1, "--out", tmp_path, *more, *small)
    check(said, f"{tmp_path} holds {name} of no training here", "choose another --out")
    assert (tmp_path / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_train_does_not_begin_where_another_process_is_at_it(anymask, small, tmp_path):
    with claimed(tmp_path / "t" / "train.lock"):
        check(anymask("train", "--mask", "random", "--epochs", 1, "--out", tmp_path / "t", *small), "another process trains in")
    assert list((tmp_path / "t").iterdir()) == []


def test_train_logs_for_tensorboard_when_told_to(anymask, small, tmp_path):
    pytest.importorskip("tensorboard")
    said = anymask("train", "--mask", "random", "--recipe", "default", "--epochs", "1", "--out", tmp_path / "t", "--tensorboard", *small)
    assert said.code == 0, said.err
    assert list((tmp_path / "t" / "tensorboard").glob("events*"))


@pytest.mark.filterwarnings("always:.*beginning anew")
def test_a_folder_with_a_finished_training_is_refused_or_left_as_it_is(anymask, small, tmp_path):
    common = ["train", "--mask", "dense", "--recipe", "default", "--out", tmp_path / "t", *small]
    said = anymask(*common, "--epochs", "1", "--resume")
    assert (said.code, f"Note: {tmp_path / 't'} holds nothing yet: beginning anew" in said.err) == (0, True)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()}
    assert not (tmp_path / "t" / "mask.mask").exists()
    said = anymask(*common, "--epochs", "1")
    assert said.code == 2
    assert "holds a finished training" in said.err
    assert anymask(*common, "--epochs", "1", "--resume").code == 0
    said = anymask(*common, "--epochs", "2", "--resume")
    assert said.code == 2
    assert "epochs 1 there, 2 here" in said.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()} == files


def test_on_a_terminal_bars_show_all_trainings_and_the_one_that_runs(capsys):
    console = Console(stderr=True, force_terminal=True, width=120, color_system=None)
    with watching(console) as watcher:
        watcher.begin(total=4, done=1)
        for seed in (3, 4):
            watcher.cell(Cell("snip", 0.9, "tost", seed), epochs=2)
        watcher.epoch(Cell("snip", 0.9, "tost", 3), 1, {"epoch": 1, "train_loss": 0.5, "validation_accuracy": 0.75, "lr": 0.1})
        watcher.progress.refresh()
        shown = capsys.readouterr().err
        watcher.left(Cell("snip", 0.9, "tost", 4), "ValueError: no")
        watcher.finished(Cell("snip", 0.9, "tost", 3), {"accuracy": {"test": 0.5, "validation": None}, "time": {"seconds": 3.0}})
    assert "1/4" in shown
    assert "1/2" in shown
    assert "snip 0.9, tost, seed 3" in shown
    assert "snip 0.9, tost, seed 4" in shown
    assert "loss 0.500, validation 75.0%" in shown
    said = capsys.readouterr().err
    assert "Failed: snip 0.9, tost, seed 4: ValueError: no" in said
    assert "[2/4] snip 0.9, tost, seed 3: test 50.00%, 3.0 s" in said


def test_the_bar_of_getting_ready_goes_where_trainings_are_told_of_at_their_end_alone():
    with watching(Console(stderr=True, force_terminal=True, width=120)) as watcher:
        watcher.begin(total=2, done=0)
        (ready,) = (task for task in watcher.progress.tasks if task.description == "getting ready")
        assert ready.visible
        watcher.finished(Cell("snip", 0.9, "tost", 3), {"accuracy": {"test": 0.5, "validation": None}, "time": {"seconds": 3.0}})
        assert not ready.visible


def test_where_there_is_no_terminal_a_line_says_how_far_a_long_training_is(capsys, monkeypatch):
    with watching(Console(stderr=True, width=200)) as watcher:
        watcher.begin(total=4, done=1)
        watcher.cell(Cell("snip", 0.9, "tost", 3), epochs=182)
        watcher.epoch(Cell("snip", 0.9, "tost", 3), 1, {"train_loss": 0.5})
        later = time.monotonic() + 301
        monkeypatch.setattr(time, "monotonic", lambda: later)
        watcher.epoch(Cell("snip", 0.9, "tost", 3), 2, {"train_loss": 0.25, "validation_accuracy": 0.75})
        watcher.epoch(Cell("snip", 0.9, "tost", 3), 3, {"train_loss": 0.25})
    (*_, line) = capsys.readouterr().err.splitlines()
    assert line == "[1/4] snip 0.9, tost, seed 3: epoch 2 of 182, loss 0.250, validation 75.0%"


def test_a_mask_that_moves_is_trained_and_its_last_one_kept_but_not_pruned_to(anymask, small, tmp_path):
    said = anymask("prune", "rigl", "--sparsity", "0.9", "--out", tmp_path / "r.mask", *small)
    assert said.code == 2
    assert "`anymask train --mask rigl --out DIR` ends with its mask in DIR/mask.mask" in said.err
    out = tmp_path / "t"
    said = anymask("train", "--mask", "gmp+1it", "--sparsity", "0.8", "--epochs", "3", "--out", out, *small)
    assert said.code == 0, said.err
    mask, weights = load_mask(out / "mask.mask"), load_file(out / "model.safetensors")
    assert mask.kept == round(0.2 * mask.total)
    assert all(not weights[name][~mask[name]].any() for name in mask)


def test_list_shows_static_masks_and_those_that_move(anymask):
    said = anymask("list", "masks")
    for name in ("snip-iterative", "lottery-lr", "wanda", "rigl", "gmp"):
        assert name in said.out
    assert "moves while it trains" in said.out
