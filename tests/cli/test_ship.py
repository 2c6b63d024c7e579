"""`anymask ship` and `anymask bench`: from a run folder or a checkpoint to a file, and its time beside others."""

import itertools
import json
import shutil

import pytest
import torch

import anymask as package
from anymask import Mask, load_mask, models
from anymask.shipping import timing
from anymask.shipping.runtime import load
from anymask.shipping.timing import OTHERS, OURS, Result, Timing
from tests.cli.test_cli_mistakes import check


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small):
    """The folder of `anymask train`, and the words of that command."""
    from anymask.cli import main

    out = tmp_path_factory.mktemp("train") / "run"
    words = ["train", "--mask", "snip", "--sparsity", "0.9", "--epochs", "1", "--out", str(out), *small]
    assert main(words) == 0
    return out


@pytest.fixture
def here(tmp_path, monkeypatch, trained):
    """A working folder with a run, a checkpoint, a mask of it and a shipped file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    model = models.build("resnet8-0.25x", classes=2, channels=1, seed=0)
    mask = package.prune(model, "random", sparsity=0.5)
    torch.save(model.state_dict(), "dense.pt")
    mask.save("half.mask")
    mask.apply(model)
    package.ship(model, mask, example=torch.ones(1, 1, 12, 12), to="half.anymask")
    return tmp_path


@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
def test_a_run_folder_becomes_a_file_that_runs(anymask, here, values):
    said = anymask("ship", "run", "--to", "new/net.anymask", "--values", values)
    assert said.code == 0, said.err
    assert said.err.endswith("File: new/net.anymask\n")
    program = load("new/net.anymask")
    mask, row = load_mask("run/mask.mask"), json.loads((here / "run/ledger.jsonl").read_text())
    assert program.plan.kept <= mask.kept
    assert f"{program.plan.kept:,} of {mask.total:,} weights" in said.out
    assert program.plan.values == values
    assert (program.input, program.output) == ((3, 12, 12), (2,))  # as the mask says
    assert program.plan.info["accuracy"] == row["accuracy"]["test"]
    assert program.plan.info["mask"] == "snip"


def test_a_checkpoint_is_shipped_with_its_zeros_or_a_mask(anymask, here):
    network = ("--model", "resnet8-0.25x", "--input", "1", "12", "12")
    assert anymask("ship", "dense.pt", *network, "--to", "dense.anymask").code == 0
    assert anymask("ship", "dense.pt", *network, "--mask", "half.mask", "--to", "masked.anymask").code == 0
    total = load("dense.anymask").plan.total
    assert load("dense.anymask").plan.kept == total
    assert load("masked.anymask").plan.kept == load_mask("half.mask").kept
    assert anymask("ship", "dense.pt", *network, "--to", "dense.safetensors").code == 0
    assert anymask("ship", "dense.safetensors", *network, "--mask", "half.mask", "--to", "again.anymask").code == 0
    assert (here / "again.anymask").stat().st_size < (here / "dense.safetensors").stat().st_size


def test_a_file_is_only_called_smaller_where_it_is(anymask, here):
    network = ("--model", "resnet8-0.25x", "--input", "1", "12", "12")
    assert "times smaller; outputs differ" in anymask("ship", "dense.pt", *network, "--mask", "half.mask", "--to", "net.anymask").out
    assert anymask("ship", "dense.pt", *network, "--to", "net.safetensors").out.endswith(" MB dense\n")


def test_a_dense_run_of_unknown_images_needs_their_size(anymask, here):
    (here / "run/mask.mask").unlink()
    check(anymask("ship", "run", "--to", "net.anymask"), "says how large its images are", "--input 3 32 32")
    assert anymask("ship", "run", "--input", "3", "12", "12", "--to", "net.anymask").code == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ship run", ("--to",)),
        ("ship run --to net.pt", (".anymask, .onnx, .safetensors",)),
        ("ship run --to half.anymask", ("half.anymask is there already", "--force")),
        ("ship run --to net.anymask --values int4", ("'int4'", "float16")),
        ("ship run --to net.anymask --model resnet20", ("run holds a resnet8-0.25x, and resnet20 came",)),
        ("ship run --to net.anymask --mask half.mask", ("with the folder run",)),
        ("ship . --to net.anymask", ("holds no finished training",)),
        ("ship nowhere --to net.anymask", ("nothing is at nowhere",)),
        ("ship dense.pt --to net.anymask", ("dense.pt came without its network", "--model NAME --input C H W")),
        ("ship nowhere.pt --model resnet20 --input 3 32 32 --to net.anymask", ("no checkpoint at nowhere.pt",)),
        ("ship dense.pt --model resnt20 --input 3 32 32 --to net.anymask", ("resnt20", "resnet20")),
        ("ship dense.pt --model resnet20 --input 3 32 32 --to net.anymask", ("not those of resnet20",)),
        ("ship dense.pt --model resnet8-0.25x --input 3 -3 12 --to net.anymask", ("3 x -3 x 12", "over 0")),
        ("ship dense.pt --model resnet8-0.25x --input 3 99999999 99999999 --to net.anymask", ("99999999", "at most")),
        ("bench", ("FILE",)),
        ("bench nowhere.anymask", ("nowhere.anymask",)),
        ("bench dense.pt", ("not a shipped network", "another kind of file")),
        ("bench half.anymask --against onx", ("'onx'", "'onnx'")),
        ("bench half.anymask --batch 0", ("over 0",)),
        ("bench half.anymask --seconds nan", ("seconds as nan", "over 0")),
        ("inspect half.anymask", ("a network of anymask.ship", "checkpoint that it was made of")),
        ("ship half.anymask --model resnet8-0.25x --input 3 12 12 --to net.anymask", ("a network of anymask.ship",)),
        ("bench half.anymask --threads 0", ("threads came as 0",)),
    ],
)
def test_mistakes_are_said_and_write_nothing(anymask, here, command, words):
    before = sorted(path.name for path in here.iterdir())
    check(anymask(*command.split()), *words)
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_mask_that_is_not_that_of_the_weights_is_refused(anymask, here):
    mask = load_mask("run/mask.mask")
    Mask({name: torch.zeros_like(mask[name]) for name in mask}).save("run/mask.mask")
    check(anymask("ship", "run", "--input", "3", "12", "12", "--to", "net.anymask"), "weights that the mask leaves out are not 0")


# -- bench -------------------------------------------------------------------------------------------------------------


def test_bench_compares_and_says_who_is_faster(anymask, here):
    said = anymask(
        "bench",
        "half.anymask",
        "--batch",
        1,
        3,
        "--threads",
        1,
        "--seconds",
        0.01,
        "--against",
        "eager",
        "channels-last",
        "--json",
        "b.json",
    )
    assert said.code == 0, said.err
    assert all(word in said.out for word in ("batch 1", "batch 3", "eager", "channels-last", "PyTorch"))
    found = json.loads((here / "b.json").read_text())
    assert [(row["name"], row["batch"]) for row in found["timings"]] == [(n, b) for b in (1, 3) for n in (OURS, "eager", "channels-last")]
    assert all(row["ms"] > 0 and row["rounds"] >= 5 and row["difference"] < 1e-3 for row in found["timings"])
    assert found["verdicts"] == [line for line in said.out.splitlines() if line.startswith("batch ")]
    assert found["threads"] == 1


def test_bench_runs_onnx_runtime_where_it_is_installed(anymask, here):
    pytest.importorskip("onnxscript", reason="pip install 'anymask[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'anymask[onnx]'")
    said = anymask(
        "bench", "half.anymask", "--batch", 2, "--threads", 1, "--seconds", 0.01, "--against", "onnx", "onnx-int8", "--json", "b.json"
    )
    assert said.code == 0, said.err
    assert "left out" not in said.out
    rows = {row["name"]: row for row in json.loads((here / "b.json").read_text())["timings"]}
    assert rows["onnx"]["difference"] < 1e-3


def test_without_onnx_runtime_a_line_says_so(anymask, here, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    said = anymask("bench", "half.anymask", "--batch", 1, "--seconds", 0.01, "--against", "eager", "onnx")
    assert said.code == 0, said.err
    assert "onnx is left out: onnxruntime is not installed. To do: pip install 'anymask[onnx]'." in said.out


@pytest.mark.parametrize("load", [0.5, 1.5])
@pytest.mark.parametrize("slow", [1.2, 406.0])
def test_figures_of_a_busy_machine_are_said_not_to_be_trusted(anymask, here, monkeypatch, load, slow):
    times = itertools.cycle([1.0, 1.0, slow])
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(timing, "_time", lambda call: next(times))
    out = anymask("bench", "half.anymask", "--batch", 1, "--threads", 2, "--seconds", 0.01, "--against", "eager").out
    assert ("load 1.5 on 2 processors" in out) == (load > 1)
    assert ("at batch 1: 1.00 and " in out) == (slow > 2)
    assert out.count("\nThe machine was busy (") == (load > 1 or slow > 2)


def test_a_slower_batch_is_said_to_be_slower():
    def took(name, ms):
        return Timing(name, 1, ms, ms, ms, 5, 0.0)

    result = Result((took(OURS, 2.0), took("eager", 4.0), took("compiled", 3.0), took("onnx", 1.0)), ())
    assert result.verdicts() == [
        "batch 1: 1.50 times as fast as PyTorch (compiled, 3.00 ms)",
        "batch 1: SLOWER, 2.00 times as long as ONNX Runtime float32 (onnx, 1.00 ms)",
    ]
    assert set(OTHERS) == {"eager", "channels-last", "compiled", "onnx", "onnx-int8"}
