"""Looking into models changes nothing and misses no change."""

import pytest
import torch
from torch import nn

from anymask.surgery import Cost, evaluating, fingerprint, samples

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


def test_costs_add_up():
    assert sum([Cost(1, 2), Cost(3, 4)], Cost()) == Cost(4, 6)


def test_samples_are_counted_where_they_lie_outermost():
    state, x = (torch.zeros(1, 16, 8), torch.zeros(1, 16, 8)), torch.zeros(16, 5)  # of an LSTM: (layers, N, features)
    assert samples((state, x)) == samples({"state": state, "x": x}) == 16
    assert samples({"views": (x, x)}) == 16
