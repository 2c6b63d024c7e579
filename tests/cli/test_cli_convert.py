"""`anymask convert`: one command from the file of another library to one that is read here, and back."""

import os

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from anymask import Mask, load_mask
from tests.cli.test_cli_mistakes import check


@pytest.fixture
def here(tmp_path, monkeypatch):
    """pruned.pth of torch.nn.utils.prune, synflow.mask of ours and dense.pt, all of one network."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, "dense.pt")
    Mask({"0.weight": torch.eye(4, 8), "2.weight": torch.eye(2, 4)}, info={"method": "synflow"}).save("synflow.mask")
    prune.l1_unstructured(model[0], "weight", amount=0.75)
    torch.save(model.state_dict(), "pruned.pth")
    return tmp_path


def test_a_file_of_another_library_becomes_one_of_ours(anymask, here):
    said = anymask("convert", "pruned.pth", "my.mask")
    assert (said.code, said.err) == (0, "Mask: my.mask\n")
    assert said.out == "pruned.pth: Mask(1 parameters, 8 of 32 kept, sparsity 0.7500), from pruned.pth, of format torch-prune\n"
    assert load_mask("my.mask") == load_mask("pruned.pth")
    assert anymask("inspect", "my.mask").code == 0
    again = anymask("convert", "my.mask", "again.mask")
    assert "my.mask: Mask(1 parameters, 8 of 32 kept, sparsity 0.7500), from pruned.pth, of format torch-prune" in again.out


@pytest.mark.parametrize(
    ("to", "more"), [("weight-mask", ()), ("torch-prune", ("--weights", "dense.pt")), ("zeros", ("--weights", "dense.pt"))]
)
@pytest.mark.parametrize("out", ["out.pt", "out.safetensors"])
def test_ours_becomes_one_of_another_library(anymask, here, to, more, out):
    said = anymask("convert", "synflow.mask", out, "--to", to, *more)
    assert (said.code, said.out) == (0, "synflow.mask: Mask(2 parameters, 6 of 40 kept, sparsity 0.8500, synflow)\n")
    assert load_mask(out) == load_mask("synflow.mask")


def test_layers_without_zeros_are_not_in_the_mask_of_a_checkpoint_and_that_is_said(anymask, here):
    Mask({"0.weight": torch.eye(4, 8), "2.weight": torch.ones(2, 4)}).save("dense-end.mask")
    assert anymask("convert", "dense-end.mask", "zeros.pt", "--to", "zeros", "--weights", "dense.pt").err == "Mask: zeros.pt\n"
    said = anymask("convert", "zeros.pt", "again.mask")
    assert said.err == "Mask: again.mask\nNote: not in the mask, because they hold no zero: 2.weight\n"
    assert set(load_mask("again.mask")) == {"0.weight"}
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    assert load_mask("zeros.pt", model=model) == load_mask("dense-end.mask")
    assert "left_out" not in load_mask("zeros.pt", model=model).info


def test_a_file_may_give_the_weights_too(anymask, here):
    assert anymask("convert", "pruned.pth", "sparse.pt", "--to", "zeros", "--weights", "pruned.pth").code == 0
    assert set(torch.load("sparse.pt")) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("convert", ("IN",)),
        ("convert synflow.mask", ("OUT",)),
        ("convert nowhere.pth my.mask", ("no mask file at nowhere.pth",)),
        ("convert synflow.mask out --to zero", ("unknown format", "did you mean 'zeros'")),
        ("convert synflow.mask out --too zeros", ("--too", "did you mean --to?")),
        ("convert synflow.mask out --to zeros", ("--weights",)),
        ("convert synflow.mask out --weights dense.pt", ("came with weights",)),
        ("convert synflow.mask out --to zeros --weights nowhere.pt", ("nowhere.pt",)),
        ("convert synflow.mask out --to zeros --weights synflow.mask", ("a mask of ours, where a checkpoint is needed",)),
        ("convert dense.pt out", ("dense.pt", "no exact zero")),
        ("convert evil.pth out", ("evil.pth", "posix.system", "nothing was run")),
        ("convert synflow.mask pruned.pth", ("pruned.pth is there already", "--force")),
        ("convert . out", ("no mask file at .", "model.safetensors.index.json")),
    ],
)
def test_mistakes_are_said_and_write_nothing(anymask, here, command, words):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch owned",)

    torch.save({"a": Evil()}, "evil.pth")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    check(anymask(*command.split()), *words)
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_a_file_is_replaced_when_told_so(anymask, here):
    assert anymask("convert", "synflow.mask", "pruned.pth", "--to", "weight-mask", "--force").code == 0
    assert load_mask("pruned.pth").info["format"] == "weight-mask"
