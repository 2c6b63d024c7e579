"""Models: sizes as published, shapes for every image size, weights that depend on the seed alone."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from anymask.errors import SettingError, UnknownName
from anymask.models import FORMS, MODELS, build

# For 10 classes of 32x32x3. ResNet-18/34/50, VGG and MobileNets: the tables of kuangliu/pytorch-cifar and its users;
# resnetN: He et al. 2015, table 6 (0.27M, 0.46M, 0.66M, 0.85M, 1.7M), to the digit from akamaster/pytorch_resnet_cifar10.
PUBLISHED = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "vgg11": 9_231_114,
    "vgg13": 9_416_010,
    "vgg16": 14_728_266,
    "vgg19": 20_040_522,
    "mobilenet": 3_217_226,
    "mobilenetv2": 2_296_922,
}

# Height of the map after the stem (where there is one) and after each stage: at 32 pixels, as the papers' CIFAR forms have it.
MAPS = {
    "resnet18": (32, 32, 16, 8, 4),
    "resnet50": (32, 32, 16, 8, 4),
    "resnet104": (32, 32, 16, 8),
    "vgg19": (32, 16, 8, 4, 2),
    "mobilenet": (32, 32, 16, 8, 4, 2),
    "mobilenetv2": (32, 32, 32, 16, 8, 8, 4, 4),
    "demonet": (16, 8, 4, 2),
}

THIN = (
    "demonet",
    "resnet18-0.25x",
    "resnet50-0.25x",
    "resnet20-0.5x",
    "vgg11-0.25x",
    "vgg19-0.25x",
    "mobilenet-0.25x",
    "mobilenetv2-0.25x",
)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_is_the_published_one(name: str) -> None:
    model = build(name, classes=10)
    # The published VGGs give each convolution a bias, which the batch norm behind it cancels; ours have none (as in GraSP).
    biases = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) if name.startswith("vgg") else 0
    assert size(model) + biases == PUBLISHED[name]


def he_size(n: int, *, widths: list[int], channels: int, classes: int) -> int:
    """ResNet-(6n+2) with shortcuts without parameters, counted by hand."""
    a, b, c = widths
    convolutions = channels * a + 2 * n * a * a + a * b + (2 * n - 1) * b * b + b * c + (2 * n - 1) * c * c
    norms = 2 * ((2 * n + 1) * a + 2 * n * b + 2 * n * c)
    return 9 * convolutions + norms + (c + 1) * classes


@settings(max_examples=15)
@given(n=st.integers(1, 17), width=st.sampled_from([0.25, 0.5, 1, 1.5, 2]), channels=st.sampled_from([1, 3]), classes=st.integers(1, 100))
def test_resnet_n_has_n_layers_and_the_size_of_the_formula(n: int, width: float, channels: int, classes: int) -> None:
    model = build(f"resnet{6 * n + 2}-{width}x", classes=classes, channels=channels)
    if 6 * n + 2 != 50:  # resnet50 is the ImageNet form
        assert len(layers(model)) == 6 * n + 2
        assert size(model) == he_size(n, widths=[round(w * width) for w in (16, 32, 64)], channels=channels, classes=classes)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "vgg11", "vgg13", "vgg16", "vgg19"])
def test_the_number_in_the_name_counts_the_layers_off_the_shortcuts(name: str) -> None:
    model = build(name, classes=10)
    shortcuts = [m for n, m in model.named_modules() if "shortcut" in n and isinstance(m, nn.Conv2d)]
    left_out = 2 if name.startswith("vgg") else 0  # one linear layer where VGG has three
    assert len(layers(model)) - len(shortcuts) + left_out == int(name.removeprefix("resnet").removeprefix("vgg"))


@pytest.mark.parametrize("name", MAPS)
def test_full_model_halves_its_maps_where_the_paper_does(name: str) -> None:
    model = build(name, classes=7).eval()
    heights: list[int] = []
    for part, module in model.named_children():
        if part == "stem" or part.startswith("layer"):
            module.register_forward_hook(lambda _m, _x, y: heights.append(y.shape[-1]))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert tuple(heights) == MAPS[name]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pixels", [28, 32, 64])
@pytest.mark.parametrize("name", THIN)
def test_every_image_size_trains_and_reaches_every_parameter(name: str, pixels: int, channels: int) -> None:
    model = build(name, classes=5, channels=channels, seed=0)
    out = model(torch.randn(4, channels, pixels, pixels, generator=torch.Generator().manual_seed(1)))
    assert out.shape == (4, 5)
    F.cross_entropy(out, torch.tensor([0, 1, 2, 3])).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", THIN)
def test_one_image_is_enough_in_train_mode_at_28_pixels(name: str) -> None:
    assert build(name, classes=3)(torch.randn(1, 3, 28, 28)).isfinite().all()


@pytest.mark.parametrize("name", THIN)
def test_activations_are_modules_used_once_and_not_in_place(name: str) -> None:
    model = build(name, classes=3).eval()
    activations = [m for m in model.modules() if isinstance(m, nn.ReLU | nn.ReLU6)]
    calls: list[nn.Module] = []
    for m in activations:
        m.register_forward_hook(lambda module, _x, _y: calls.append(module))
    model(torch.randn(1, 3, 32, 32))
    assert len(calls) == len(set(calls)) == len(activations) > 0
    assert not any(m.inplace for m in activations)


@pytest.mark.parametrize("name", THIN)
def test_convolutions_before_a_norm_have_no_bias(name: str) -> None:
    model = build(name, classes=3)
    assert all((m.bias is None) == isinstance(m, nn.Conv2d) for m in layers(model))


# -- weights -------------------------------------------------------------------------------------------------------
def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["demonet", "mobilenetv2-0.25x"])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    first = build(name, classes=10, seed=3)
    torch.manual_seed(2)
    assert same(first, build(name, classes=10, seed=3))
    other = build(name, classes=10, seed=4)
    weights = zip(layers(first), layers(other), strict=True)
    assert not any(torch.equal(a.weight, b.weight) for a, b in weights)


def test_a_seed_leaves_the_global_random_state_and_none_draws_from_it() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build("resnet20", classes=10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = build("resnet20", classes=10)
    assert not torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert same(drawn, build("resnet20", classes=10))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet"])
def test_convolutions_start_as_kaiming_normal_of_their_own_fan_out(name: str) -> None:
    for conv in build(name, classes=10, seed=0).modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() >= 4000:
            per_input = conv.weight.numel() / conv.in_channels  # weights that one input channel feeds: its fan-out
            assert conv.weight.std().item() == pytest.approx((2 / per_input) ** 0.5, rel=0.06)
            assert conv.weight.mean().item() == pytest.approx(0, abs=0.06 * conv.weight.std().item())


def test_a_model_is_made_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        model = build("resnet20", classes=10, seed=0)
    assert same(model, build("resnet20", classes=10, seed=0))


# -- blocks, written out by hand -----------------------------------------------------------------------------------
def by_hand(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    x = F.conv2d(x, conv.weight, stride=conv.stride, padding=conv.kernel_size[0] // 2, groups=conv.groups)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


@pytest.mark.parametrize("pixels", [7, 8])  # an odd height, as 28 pixels come to, and an even one
def test_resnet20_block_is_the_papers_with_zero_padded_shortcut(pixels: int) -> None:
    block = build("resnet20", classes=10, seed=0).eval().layer2[0]
    x, b = torch.randn(2, 16, pixels, pixels), block.body
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    expected = F.relu(by_hand(b.conv2, b.bn2, F.relu(by_hand(b.conv1, b.bn1, x))) + shortcut)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("name", "stage", "inputs", "act", "end"),
    [("resnet50-0.25x", "layer1", 64, F.relu, F.relu), ("mobilenetv2", "layer2", 24, F.relu6, lambda y: y)],
)
def test_three_layer_blocks_are_the_papers(name: str, stage: str, inputs: int, act: Callable, end: Callable) -> None:
    block = getattr(build(name, classes=10, seed=0).eval(), stage)[1]
    x, b = 5 * torch.randn(2, inputs, 6, 6), block.body  # times 5: some units pass the 6 of ReLU6
    inner = act(by_hand(b.conv2, b.bn2, act(by_hand(b.conv1, b.bn1, x))))
    torch.testing.assert_close(block(x), end(by_hand(b.conv3, b.bn3, inner) + x))


def test_mobilenetv2_has_no_shortcut_at_stride_2() -> None:
    block = build("mobilenetv2", classes=10, seed=0).eval().layer3[0]
    x = torch.randn(2, 24, 6, 6)
    inner = F.relu6(by_hand(block.conv2, block.bn2, F.relu6(by_hand(block.conv1, block.bn1, x))))
    torch.testing.assert_close(block(x), by_hand(block.conv3, block.bn3, inner))


# -- names ---------------------------------------------------------------------------------------------------------
def test_each_name_of_the_table_builds() -> None:
    assert all(layers(build(f"{name}-0.1x", classes=2)) for name in MODELS)
    assert "6n + 2" in FORMS
    assert "-2x" in FORMS


def test_a_factor_multiplies_every_width() -> None:
    widths = [m.out_channels for m in build("resnet18", classes=10).modules() if isinstance(m, nn.Conv2d)]
    for factor in (0.5, 2):
        wide = build(f"resnet18-{factor}x", classes=10)
        assert [m.out_channels for m in wide.modules() if isinstance(m, nn.Conv2d)] == [w * factor for w in widths]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet21", "resnet20 or resnet26"),
        ("resnet2", "resnet8 or resnet14"),
        ("ResNet18", "'resnet18'"),
        ("vgg17", "'vgg1"),
        ("mobilenet2", "'mobilenetv2'"),
        ("resnet20-2", "'resnet20'"),
        ("resnet20-x", "'resnet20'"),
        ("", "choose one of these"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UnknownName) as caught:
        build(name, classes=10)
    assert repr(name) in caught.value.came
    assert hint in caught.value.fix


@pytest.mark.parametrize(
    "wrong", [partial(build, "resnet20-0x", classes=10), partial(build, "vgg11", classes=0), partial(build, "vgg11", classes=9, channels=0)]
)
def test_numbers_out_of_range_are_refused(wrong: partial) -> None:
    with pytest.raises(SettingError):
        wrong()
