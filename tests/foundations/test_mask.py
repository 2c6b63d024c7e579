"""The mask is a value: nobody changes it, it is compared by what is kept, and it fits a model or says why not."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anymask.errors import MaskError
from anymask.mask import Mask

SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)  # () too: some parameters are one number


@st.composite
def kept(draw):
    shapes = draw(st.dictionaries(st.text(min_size=1, max_size=8), SHAPES, min_size=1, max_size=4))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return {name: torch.rand(shape, generator=seed) < 0.5 for name, shape in shapes.items()}


def small():
    return Mask({"a": torch.tensor([[1, 0], [0, 0]]), "b": torch.ones(3)})


def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3))


# -- a value -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(kept())
def test_nothing_that_goes_in_or_comes_out_can_change_it(tensors):
    mask = Mask(tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for writable in (tensors.values(), mask.values(), [mask[name] for name in mask]):
        for tensor in writable:
            tensor.logical_not_()
        assert all(torch.equal(mask[name], before[name]) for name in before)
    tensors.clear()
    assert list(mask) == list(before)


@settings(max_examples=50)
@given(kept(), st.data())
def test_equal_means_the_same_weights_kept(tensors, data):
    mask = Mask(tensors)
    assert mask == Mask({name: tensor.double() for name, tensor in reversed(tensors.items())}, info={"method": "other"})
    assert mask == copy.deepcopy(mask) == pickle.loads(pickle.dumps(mask))
    name = data.draw(st.sampled_from(sorted(tensors)))
    flipped = {**tensors, name: tensors[name].clone()}
    flipped[name].view(-1)[data.draw(st.integers(0, tensors[name].numel() - 1))].logical_not_()
    assert mask != Mask(flipped)
    assert mask != Mask({**tensors, name + "x": torch.ones(1)})
    assert mask != Mask({**tensors, name: tensors[name][None]})


def test_a_mask_is_no_dict_and_has_no_hash():
    mask = small()
    assert mask != dict(mask)
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)
    with pytest.raises(TypeError):
        mask["a"] = torch.ones(2, 2)


@settings(max_examples=50)
@given(kept())
def test_counts_are_those_of_the_tensors(tensors):
    mask = Mask(tensors)
    ones, total = sum(int(t.sum()) for t in tensors.values()), sum(t.numel() for t in tensors.values())
    assert (mask.kept, mask.total, mask.density) == (ones, total, ones / total)
    assert mask.sparsity == pytest.approx(1 - ones / total)
    assert mask.layer_density() == {name: pytest.approx(float(t.double().mean())) for name, t in tensors.items()}
    assert mask.collapsed() == [name for name, t in tensors.items() if not t.any()]


def test_it_shows_its_size_and_where_it_comes_from():
    assert repr(small()) == "Mask(2 parameters, 4 of 7 kept, sparsity 0.4286)"
    assert repr(Mask({"a": torch.ones(1)}, info={"method": "snip"})).endswith("sparsity 0.0000, snip)")


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({}, "no parameters"),
        ({"a": torch.tensor([0.5, 1.0])}, "a holds values other than 0 and 1"),
        ({"a": torch.tensor([-1, 1])}, "a holds values other than 0 and 1"),
        ({"a": torch.tensor([float("nan")])}, "a holds values other than 0 and 1"),
        ({"a": torch.ones(2), "b": torch.ones(3, 0)}, r"b has no weights: its shape is \(3, 0\)"),
        ({"a": [1, 0]}, "a came as list"),
    ],
)
def test_what_is_no_mask_is_refused(given_, says):
    with pytest.raises(MaskError, match=says):
        Mask(given_)


# -- on a model --------------------------------------------------------------------------------------------------------


def test_a_mask_that_fits_finds_the_parameters_themselves():
    model = net()
    found = Mask({"2.weight": torch.ones(3, 4), "0.bias": torch.ones(2)}).check(model)
    assert list(found) == ["2.weight", "0.bias"]
    assert found["2.weight"] is model[2].weight


def test_a_tied_weight_is_found_under_each_of_its_names():
    model = net()
    model.append(model[2])
    assert Mask({"3.weight": torch.ones(3, 4)}).check(model)["3.weight"] is model[2].weight


def test_a_misfit_names_every_missing_and_misshapen_entry_with_the_nearest_names():
    mask = Mask(
        {"0.wieght": torch.ones(1), "zzz": torch.ones(1), "2.weight": torch.ones(4, 3), "0.bias": torch.ones(3), "1.bias": torch.ones(2)}
    )
    with pytest.raises(MaskError) as caught:
        mask.check(net())
    assert caught.value.came == (
        "the mask does not fit Sequential; "
        "not in the model: 0.wieght (1,) (nearest: 0.weight, 2.weight, 1.weight); zzz (1,) (nearest: none); "
        "another shape: 2.weight is (4, 3) in the mask and (3, 4) in the model (of that shape: none); "
        "0.bias is (3,) in the mask and (2,) in the model (of that shape: 2.bias); "
        "prunable and not in the mask: 0.weight (2, 1, 3, 3) (nearest: 0.wieght)"
    )


def test_the_nearest_names_are_those_of_the_shape_when_there_are_any():
    with pytest.raises(MaskError) as caught:
        Mask({"2.weigh": torch.ones(2, 1, 3, 3), "features": torch.ones(3, 4)}).check(net())
    assert "2.weigh (2, 1, 3, 3) (nearest: 0.weight, 2.weight, 1.weight); features (3, 4) (nearest: 2.weight)" in caught.value.came
    assert "prunable and not in the mask: 0.weight (2, 1, 3, 3) (nearest: 2.weigh); 2.weight (3, 4) (nearest: 2.weigh)" in caught.value.came


def test_of_many_entries_each_is_named():
    with pytest.raises(MaskError) as caught:
        Mask({f"layers.{i}.weight": torch.ones(3, 4) for i in range(30)}).check(net())
    assert "layers.0.weight (3, 4) (nearest: 2.weight, 0.weight, 1.weight); layers.1.weight (3, 4) (nearest: " in caught.value.came
    assert all(f"layers.{i}.weight" in caught.value.came for i in range(30))


def test_a_mask_may_leave_layers_out():
    model = net()
    assert list(Mask({"2.weight": torch.ones(3, 4)}).check(model)) == ["2.weight"]
    with pytest.raises(MaskError, match=r"not in the model: weigh \(1,\) \(nearest: weight\)\. Allowed"):  # this one has no prunable weight
        Mask({"weigh": torch.ones(1)}).check(nn.BatchNorm2d(2))


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_apply_zeroes_what_is_pruned_and_nothing_else(seed):
    model = net()
    before = copy.deepcopy(model.state_dict())
    mask = Mask({"0.weight": torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.5, "2.weight": torch.eye(3, 4)})
    mask.apply(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, torch.where(mask[name], before[name], 0) if name in mask else before[name])


def test_apply_zeroes_infinities_too():
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, float("inf"))
    Mask({"weight": torch.tensor([[1, 0]])}).apply(model)
    assert model.weight.tolist() == [[float("inf"), 0.0]]


def test_a_mask_that_does_not_fit_changes_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MaskError):
        Mask({"0.weight": torch.zeros(2, 1, 3, 3), "9.weight": torch.zeros(1)}).apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
