"""Networks, mask methods and techniques of the user's own, by their names on the command line."""

import hashlib
import sys

import pytest
import torch

from anymask import models
from anymask.config import Bench, Experiment
from anymask.pruning import METHODS
from anymask.runlog import Ledger
from anymask.train import Protocol
from tests.cli.test_cli_mistakes import check

MODULE = """
import random
import numpy as np
from torch import nn
from anymask.pruning import METHODS
from anymask.pruning.methods import Method, criteria

METHODS["outside"] = Method("outside", "the largest", criteria.magnitude, "0000.00000")

class Net(nn.Sequential):
    def __init__(self, *, classes, channels):
        super().__init__(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

def lazy(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def ten(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

def numpy_drawn(classes):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    nn.init.constant_(net[1].weight, np.random.rand() + random.random())
    return net

def strange(**everything):
    return sorted(everything)

def wrong(classes, pixels):
    return nn.Identity()

class Viewed(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(channels, 4, 3), nn.Linear(400, classes)

    def forward(self, x):
        return self.fc(self.conv(x).view(-1, 400))

def tall():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with outside.py in it; it is none of the places where Python looks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    (tmp_path / "outside.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("outside", None)
    METHODS.pop("outside", None)


def own(small, name):
    return ["outside:" + name if word == "resnet8-0.25x" else word for word in small]


def test_a_network_and_a_mask_method_of_ones_own_are_trained_compared_and_shipped(anymask, here, small):
    words = ["--plugins", "outside", "--epochs", "1", *own(small, "Net")]
    said = anymask("train", "--mask", "outside", "--sparsity", "0.5", "--recipe", "default", "--out", "one", *words)
    assert said.code == 0, said.err
    (row,) = Ledger(here / "one" / "ledger.jsonl").rows()
    assert row["versions"]["code of outside"] == hashlib.sha256(MODULE.encode()).hexdigest()[:12]
    check(anymask("ship", "one", "--to", "one.safetensors", "--input", 3, 12, 12), "outside:Net, whose code would be run")
    said = anymask("ship", "one", "--model", "outside:Net", "--to", "one.safetensors", "--input", 3, 12, 12)
    assert said.code == 0, said.err
    (here / "a.toml").write_text('masks = "outside"\nplugins = "outside"\nmodel = "outside:Net"\n')
    said = anymask("compare", "--config", "a.toml", "--recipes", "default", "--seeds", "1", "--dry-run", *own(small, "Net"))
    assert said.out.splitlines() == ["dense, default, seed 0", "outside 0.98, default, seed 0"]


def test_a_network_of_ones_own_that_views_its_maps_as_rows_is_trained_in_the_format_in_which_it_can(anymask, here, small):
    said = anymask("train", "--mask", "random", "--recipe", "default", "--out", "one", "--epochs", 1, *own(small, "Viewed"))
    assert said.code == 0, said.err


def test_lazy_layers_of_a_network_of_ones_own_begin_by_the_seed(here):
    bench = Bench(Experiment(model="outside:lazy"), Protocol(epochs=1))
    first, again, other = (bench.model(seed)[1].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_weights_of_a_network_of_ones_own_depend_on_the_seed_alone(here):
    before = torch.get_rng_state()
    for name, layer in (("numpy_drawn", 1), ("Net", 0)):
        first, again, other = (models.build(f"outside:{name}", classes=2, seed=seed)[layer].weight for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_mask_shows_its_network_of_ones_own_where_that_is_named_and_a_file_runs_no_code(anymask, here, small):
    said = anymask("prune", "random", "--sparsity", "0.5", "--out", "m.mask", *own(small, "Net"))
    assert "Network: outside:Net, 2 classes, input 3 x 12 x 12" in said.out
    (here / "outside.py").write_text("raise SystemExit('this is run')")
    del sys.modules["outside"]
    said = anymask("inspect", "m.mask")
    assert "give --model outside:Net --input C H W" in said.out
    (here / "outside.py").write_text(MODULE)
    said = anymask("inspect", "m.mask", "--model", "outside:Net", "--input", 3, 12, 12)
    assert "Network: outside:Net, 2 classes, input 3 x 12 x 12" in said.out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Nett", "did you mean 'Net'"),
        ("ten", "model 'outside:ten' gave (1, 10) for one image"),
        ("strange", "model 'outside:strange' gave a list"),
        ("wrong", "model 'outside:wrong' could not be made (TypeError"),
        ("tall", "model 'outside:tall' does not take images (1, 3, 12, 12) (RuntimeError"),
    ],
)
def test_what_is_no_network_for_these_images_is_told_before_anything_is_trained(anymask, here, small, name, says):
    check(anymask("prune", "random", "--sparsity", "0.5", "--out", "m.mask", *own(small, name)), says)


def test_a_module_that_is_not_there_or_fails_is_told(anymask, here):
    check(anymask("compare", "--model", "inside:Net", "--dry-run"), "module 'inside' cannot be imported (ModuleNotFoundError")
    check(anymask("compare", "--plugins", "inside", "--dry-run"), "module 'inside' cannot be imported")
    (here / "outside.py").write_text("1 / 0")
    check(anymask("train", "--mask", "snip", "--plugins", "outside", "--out", "t"), "ZeroDivisionError: division by zero")
    (here / "plan.toml").write_text("plugins = [3]\n[[block]]\n")
    check(anymask("sweep", "plan.toml", "--out", "t"), "plugins came as [3]", "the name of a module")
