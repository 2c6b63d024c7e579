"""Units are found by how data flows: whatever the layers are called, in either order and in every layout."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from anymask.dataflow import shapes, units
from anymask.surgery import fingerprint
from tests.foundations.test_surgery import IMAGES, Flow, conv, net


def found(forward, **modules):
    names = {module: name for name, module in modules.items()}
    every = [(unit, unit.exit if unit.entry is unit.layer else unit.entry) for unit in units(Flow(forward, **modules), IMAGES)]
    return [(names[unit.layer], names[norm], unit.stem) for unit, norm in every]


def test_a_unit_is_a_convolution_and_its_norm_whatever_they_are_called():
    assert found("b(a(x))", b=nn.BatchNorm2d(3), a=conv()) == [("a", "b", True)]
    assert found("b(a(x))", a=conv(3, 4), b=nn.GroupNorm(2, 4)) == [("a", "b", True)]


def test_units_come_in_the_order_of_the_data_and_the_stem_is_flagged():
    modules = {"d": nn.BatchNorm2d(3), "c": conv(), "b": nn.BatchNorm2d(3), "a": conv()}
    assert found("d(c(b(a(x)).relu()))", **modules) == [("a", "b", True), ("c", "d", False)]


def test_shapes_are_those_of_the_unit():
    (unit,) = units(Flow("b(a(x))", a=nn.Conv2d(3, 5, 3, stride=2), b=nn.BatchNorm2d(5)), IMAGES)
    assert (unit.input_shape, unit.output_shape) == ((2, 3, 8, 8), (2, 5, 3, 3))


def test_pre_activation_order_has_units_where_no_norm_follows():
    modules = {"n": nn.BatchNorm2d(3), "a": conv(), "m": nn.BatchNorm2d(3), "b": conv()}
    assert found("b(m(a(n(x))))", **modules) == [("a", "m", False)]  # m goes with a; b and n are left
    assert found("a(n(x))", n=nn.BatchNorm2d(3), a=conv()) == [("a", "n", True)]
    assert found("a(r(n(x)))", n=nn.BatchNorm2d(3), a=conv(), r=nn.ReLU()) == [("a", "n", True)]
    assert found("a(r(n(x)))", n=nn.BatchNorm2d(3), a=conv(), r=nn.ReLU(inplace=True)) == [("a", "n", True)]


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_in_between_is_no_unit(inplace):
    assert found("b(r(a(x)))", a=conv(), r=nn.ReLU(inplace=inplace), b=nn.BatchNorm2d(3)) == []
    assert found("r(b(a(x)))", a=conv(), r=nn.ReLU(inplace=inplace), b=nn.BatchNorm2d(3)) == [("a", "b", True)]


def test_a_convolution_whose_output_two_modules_use_is_no_unit():
    assert found("b(y) + c(y) if (y := a(x)) is not None else x", a=conv(), b=nn.BatchNorm2d(3), c=nn.BatchNorm2d(3)) == []
    assert found("b(y) * g(y) if (y := a(x)) is not None else x", a=conv(), b=nn.BatchNorm2d(3), g=nn.Sigmoid()) == []


def test_two_convolutions_on_one_input_are_two_units():
    modules = {"a": conv(), "n": nn.BatchNorm2d(3), "b": conv(), "m": nn.BatchNorm2d(3)}
    assert found("n(a(x)) + m(b(x))", **modules) == [("a", "n", True), ("b", "m", True)]


def test_modules_that_are_called_twice_are_units_where_each_call_is_followed_by_its_norm():
    assert found("b(a(b(a(x))))", a=conv(), b=nn.BatchNorm2d(3)) == [("a", "b", True)]
    assert found("c(a(b(a(x))))", a=conv(), b=nn.BatchNorm2d(3), c=nn.BatchNorm2d(3)) == []
    assert found("n(b(n(a(x))))", a=conv(), b=conv(), n=nn.BatchNorm2d(3)) == []
    shared = conv()
    assert found("m(b(n(a(x))))", a=shared, b=shared, n=nn.BatchNorm2d(3), m=nn.BatchNorm2d(3)) == []


KINDS = {
    "conv + norm": ("b(a(x))", {"a": nn.ConvTranspose2d(3, 3, 1), "b": nn.BatchNorm2d(3)}, (1, 1)),
    "depthwise": ("b(a(x))", {"a": conv(groups=3), "b": nn.InstanceNorm2d(3)}, (1, 1)),
    "linear + norm": ("b(a(x))", {"a": nn.Linear(8, 8), "b": nn.LayerNorm(8)}, (-1, -1)),
    "norm + linear": ("a(torch.relu(b(x)))", {"a": nn.Linear(8, 5), "b": nn.LayerNorm(8)}, (-1, -1)),
    "channels last": ("b(a(x).permute(0, 2, 3, 1))", {"a": conv(3, 5), "b": nn.LayerNorm(5)}, (1, -1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_is_a_unit_whose_channels_are_known(kind):
    forward, modules, dims = KINDS[kind]
    (unit,) = units(Flow(forward, **modules), IMAGES)
    assert (unit.entry_dim, unit.exit_dim) == dims
    if kind in {"conv + norm", "linear + norm", "norm + linear"}:
        assert unit.kind == kind


def test_space_that_grows_is_no_unit():
    assert found("b(a(x))", a=nn.ConvTranspose2d(3, 3, 2, stride=2), b=nn.BatchNorm2d(3)) == []


def test_inputs_may_be_keywords_or_several_and_are_the_stem():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(3)

        def forward(self, image, other=None):
            return self.norm(input=self.conv(input=image))

    for example in (IMAGES, (IMAGES, IMAGES), {"image": IMAGES, "other": None}):
        (unit,) = units(Two(), example)
        assert unit.stem


def state(model):
    modes = [module.training for module in model.modules()]
    return modes, fingerprint(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()


@pytest.mark.parametrize("example", [IMAGES, torch.ones(2, 3, 5, 5)], ids=["whole", "failing"])
def test_looking_changes_nothing(example):
    model = net()
    before = state(model)
    with pytest.raises(RuntimeError) if example is not IMAGES else nullcontext():
        units(model, example)
    after = state(model)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][name], value) for name, value in before[2].items())
    assert torch.equal(after[3], before[3])


def test_the_shape_of_an_input_is_what_the_layer_takes_after_hooks_of_the_users():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8))
    net[1].register_forward_pre_hook(lambda _, args: (args[0].flatten(2).transpose(1, 2),))
    found = shapes(net, torch.ones(2, 3, 4, 4))
    assert [found[id(layer)] for layer in net] == [(2, 3, 4, 4), (2, 16, 8)]
