"""`anymask sweep` and `anymask report`: exit codes, what is said, what is written."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anymask.runlog import Ledger
from tests.cli.test_cli_mistakes import check
from tests.report.made_rows import made_row, made_rows
from tests.sweep.plans import FAILING, PLAN, write_plan

BLOCK = PLAN.replace("seeds = 2", "seeds = 1").replace("epochs = 2", "epochs = 1").replace('["random-erk", "snip"]', '"snip"')


@pytest.fixture
def plan(small, tmp_path):
    """A plan of three trainings of one epoch."""
    return write_plan(tmp_path / "plan.toml", Path(small[3]), BLOCK)


def ids(folder):
    return [json.loads(line)["id"] for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_sweep_trains_the_plan_once_and_says_what_it_did(anymask, plan, tmp_path):
    out = tmp_path / "run"
    said = anymask("sweep", plan, "--out", out, "--sparse", "off", "--device", "cpu", "--deterministic")
    assert (said.code, said.out) == (0, "")
    assert all(row["machine"]["deterministic"] for row in Ledger(out / "ledger.jsonl").rows())
    lines = said.err.splitlines()
    assert lines[0] == "3 trainings"
    assert lines[1].startswith("[1/3] folder, resnet8-0.25x, dense, default, seed 0: test ")
    assert lines[-2:] == ["3 of 3 trainings are finished, 0 failed, 0 are left.", f"Tables: anymask report {out}"]
    assert len(ids(out)) == 3
    assert anymask("sweep", plan, "--out", out).err.splitlines()[0] == "3 trainings, 3 finished already"


def test_many_are_not_trained_into_the_folder_of_one_where_ship_would_not_find_it(anymask, plan, small, tmp_path):
    out = tmp_path / "t"
    command = ["--epochs", "1", "--out", out, *small]
    assert anymask("train", "--mask", "dense", *command).code == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    for said in (anymask("compare", "--masks", "random", *command), anymask("sweep", plan, "--out", out)):
        check(said, f"--out came as {out}, which holds the network of `anymask train`", "choose another --out")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_dry_run_shows_what_would_run_and_writes_nothing(anymask, plan, tmp_path):
    said = anymask("sweep", plan, "--out", tmp_path / "run", "--dry-run")
    assert said.code == 0
    assert said.out.splitlines() == [
        "folder, resnet8-0.25x, dense, default, seed 0",
        "folder, resnet8-0.25x, snip 0.9, default, seed 0",
        "folder, resnet8-0.25x, snip 0.9, tost:ghost_activation,label_smoothing, seed 0",
    ]
    assert said.err == "3 of 3 trainings would run, 3 epochs in all.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


def test_what_failed_is_listed_with_its_reason_and_the_rest_is_done(anymask, plan, small, tmp_path):
    write_plan(plan, Path(small[3]), FAILING + BLOCK.split("[[block]]")[1].join(["[[block]]", ""]))
    said = anymask("sweep", plan, "--out", tmp_path / "run", "--sparse", "off")
    assert said.code == 1
    assert "Failed 2 times: folder, resnet8-0.25x, random 0.98, default, seed 0: TechniqueError: the training loss became" in said.err
    assert "3 of 4 trainings are finished, 1 failed, 0 are left." in said.err
    assert "Traceback" not in said.err


def test_a_budget_says_what_is_left_and_the_same_command_goes_on(anymask, plan, tmp_path):
    out = tmp_path / "run"
    said = anymask("sweep", plan, "--out", out, "--sparse", "off", "--budget", "0.001s")
    assert said.code == 0
    assert "Left: folder, resnet8-0.25x, dense, default, seed 0" in said.err
    assert "0 of 3 trainings are finished, 0 failed, 3 are left.\nThe same command goes on from there." in said.err
    assert anymask("sweep", plan, "--out", out, "--sparse", "off", "--budget", "10m").code == 0
    assert len(ids(out)) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--budget", "soon"], "budget came as 'soon'"),
        (["--workers", "0"], "workers came as 0"),
        (["--workers", "1.5"], "--workers came as '1.5'"),
        (["--workers", "2", "--ray", "auto"], "workers came as 2 with ray"),
        (["--device", "cuba"], "device 'cuba'"),
        (["--sparse", "maybe"], "maybe"),
    ],
)
def test_mistakes_are_told_in_three_parts_before_anything_is_written(anymask, plan, tmp_path, words, says):
    said = anymask("sweep", plan, "--out", tmp_path / "run", *words)
    assert said.code == 2
    assert says in said.err
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["Error", "Allowed", "To do"]
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_does_not_answer_is_told_at_once(anymask, plan, tmp_path, address):
    begun = time.monotonic()
    said = anymask("sweep", plan, "--out", tmp_path / "run", "--ray", address)
    assert time.monotonic() - begun < 10
    assert said.code == 2
    assert said.err.splitlines()[-3].startswith(f"Error: ray came as '{address}', and no cluster answers there (")
    assert not (tmp_path / "run").exists()


def test_without_ray_the_error_says_what_to_install(anymask, plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = anymask("sweep", plan, "--out", tmp_path / "run", "--ray", "auto")
    assert said.code == 2
    assert "Error: ray is not installed\n" in said.err
    assert said.err.endswith("To do: pip install 'anymask[ray]'\n")


def test_a_plan_with_a_mistake_names_its_block(anymask, plan, tmp_path):
    plan.write_text(plan.read_text().replace('masks = "snip"', 'masks = "snpi"'))
    said = anymask("sweep", plan, "--out", tmp_path / "run")
    assert said.code == 2
    assert said.err.startswith(f"Error: block 1 of {plan}: unknown mask method 'snpi'")
    assert anymask("sweep", tmp_path / "gone.toml", "--out", tmp_path / "run").code == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_all_processes_at_once_and_keeps_what_is_finished(anymask, small, tmp_path, workers):
    many = BLOCK.replace("seeds = 1", "seeds = 40").replace("epochs = 1", "epochs = 4")
    plan, out = write_plan(tmp_path / "plan.toml", Path(small[3]), many), tmp_path / "run"
    command = ["sweep", str(plan), "--out", str(out), "--sparse", "off", "--workers", str(workers)]
    process = subprocess.Popen([sys.executable, "-m", "anymask", *command], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("[1/"):
        assert line, "it ended before its first training"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    begun = time.monotonic()
    _, err = process.communicate(timeout=60)  # all of them have closed their stderr, and so have ended
    assert process.returncode == 130, err
    assert time.monotonic() - begun < 20
    assert "Traceback" not in err
    assert f"finished trainings are kept in {out}; the same command goes on from there." in err
    assert 1 <= len(ids(out)) == len(set(ids(out))) < 120
    assert {row["command"] for row in Ledger(out / "ledger.jsonl").rows()} == {shlex.join(["anymask", *command])}


# -- report ------------------------------------------------------------------------------------------------------------


def ledger(path, rows):
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def two(tmp_path):
    """A run folder, and the ledger of another network that holds some of its rows, too."""
    first = made_rows(masks=("snip", "synflow"))
    second = made_rows(masks=("snip",), sparsity=0.9, model="resnet20")
    return ledger(tmp_path / "a" / "ledger.jsonl", first).parent, ledger(tmp_path / "b" / "other.jsonl", second + first[:5])


def test_report_puts_ledgers_together(anymask, two, tmp_path):
    out = tmp_path / "all"
    said = anymask("report", *two, "--out", out)
    assert said.code == 0, said.err
    assert said.out == (out / "table.md").read_text()
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["Table", "Page"]
    headings = [line for line in said.out.splitlines() if line.startswith("### ")]
    assert headings[:2] == ["### All cells", "### Effect against sparsity"]
    assert [heading.split(",")[1] for heading in headings[2:]] == [" demonet", " resnet20"]
    cells = said.out.split("### ")[1]
    assert cells.count("| tost | ") == 3
    assert "| fashion-mnist-5k | resnet20 | 12 | 90% | snip | tost | +" in cells
    assert "tost against default: of 3 cells, won " in cells
    page = (out / "report.html").read_text()
    assert page.index("Over all cells") < page.index("Effect against sparsity") < page.index("<h2>Results</h2>")
    assert "<dt>Runs</dt><dd>33</dd>" in page  # 21 + 12, of which none counts twice


def test_report_of_one_folder_shows_the_tables_and_writes_nothing(anymask, two):
    said = anymask("report", two[0], "--baseline", "tost")
    assert (said.code, said.err) == (0, "")
    assert "default - tost, points" in said.out
    assert [path.name for path in two[0].iterdir()] == ["ledger.jsonl"]


def test_the_effect_against_sparsity_is_the_mean_over_masks_and_networks(anymask, tmp_path):
    shifts = {("snip", "demonet"): 0.01, ("synflow", "demonet"): 0.02, ("snip", "resnet20"): 0.06}
    rows = [
        made_row(mask, recipe, seed, 0.5 + 0.01 * seed + (shift if recipe == "tost" else 0.0), model=model)
        for (mask, model), shift in shifts.items()
        for recipe in ("default", "tost")
        for seed in range(3)
    ]
    said = anymask("report", ledger(tmp_path / "run" / "ledger.jsonl", rows))
    assert "| 98% | tost | +3.00 | +3.00 [+3.00, +3.00] | 3 | 3 | 3 | 0 | 0 |" in said.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "report came without a ledger"),
        (["gone"], "no training has finished in gone"),
        (["nowhere"], "nothing is at nowhere"),
        (["my.mask"], "my.mask came as a ledger"),
        (["a", "--baseline", "defualt"], "unknown recipe in these ledgers: 'defualt'"),
    ],
)
def test_mistakes_of_report_are_told(anymask, two, monkeypatch, words, says):
    monkeypatch.chdir(two[0].parent)
    Path("my.mask").touch()
    Path("gone").mkdir()
    said = anymask("report", *words)
    assert said.code == 2
    assert said.err.startswith(f"Error: {says}")


def test_a_baseline_whose_name_stands_for_several_recipes_is_asked_for_by_what_it_holds(anymask, tmp_path):
    held = [[{"name": "label_smoothing", "eps": eps}] for eps in (0.1, 0.9)]
    rows = [made_row("snip", "my.toml", seed, 0.8) | {"techniques": techniques} for seed, techniques in enumerate(held)]
    other = ledger(tmp_path / "other" / "ledger.jsonl", [made_row("snip", "my.toml", 2, 0.8) | {"techniques": held[0]}])
    folder = ledger(tmp_path / "run" / "ledger.jsonl", [*rows, made_row("snip", "default", 0, 0.7)]).parent
    said, name = anymask("report", folder, other, "--baseline", "my.toml"), "my.toml (label_smoothing.eps=0.1)"
    assert said.code == 2
    assert f"Allowed: default, {name}, my.toml (label_smoothing.eps=0.9)\n" in said.err
    assert f"| default - {name}, points" in anymask("report", folder, "--baseline", name).out


def failure(recipe, seed, name):
    reason = {"type": "TechniqueError", "message": "the loss became nan. Allowed: a finite loss. To do: lower lr."}
    where = {"training": f"fashion-mnist-5k, demonet, snip 0.98, {recipe}, seed {seed}", "block": "block 1"}
    return {"id": name, **where, **reason, "settings": made_row("snip", recipe, seed, 0.8)["settings"]}


def test_what_failed_is_in_the_report_with_its_reason_and_no_empty_table_before_it(anymask, tmp_path):
    rows = [made_row("snip", recipe, seed, 0.8) for recipe, seed in (("default", 0), ("default", 1), ("tost", 1))]
    folder = ledger(tmp_path / "run" / "ledger.jsonl", rows).parent
    failures = [
        failure("tost", 0, "a"),
        failure("tost", 0, "a"),
        failure("best", 0, "b"),
        failure("best", 1, "c"),
        failure("tost", 1, rows[2]["id"]),
    ]
    (folder / "failures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in failures))
    said = anymask("report", folder, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert said.out.startswith("### Failed trainings\n")
    assert said.out.split("\n\n")[1].splitlines()[2:] == [
        "| fashion-mnist-5k, demonet, snip 0.98, tost | 0 | 1 | TechniqueError: the loss became nan |",
        "| fashion-mnist-5k, demonet, snip 0.98, best | 0, 1 | - | TechniqueError: the loss became nan |",
    ]
    assert "over the seeds that finished alone" in said.out
    assert "<h3>Failed trainings</h3>" in (tmp_path / "out" / "report.html").read_text()
    assert anymask("report", folder, "--baseline", "best").code == 0  # of which there is nothing but failures
    (folder / "ledger.jsonl").unlink()
    assert "| fashion-mnist-5k, demonet, snip 0.98, best | 0, 1 | - |" in anymask("report", folder).out


def test_where_nothing_is_compared_no_empty_table_stands_above_what_is_finished(anymask, tmp_path):
    said = anymask("report", ledger(tmp_path / "run" / "ledger.jsonl", [made_row("snip", "default", 0, 0.8)]))
    assert said.out.startswith("### fashion-mnist-5k, demonet, 12 epochs, 1 seed\n")
    assert "No finished runs." not in said.out


def test_a_damaged_row_is_told_with_its_ledger(anymask, two):
    with open(two[1], "a") as file:
        file.write(json.dumps(made_row("snip", "tost", 9, 3.7156)) + "\n")
    said = anymask("report", *two)
    assert said.code == 2
    assert said.err.startswith(
        f"Error: {two[1]}: row {len(two[1].read_text().splitlines())} has accuracy.test 3.7156\nAllowed: a share in [0, 1]\n"
    )


def test_masks_only_makes_masks_and_streams_train_with_them(anymask, plan, tmp_path):
    out = tmp_path / "run"
    said = anymask("sweep", plan, "--out", out, "--masks-only")
    assert said.code == 0
    [file] = (out / "masks").glob("*.mask")
    assert said.err == f"Making {file.name}\nMasks in {out / 'masks'}: 1\n"
    assert not (out / "ledger.jsonl").exists()
    said = anymask("sweep", plan, "--out", out, "--sparse", "off", "--compile", "graph", "--streams", "2")
    assert said.code == 0
    assert "3 of 3 trainings are finished" in said.err
    machine = json.loads((out / "ledger.jsonl").read_text().splitlines()[0])["machine"]
    assert (machine["compile"], machine["streams"]) == ("graph", 2)
    assert anymask("sweep", plan, "--out", out, "--masks-only", "--budget", "9m").code == 2
    said = anymask("sweep", plan, "--out", out, "--streams", "2")
    assert (said.code, "Traceback" in said.err) == (2, False)
    assert "without compile='graph'" in said.err
