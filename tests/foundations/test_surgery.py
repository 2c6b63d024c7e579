"""Looking into models changes nothing and misses no change."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from anymask.surgery import Cost, cost, evaluating, fingerprint, trace

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(channels_in=3, channels_out=3, **kwargs):
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **kwargs)


def net():
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential(conv(), nn.BatchNorm2d(3)), nn.Dropout(0.5), nn.Flatten(), nn.Linear(192, 2)
    )
    model[3].eval()  # a mixture of modes, as in fine-tuning
    return model


class Flow(nn.Module):
    """Modules a, b, c ... with a forward given as text."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.code = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return eval(self.code, {"torch": torch, "x": x}, dict(self._modules))


# -- fingerprint -------------------------------------------------------------------------------------------------------


def forward_hook(model):
    model[2].register_forward_hook(lambda *_: None)


def pre_hook(model):
    model.register_forward_pre_hook(lambda *_: None)


def backward_hook(model):
    model[0].register_full_backward_hook(lambda *_: None)


def state_dict_hook(model):
    model.register_load_state_dict_post_hook(lambda *_: None)


def replaced_module(model):
    model[2] = nn.ReLU()


def other_type(model):
    model[2].__class__ = nn.ReLU6


def added_module(model):
    model[3].append(nn.Identity())


def removed_module(model):
    del model[4]


def renamed_module(model):
    model[3].conv = model[3]._modules.pop("0")


def replaced_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def renamed_parameter(model):
    model[0]._parameters["weight_orig"] = model[0]._parameters.pop("weight")


def added_parameter(model):
    model.scale = nn.Parameter(torch.ones(1))


def frozen_parameter(model):
    model[0].weight.requires_grad_(False)


def another_dtype(model):
    model[0].weight.data = model[0].weight.data.double()


def extra_buffer(model):
    model[1].register_buffer("seen", torch.zeros(1))


def reshaped_buffer(model):
    model[1].running_mean = torch.zeros(4)


def in_place_flag(model):
    model[2].inplace = True


def patched_forward(model):
    model[2].forward = lambda x: x


def left_behind_attribute(model):
    model._mark = "x"


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model[0])


CHANGES = [
    *(forward_hook, pre_hook, backward_hook, state_dict_hook, replaced_module, other_type, added_module, removed_module, renamed_module),
    *(replaced_parameter, renamed_parameter, added_parameter, frozen_parameter, another_dtype, extra_buffer, reshaped_buffer),
    *(in_place_flag, patched_forward, left_behind_attribute, parametrised),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_fingerprint_sees_each_kind_of_change(change):
    model = net()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_the_fingerprint_is_the_same_after_training_and_in_any_mode():
    model = net()
    before = fingerprint(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IMAGES).sum().backward()
    optimizer.step()
    handle = model.register_forward_hook(lambda *_: None)
    handle.remove()
    assert fingerprint(model.eval()) == before


# -- evaluating and trace ----------------------------------------------------------------------------------------------


def state(model):
    modes = [module.training for module in model.modules()]
    return modes, fingerprint(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()


def assert_same_state(model, before):
    after = state(model)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][name], value) for name, value in before[2].items())
    assert torch.equal(after[3], before[3])


def test_trace_gives_every_leaf_call_in_order_and_leaves_state_alone():
    model = net()
    before = state(model)
    calls = trace(model, IMAGES)
    assert_same_state(model, before)
    assert [call.name for call in calls] == ["0", "1", "2", "3.0", "3.1", "4", "5", "6"]
    assert calls[0].input is IMAGES
    assert all(later.input is earlier.output for earlier, later in pairwise(calls))
    assert not any(call.output.requires_grad for call in calls)


def test_an_error_inside_the_model_leaves_state_alone():
    model = net()
    before = state(model)
    with pytest.raises(RuntimeError):
        trace(model, torch.ones(2, 3, 5, 5))
    assert_same_state(model, before)


def test_evaluating_brings_back_each_mode_after_an_error():
    model = net()
    before = [module.training for module in model.modules()]

    def fail():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == before


# -- cost --------------------------------------------------------------------------------------------------------------


def test_cost_by_hand():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 9, 10))
    parameters = 6 * 2 * 9 + 6 + 2 * 6 + 54 * 10 + 10
    flops = 2 * (6 * 9) * (2 * 9) + 2 * 54 * 10  # outputs x weights that each output takes; 8 pixels give 3
    for samples in (1, 2, 5):
        assert cost(model, torch.ones(samples, 4, 8, 8)) == Cost(parameters, flops)


def test_transposed_convolutions_cost_what_each_input_gives():
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)  # 5 pixels become 10
    flops = 2 * (4 * 5 * 5) * (3 * 3 * 3)  # inputs x weights that each input meets: the 3 outputs of its group, 3 x 3 places
    assert cost(layer, torch.ones(2, 4, 5, 5)) == Cost(4 * 3 * 9 + 6, flops)
    prune.identity(layer, "weight")  # the weight is no parameter then
    assert cost(layer, torch.ones(2, 4, 5, 5)).flops == flops


TURNED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"padding": 1}, {"groups": 2}, {"dilation": 2, "bias": False}], ids=str)
@pytest.mark.parametrize("dimensions", TURNED)
def test_transposed_convolutions_cost_what_torch_counts(dimensions, settings):
    layer, x = TURNED[dimensions](4, 6, 3, **settings), torch.rand(3, 4, *(5, 4, 3)[:dimensions])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert 3 * cost(layer, x).flops == counter.get_total_flops() > 0


def test_an_encoder_and_its_mirror_image_cost_the_same():
    down, up = nn.Conv2d(4, 6, 2, stride=2, bias=False), nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False)
    assert cost(down, torch.ones(1, 4, 8, 8)) == cost(up, torch.ones(1, 6, 4, 4)) == Cost(96, 2 * 16 * 96)


def test_the_conv1d_of_transformers_costs_what_the_linear_layer_does():
    utils = pytest.importorskip("transformers.pytorch_utils")
    x = torch.rand(2, 7, 5)
    assert cost(utils.Conv1D(3, 5), x) == cost(nn.Linear(5, 3), x) == Cost(18, 2 * 7 * 15)


def test_a_norm_costs_its_parameters_alone():
    assert cost(nn.BatchNorm2d(3), IMAGES) == Cost(6, 0)


def test_a_shared_layer_costs_its_parameters_once_and_its_work_each_time():
    assert cost(Flow("a(a(x))", a=nn.Linear(8, 8, bias=False)), torch.ones(3, 8)) == Cost(64, 2 * 2 * 64)


def test_costs_add_up():
    assert sum([Cost(1, 2), Cost(3, 4)], Cost()) == Cost(4, 6)


def test_cost_is_per_sample_whatever_the_inputs_are_called():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, image, other=None):
            return self.fc(input=image)

    x = torch.rand(4, 6)
    for example in (x, (x, None), {"image": x, "other": None}):
        assert cost(Named(), example) == Cost(35, 60)
