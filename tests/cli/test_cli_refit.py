"""From a trained network to a small file without training it: `anymask prune --weights --refit`, and what trains on from weights."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from anymask import load_mask
from anymask.shipping.runtime import load
from tests.cli.test_cli_mistakes import check


@pytest.fixture
def here(anymask, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert anymask("train", "--mask", "dense", "--recipe", "default", "--epochs", "6", "--out", "dense", *small).code == 0
    return tmp_path


def test_a_trained_network_is_pruned_refitted_and_shipped(anymask, small, here):
    weights = ("--weights", "dense/model.safetensors", "--refit", "new/net.safetensors")
    said = anymask("prune", "magnitude", "--sparsity", "0.6", "--out", "m.mask", *weights, *small)
    assert said.code == 0, said.err
    shares = {name: float(share) for share, name in re.findall(r"([\d.]+)% (dense|pruned|refitted)", said.out)}
    assert list(shares) == ["dense", "pruned", "refitted"]
    trained = json.loads((here / "dense/ledger.jsonl").read_text())["accuracy"]["test"]
    assert shares["dense"] == pytest.approx(100 * trained, abs=0.01)
    mask, dense, mended = load_mask("m.mask"), load_file("dense/model.safetensors"), load_file("new/net.safetensors")
    assert mask.sparsity == pytest.approx(0.6, abs=0.01)
    for name, kept in mask.items():
        assert not mended[name][~kept].any()
        assert dense[name][kept].abs().min() >= dense[name][~kept].abs().max() or mask.info["scope"] == "global"
    assert not all(torch.equal(mended[name], dense[name] * kept) for name, kept in mask.items())
    network = ("--model", "resnet8-0.25x", "--input", "3", "12", "12")
    assert anymask("ship", "new/net.safetensors", *network, "--mask", "m.mask", "--to", "net.anymask").code == 0
    assert load("net.anymask").plan.kept <= mask.kept
    said = anymask(
        "train", "--mask", "m.mask", "--weights", "new/net.safetensors", "--epochs", "1", "--recipe", "best", "--out", "on", *small
    )
    assert said.code == 0, said.err
    assert json.loads((here / "on/ledger.jsonl").read_text())["settings"]["weights"] == "new/net.safetensors"


def test_the_weights_that_a_ticket_starts_from_are_not_written_over(anymask, small, here):
    said = anymask("prune", "lottery-rewind", "--out", "m.mask", "--refit", "m.safetensors", "--weights", "dense/model.safetensors", *small)
    check(said, "m.safetensors", "another file of this command")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--refit", "net.safetensors"], ["refit came as net.safetensors", "--weights"]),
        (["--refit", "dense/model.safetensors", "--weights", "dense/model.safetensors"], ["is there already", "--force"]),
        (["--refit", "net.safetensors", "--weights", "dence/model.safetensors"], ["no checkpoint at dence", "check the path"]),
        (["--refit", "net.safetensors", "--weights", "dense/ledger.jsonl"], ["dense/ledger.jsonl is no checkpoint", "state dict"]),
        (["--refit", "m.mask", "--weights", "dense/model.safetensors"], ["m.mask", "another file of this command"]),
        (["--refit", "dense", "--weights", "dense/model.safetensors", "--force"], ["dense", "a folder"]),
        (["--refit", "dense/model.safetensors", "--weights", "dense/model.safetensors", "--force"], ["another file of this command"]),
    ],
)
def test_mistakes_are_said_and_write_nothing(anymask, small, here, more, words):
    said = anymask("prune", "magnitude", "--sparsity", "0.6", "--out", "m.mask", *more, *small)
    check(said, *words)
    assert sorted(path.name for path in here.iterdir()) == ["dense"]
