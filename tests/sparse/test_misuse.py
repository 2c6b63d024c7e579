"""What goes on with a sparse model and cannot: it is told before anything is changed, or dropped aloud."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import anymask
from anymask.errors import MaskError, SettingError
from anymask.kernels import available
from anymask.onednn import memory_format
from anymask.prunables import compact
from tests.sparse.test_converting import made, sgd, steps

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")


def sparse(name="plain"):
    model, mask, x, y = made(name)
    return anymask.to_sparse(model, mask, x, measure=False), mask, x, y


def test_a_layer_that_was_parametrized_or_pruned_is_told_before_any_becomes_dense():
    model, *_ = sparse()
    right = {name: value.clone() for name, value in model.state_dict().items()}
    for put, take in (
        (lambda layer: parametrizations.weight_norm(layer, dim=None), lambda layer: parametrize.remove_parametrizations(layer, "weight")),
        (lambda layer: prune.identity(layer, "weight"), lambda layer: prune.remove(layer, "weight")),
    ):
        put(model[3])
        assert "3.weight" not in model.state_dict()
        with pytest.raises(SettingError, match=r"sparse layer 3 came parametrized.*Allowed.*prune\.remove"):
            anymask.to_dense(model)
        assert "1" in {name.removesuffix(".weight") for name in compact(model)}
        take(model[3])
    anymask.to_dense(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, right[name])


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_that_cannot_be_converted_is_told_on_the_way_back(kind):
    model, _, x, y = sparse()
    optimizer = kind(model.parameters())

    def loss():
        optimizer.zero_grad()
        found = F.cross_entropy(model(x), y)
        found.backward()
        return found

    optimizer.step(loss)
    with pytest.raises(SettingError, match=rf"{kind.__name__} (has made steps|keeps).*Allowed.*make another"):
        anymask.to_dense(model, optimizer=optimizer)
    assert compact(model)
    anymask.to_dense(model)


def test_slots_of_the_dense_model_are_told_when_they_are_loaded():
    model, mask, x, y = made("plain")
    optimizer = sgd(model)
    steps(model, optimizer, x, y, many=1)
    dense = copy.deepcopy(optimizer.state_dict())
    anymask.to_sparse(model, mask, x, optimizer=optimizer, measure=False)
    anymask.hold(mask, model, optimizer)
    with pytest.raises(MaskError, match="as of the dense layer"):
        optimizer.load_state_dict(dense)


def test_weights_that_a_sparse_layer_drops_are_told_once():
    model, _, x, _ = sparse()
    model.load_state_dict(model.state_dict())  # without a word
    dense, *_ = made("plain", sparsity=0.0)
    given = dense.state_dict()
    with pytest.warns(UserWarning, match="drops weights of a sparse layer") as told:
        model.load_state_dict(given)
    assert len({str(warning.message) for warning in told}) == 1
    kept = {name: layer.collect(given[name]) for name, layer in compact(model).items()}
    assert all(torch.equal(model.get_parameter(name), values) for name, values in kept.items())
    assert isinstance(model(x), torch.Tensor)


def test_what_a_replaced_relu_leaves_behind_says_what_to_do():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    mask, x = anymask.prune(model, "random-uniform", sparsity=0.5, seed=0), torch.randn(2, 3, 8, 8)
    anymask.to_sparse(model, mask, x, measure=False)
    model[2] = nn.LeakyReLU()
    with pytest.raises(SettingError, match="to_dense before a ReLU or pool is replaced"):
        model(x)


@pytest.mark.parametrize("name", ["plain", "strange"])
def test_float64_is_refused_as_by_dense_layers(name):
    model, _, x, _ = sparse(name)
    with pytest.raises(SettingError, match="given float64"):
        model(x.double())


def test_a_kernel_whose_side_of_1_is_dilated_is_not_measured_as_channels_last(tmp_path, monkeypatch):
    """oneDNN ended the process there."""
    monkeypatch.setenv("ANYMASK_CACHE", str(tmp_path))
    model, x = nn.Sequential(nn.Conv2d(3, 2, (2, 1), (4, 3), (1, 2), (1, 3)), nn.ReLU()), torch.randn(16, 3, 12, 1)
    assert memory_format(model) is torch.contiguous_format
    anymask.to_sparse(model, anymask.prune(model, "magnitude", sparsity=0.5), x)
