"""Masks that are not what they look like are said aloud: drawn by lot, or without some of the network's outputs."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from anymask import models, prune
from anymask.errors import DataError, MaskError
from anymask.pruning import METHODS, Method, OutputWarning, TieWarning
from anymask.pruning.criteria import magnitude

DATA = [(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_weights_with_equal_scores_are_said_to_be_drawn_by_lot(scope: str) -> None:
    model = net()
    prune(model, "magnitude", sparsity=0.9, scope=scope, floor=4).apply(model)
    with pytest.warns(TieWarning, match=r"magnitude scored \d+ of the 96 weights .* a lot by `seed` chose them .in 0.weight, 2.weight"):
        prune(model, "magnitude", sparsity=0.5, scope=scope)


@pytest.mark.parametrize("method", ["random", "magnitude", "snip", "synflow"])
def test_nothing_is_said_of_scores_that_rank(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(net(), method, sparsity=0.9, data=DATA, floor=1)


def test_synflow_ranks_the_weights_of_networks_with_relu6() -> None:
    """Ones through absolute weights end above 6, where ReLU6 is flat: all scores but the classifier's were 0."""
    model = models.build("mobilenetv2-0.25x", classes=10, channels=3, seed=0)
    masks = [prune(model, "synflow", sparsity=0.5, rounds=2, floor=1, example=torch.zeros(1, 3, 16, 16), seed=seed) for seed in (0, 1)]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grasp_of_narrow_numbers_is_that_of_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).to(
        dtype
    )
    x, y = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(32) % 4
    narrow = prune(model, "grasp", sparsity=0.8, floor=1, data=[(x, y)])
    assert next(model.parameters()).dtype == dtype
    assert narrow == prune(model.float(), "grasp", sparsity=0.8, floor=1, data=[(x.float(), y)])


def test_outputs_of_the_network_that_keep_nothing_are_named() -> None:
    with pytest.warns(OutputWarning, match=r"2 of 4 outputs of the last layer .2.weight. keep no weight.*exclude=\['2.weight'\]"):
        prune(net(), "magnitude+channel+uniform", sparsity=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(net(), "magnitude+channel+uniform", sparsity=0.5, exclude=["2.weight"])


def test_the_last_layer_is_the_one_that_is_used_last() -> None:
    """A head that is tied to the first layer is named after that, and no layer in between is taken for it."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 8, bias=False))
    model[4].weight = model[0].weight
    with pytest.warns(OutputWarning, match=r"4 of 8 outputs of the last layer .0.weight."):
        prune(model, "magnitude+channel+uniform", sparsity=0.5)


def test_wanda_says_that_weights_of_hooks_are_not_for_it() -> None:
    model = net()
    torch_prune.identity(model[0], "weight")
    with pytest.raises(MaskError, match=r"wanda saw no input of 0.weight_orig.*not those that a hook computes"):
        prune(model, "wanda", sparsity=0.5, data=DATA)


def test_a_method_of_ones_own_that_ranks_by_steps_is_told_of_its_ties() -> None:
    def steps(model, weights, batches):
        return {name: score.mul(4).round() for name, score in magnitude(model, weights, batches).items()}

    with pytest.warns(TieWarning, match="mine scored"):
        prune(net(), Method("mine", "", steps, paper=""), sparsity=0.5)
    assert "mine" not in METHODS


def test_recurrent_layers_that_stay_dense_are_said_aloud_where_they_are_the_most() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 16), "head": nn.Linear(16, 4)})
    says = r"covers 64 weights, and 1,536 of recurrent layers stay dense: kinds=\['conv', 'linear', 'recurrent'\] prunes them, too"
    with pytest.warns(UserWarning, match=says):
        prune(model, "magnitude", sparsity=0.5)
    assert prune(model, "magnitude", sparsity=0.5, kinds=["linear", "recurrent"]).total == 1600
    assert prune(model, "magnitude", sparsity=0.5, kinds=["linear"]).total == 64  # so it was meant
    model["head"] = nn.Linear(16, 100)
    assert prune(model, "magnitude", sparsity=0.5).total == 1600


TARGETS = {
    "numbers": (torch.randn(16), 4),
    "a column of numbers": (torch.randn(16, 1), 1),
    "a column of ones": (torch.ones(16, 1), 1),
    "several numbers": (torch.randn(16, 4), 4),
    "several labels": ((torch.arange(64).reshape(16, 4) % 3 > 0).float(), 4),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_targets_of_a_regression_want_its_loss(name: str, method: str) -> None:
    y, outputs = TARGETS[name]
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs))
    data = [(DATA[0][0], y)]
    with pytest.raises(DataError, match=r"targets came as float32 .* the loss is cross entropy.*loss=torch.nn.functional.mse_loss"):
        prune(model, method, sparsity=0.5, data=data)


def test_a_regression_is_pruned_with_its_loss() -> None:
    model, data = net(), [(DATA[0][0], torch.randn(16, 4))]
    assert prune(model, "snip", sparsity=0.5, data=data, loss=nn.functional.mse_loss).sparsity == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_probabilities_of_classes_are_targets_of_cross_entropy(dtype: torch.dtype) -> None:
    y = torch.randn(16, 4).softmax(1).to(dtype)
    y[3] = 0  # a sample without any
    assert prune(net().to(dtype), "snip", sparsity=0.5, data=[(DATA[0][0].to(dtype), y)]).sparsity == 0.5
