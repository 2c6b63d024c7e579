"""Each operation that can be shipped gives what PyTorch gives, in our runtime and rebuilt as a module."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from anymask.errors import SettingError
from anymask.shipping.portable import Gather
from anymask.shipping.rebuild import Rebuilt
from anymask.shipping.runtime import Program, gather_class
from tests.shipping.nets import both, close, plan_of, said, trained_like

MAP, VECTOR = (4, 9, 7), (6,)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Gate(nn.Module):
    """Squeeze and excitation: a product whose one side has one place for each channel."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean([2, 3]))).view(x.size(0), -1, 1, 1)


class Shuffle(nn.Module):
    """Parts of the channels, one put before the other and mixed, as ShuffleNet does."""

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        x = torch.cat([b, a, x[:, 1:3]], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shared(nn.Module):
    """Written into in place, taken twice, and a layer called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.norm(self.conv(x)))
        z = self.conv(y)
        z += y
        z *= 2
        return self.relu(z) - y


OPS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "clamp": Call(lambda x: x.clamp(min=-0.1)),
    "clamp-max": Call(lambda x: x.clamp_max(0.2)),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU(approximate="tanh"),
    "identity": nn.Identity(),
    "dropout": nn.Dropout(),
    "add": Call(lambda x: x + x),
    "numbers": Call(lambda x: (3 - (x * 2 + 1) / 4) - 0.5),
    "sub": Call(lambda x: x - torch.relu(x)),
    "add-scaled": Call(lambda x: torch.add(x, torch.relu(x), alpha=3) + torch.add(x, 2.0, alpha=0.5)),
    "number-first": Call(lambda x: torch.add(torch.arange(4.0)[:, None, None], x, alpha=2)),
    "add-nothing": Call(lambda x: torch.add(x, torch.relu(x), alpha=0) + torch.add(x, 5.0, alpha=0)),
    "no-bounds": nn.Sequential(nn.Hardtanh(-math.inf, math.inf), nn.ReLU()),
    "max-pool": nn.MaxPool2d(2),
    "max-pool-padded": nn.MaxPool2d(3, 2, 1),
    "max-pool-ceil": nn.MaxPool2d(2, ceil_mode=True),
    "max-pool-dilated": nn.MaxPool2d(2, 1, dilation=2),
    "avg-pool": nn.AvgPool2d(3, 2, 1),
    "avg-pool-inside": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg-pool-ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "avg-pool-divisor": nn.AvgPool2d(2, divisor_override=3),
    "subsample": nn.AvgPool2d(1, 2),
    "adaptive-1": nn.AdaptiveAvgPool2d(1),
    "adaptive-2x3": nn.AdaptiveAvgPool2d((2, 3)),
    "adaptive-larger": nn.AdaptiveAvgPool2d((9, 8)),
    "mean": Call(lambda x: x.mean([2, 3])),
    "mean-kept": Call(lambda x: x.mean((-1, -2), keepdim=True)),
    "flatten": nn.Flatten(),
    "view": Call(lambda x: x.view(x.size(0), -1)),
    "squeeze": Call(lambda x: x.mean([2, 3], keepdim=True).squeeze(-1).squeeze(-1)),
    "zero-pad": nn.ZeroPad2d((1, 2, 3, 0)),
    "channel-pad": nn.ZeroPad3d((0, 0, 0, 0, 1, 2)),
    "constant-pad": Call(lambda x: F.pad(x, (1, 1), value=0.5)),
    "cat": Call(lambda x: torch.cat([x, torch.relu(x)], 1)),
    "slice-from-the-end": Call(lambda x: x[:, -3:-1]),
    "slice-from-before": Call(lambda x: x[:, -100:3]),
    "shuffle": Shuffle(),
    "gate": Gate(),
    "norm": nn.BatchNorm2d(4),
    "norm-plain": nn.BatchNorm2d(4, affine=False),
    "norm-before": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)),
    "conv": nn.Conv2d(4, 5, 3, 2, 1),
    "conv-same": nn.Conv2d(4, 5, (4, 3), padding="same"),
    "conv-depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
    "conv-dilated": nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 0), (2, 3), groups=2),
    "shared": Shared(),
}
OF_VECTORS = {
    "linear": nn.Linear(6, 4),
    "linear-no-bias": nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU()),
    "cat": Call(lambda x: torch.cat([x, x * 2], -1)),
    "split": Call(lambda x: torch.split(x, [2, 4], 1)[1]),
    "residual": Call(lambda x: torch.relu(x) + x),
    "norm": nn.BatchNorm1d(6),
}


@pytest.mark.usefixtures("gather")
@both
@pytest.mark.parametrize("name", OPS)
def test_each_operation_of_maps_gives_what_pytorch_gives(name):
    check(trained_like(OPS[name], density=0.5), MAP)


@pytest.mark.usefixtures("gather")
@both
@pytest.mark.parametrize("name", OF_VECTORS)
def test_each_operation_of_vectors_gives_what_pytorch_gives(name):
    check(trained_like(OF_VECTORS[name], density=0.5), VECTOR)


def check(model, shape):
    torch.manual_seed(0)
    plan = plan_of(model, torch.randn(2, *shape))
    program = Program(plan, threads=1)
    for images in (1, 5, 2):
        batch = torch.randn(images, *shape)
        wanted = model(batch)
        assert close(program(batch.numpy()), wanted)
        assert close(Rebuilt(plan)(batch).detach().numpy(), wanted)
    assert program(np.zeros((0, *shape))).shape == (0, *program.output)


# -- what is fused -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.conv, self.norm, self.shortcut = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), shortcut

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + self.shortcut(x))


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), ["Conv+bias+relu"]),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), ["Conv+bias+relu", "Scale"]),
        (Block(nn.Identity()), ["Conv+bias+add+relu"]),
        (Block(nn.Conv2d(4, 4, 1, bias=False)), ["Conv+bias", "Conv+add+relu"]),
        (Block(nn.AvgPool2d(1)), ["AvgPool", "Conv+bias+add+relu"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(4 * 9 * 7, 2)), ["Reshape", "Linear+bias"]),
        (Shared(), ["Conv+bias+relu", "Conv+bias+add", "Scale", "Activation", "Scale", "Add"]),
    ],
)
def test_a_layer_takes_up_norm_sum_and_relu_that_follow_it(model, steps):
    trained_like(model, density=0.5)
    assert sorted(said(plan_of(model, torch.randn(2, *MAP)))) == sorted(steps)
    check(model, MAP)


def test_a_channel_that_its_norm_multiplies_by_0_keeps_no_weight():
    model = trained_like(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), density=1.0)
    with torch.no_grad():
        model[1].weight[:3] = 0
    plan = plan_of(model, torch.randn(2, *MAP))
    assert (plan.kept, plan.total) == (36, 144)
    check(model, MAP)


# -- both convolutions over kept weights -------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_convolution_over_kept_weights_is_the_dense_one_with_zeros(data):
    def number(low, high):
        return data.draw(st.integers(low, high))

    groups, kernel = number(1, 3), (number(1, 4), number(1, 4))
    outputs, inner = groups * number(1, 3), number(1, 3)
    stride, padding, dilation = (tuple(number(low, high) for _ in range(2)) for low, high in ((1, 3), (0, 3), (1, 3)))
    size = [max(1, d * (k - 1) + 1 - 2 * p) + number(0, 5) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    density, images = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), number(1, 20)
    generator = torch.Generator().manual_seed(number(0, 99))
    weight = torch.randn(outputs, inner, *kernel, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < density
    x, bias = torch.randn(images, groups * inner, *size, generator=generator), torch.randn(outputs, generator=generator)
    wanted = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    add, relu = torch.randn(wanted.shape, generator=generator), data.draw(st.booleans())
    wanted = torch.relu(wanted + add) if relu else wanted + add
    kept = np.flatnonzero(weight)
    for kind in {Gather, gather_class()}:
        layer = kind(weight_shape=tuple(weight.shape), kept=kept, stride=stride, padding=padding, dilation=dilation, groups=groups)
        out = np.full((*wanted.shape[1:], images), np.nan, np.float32)
        given_ = [np.ascontiguousarray(t.permute(1, 2, 3, 0).numpy()) for t in (x, add)]
        found = layer.forward(given_[0], weight.numpy().ravel()[kept], bias=bias.numpy(), add=given_[1], relu=relu, out=out)
        assert found is out
        assert np.abs(out - wanted.permute(1, 2, 3, 0).numpy()).max() < 1e-4


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "norm of the batch": (nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), "batch_norm in module '0', a BatchNorm2d"),
    "layer norm": (nn.LayerNorm([9, 7]), "layer_norm"),
    "softmax": (nn.Sequential(nn.Flatten(), nn.Softmax(1)), "softmax in module '1', a Softmax"),
    "linear of maps": (nn.Sequential(nn.Linear(7, 2)), "a vector (7,) is needed"),
    "mean of rows": (Call(lambda x: x.mean(2)), "only that over height and width"),
    "reflections": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "mode 'reflect'"),
    "cat of rows": (Call(lambda x: torch.cat([x, x], 2)), "along another dimension"),
    "the batch": (Call(lambda x: x + x.size(0)), "uses add"),
    "positions": (Call(lambda x: x * torch.arange(7.0)), "one number or one for each channel"),
    "rounded down": (Call(lambda x: torch.div(x, 0.5, rounding_mode="floor")), "a division that is rounded"),
    "no number": (nn.Sequential(nn.ConstantPad2d(1, -math.inf), nn.MaxPool2d(3)), "where finite numbers can be shipped"),
    "divided by less than 0": (Call(lambda x: F.avg_pool2d(x, 2, divisor_override=-3)), "a mean divided by -3"),
    "integers": (Call(lambda x: (x > 0).float()), "uses gt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_that_cannot_be_shipped_is_named_with_its_module(name):
    model, words = REFUSED[name]
    with pytest.raises(SettingError) as caught:
        plan_of(model, torch.randn(2, *MAP))
    assert words in str(caught.value)
    assert "ship to .onnx" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_model_that_cannot_be_exported_or_gives_two_tensors_is_refused():
    with pytest.raises(SettingError, match="cannot be exported"):
        plan_of(Call(lambda x: x if x.sum() > 0 else -x), torch.randn(2, *MAP))
    for odd in (lambda x: torch.relu(x) if x.shape[0] > 4 else -x, lambda x: torch.relu(x) if x.shape[0] < 100 else -x):
        with pytest.raises(SettingError, match="other things for batches of other sizes"):
            plan_of(Call(odd), torch.randn(8, *MAP))
    with pytest.raises(SettingError, match="gives an output that does not depend on its input"):
        plan_of(Call(lambda x: torch.ones(2, 3)), torch.randn(2, *MAP))
    with pytest.raises(SettingError, match="gives 2 tensors"):
        plan_of(Call(lambda x: (x + 1, x + 2)), torch.randn(2, *MAP))
