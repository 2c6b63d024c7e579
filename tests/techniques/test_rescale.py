"""LRsI: the laws it must keep. Its numbers are held by test_rescale_by_hand.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anymask.errors import MaskError, SettingError, TechniqueError
from anymask.mask import Mask
from anymask.recipe import Recipe
from anymask.techniques import LRsI
from anymask.techniques.rescale import RescaleSettings, rescale

SHORT = RescaleSettings(iterations=4)


def test_iterations_may_be_bounded_in_epochs():
    net, batch = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(8, 4), torch.arange(8) % 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    running = Recipe((LRsI(at_most="1ep"),)).attach(net, optimizer, total_steps=30, steps_per_epoch=3, data=[batch])
    assert ", 3 iterations on" in running.found["lrsi"]


# -- a masked net with convolutions, batch norm, in-place ReLU and dropout ---------------------------------------------


def conv_net(seed=0, *, size=1.0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 4),
    )  # fmt: skip
    with torch.no_grad():
        net[9].weight.mul_(size)
    mask = Mask({name: torch.rand_like(p) < 0.3 for name, p in net.named_parameters() if p.dim() > 1})
    return net, mask


def images(seed, count, *, size=24):
    """Noise with a bright quarter; the class is which quarter."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        y = torch.randint(4, (size,), generator=generator)
        x = torch.randn(size, 1, 8, 8, generator=generator)
        for i, label in enumerate(y.tolist()):
            x[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1.5
        out.append((x, y))
    return out


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def masked_gradient(net, mask, x, y):
    """On batch statistics, without dropout."""
    net.train()[8].eval()
    found = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    named = dict(zip([name for name, _ in net.named_parameters()], found, strict=True))
    return {name: g * mask[name] if name in mask else g for name, g in named.items()}


def total(gradient):
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def look_ahead(net, mask, pairs, eta=0.1):
    """Mean loss on fresh images after one step of length eta along the masked gradient."""
    losses = []
    for (x, y), (x2, y2) in pairs:
        g = masked_gradient(net, mask, x, y)
        moved = {name: (p - eta * g[name] / total(g)).detach() for name, p in net.named_parameters()}
        losses.append(float(F.cross_entropy(torch.func.functional_call(net, moved, (x2,)), y2)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_gradient_far_over_gamma_comes_under_it_on_fresh_batches(seed):
    net, mask = conv_net(seed, size=10.0)
    mask.apply(net)
    fresh = images(99, 6)
    assert min(total(masked_gradient(net, mask, *batch)) for batch in fresh) > 3
    assert rescale(net, images(1, 8), mask=mask, settings=RescaleSettings(iterations=70, lr=0.02)).norms[0] > 3
    assert np.mean([total(masked_gradient(net, mask, *batch)) for batch in fresh]) <= 1.2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_look_ahead_loss_of_held_out_batches_falls(seed):
    net, mask = conv_net(seed)
    mask.apply(net)
    held_out = list(zip(images(50, 4), images(51, 4), strict=True))
    before = look_ahead(net, mask, held_out)
    rescale(net, images(1, 8), mask=mask, settings=RescaleSettings(iterations=60, lr=0.05))
    assert look_ahead(net, mask, held_out) < before - 0.01


def test_pruned_weights_are_exactly_zero_and_kept_ones_only_scaled():
    net, mask = conv_net()
    before = state(net)
    done = rescale(net, images(1, 3), mask=mask, settings=SHORT)
    for name, parameter in net.named_parameters():
        kept = mask[name] if name in mask else torch.ones_like(parameter, dtype=torch.bool)
        assert not parameter[~kept].any()
        assert torch.equal(parameter[kept], before[name][kept] * done.scales[name])
    assert len(set(done.scales.values())) > 3


def test_garbage_under_the_mask_changes_nothing():
    clean, mask = conv_net()
    mask.apply(clean)
    dirty, _ = conv_net()
    with torch.no_grad():
        for name, parameter in mask.check(dirty).items():
            parameter.masked_fill_(~mask[name], 1e4)
    first, second = (rescale(net, images(1, 3), mask=mask, settings=SHORT) for net in (clean, dirty))
    assert first == second
    assert same(state(clean), state(dirty))


def test_the_mask_matters_to_the_scales():
    masked, mask = conv_net()
    mask.apply(masked)
    dense, _ = conv_net()
    mask.apply(dense)
    with_mask, without = rescale(masked, images(1, 3), mask=mask, settings=SHORT), rescale(dense, images(1, 3), settings=SHORT)
    assert with_mask.norms[0] < without.norms[0]  # pruned weights have a gradient, which must not count
    assert with_mask.scales != without.scales


@pytest.mark.parametrize("gamma", [1e-3, 100.0])
def test_objects_names_buffers_modes_generators_and_grads_are_as_before(gamma):
    net, mask = conv_net()
    net.train()
    net[4].eval()
    net[9].weight.grad = torch.ones_like(net[9].weight)
    parameters, buffers = dict(net.named_parameters()), {name: (b, b.clone()) for name, b in net.named_buffers()}
    modes, generator = [m.training for m in net.modules()], torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images(1, 1, size=60)[0]), batch_size=20, shuffle=True)
    with torch.no_grad():
        rescale(net, loader, mask=mask, settings=replace(SHORT, gamma=gamma))
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in net.modules()] == modes
    assert list(dict(net.named_parameters())) == list(parameters)
    assert all(p is parameters[name] and p.is_leaf and p.requires_grad for name, p in net.named_parameters())
    assert all(b is buffers[name][0] and torch.equal(b, buffers[name][1]) for name, b in net.named_buffers())
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["9.weight"]
    assert torch.equal(net[9].weight.grad, torch.ones_like(net[9].weight))


def test_equal_batches_give_equal_scales_whatever_the_seed_and_mode():
    first, mask = conv_net()
    second, _ = conv_net()
    second.eval()
    torch.manual_seed(1)
    a = rescale(first, images(1, 3), mask=mask, settings=SHORT)
    torch.manual_seed(2)
    assert rescale(second, images(1, 3), mask=mask, settings=SHORT) == a
    assert rescale(conv_net()[0], images(2, 3), mask=mask, settings=SHORT) != a


def test_a_shuffling_loader_is_repeated_by_the_seed():
    data = torch.utils.data.TensorDataset(*images(1, 1, size=60)[0])
    results = []
    for seed in (5, 5, 6):
        net, mask = conv_net()
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(data, batch_size=20, shuffle=True)
        results.append(rescale(net, loader, mask=mask, settings=SHORT))
    assert results[0] == results[1] != results[2]


def test_scales_stop_at_their_lower_bounds():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    batches = [(torch.randn(16, 4), torch.randn(16, 3) * 1e-3) for _ in range(2)]  # the best net is all zeros
    settings = RescaleSettings(iterations=60, lr=0.2, gamma=1e-9, min_weight_scale=0.25, min_bias_scale=0.125)
    done = rescale(net, batches, loss=F.mse_loss, settings=settings)
    assert done.scales["0.weight"] == 0.25
    assert done.scales["1.bias"] == 0.125
    assert all(scale >= (0.125 if "bias" in name else 0.25) for name, scale in done.scales.items())


def test_zero_biases_keep_their_scale_and_stay_zero():
    net, mask = conv_net()
    done = rescale(net, images(1, 3), mask=mask, settings=SHORT)
    assert done.scales["1.bias"] == 1.0
    assert not net[1].bias.any()


def test_frozen_parameters_are_not_scaled_but_pruned():
    results = []
    for garbage in (0.0, 1e4):
        net, mask = conv_net()
        net[0].weight.requires_grad_(False).masked_fill_(~mask["0.weight"], garbage)
        before = net[0].weight * mask["0.weight"]
        results.append(rescale(net, images(1, 3), mask=mask, settings=SHORT))
        assert "0.weight" not in results[0].scales
        assert torch.equal(net[0].weight, before)
    assert results[0] == results[1]


class Tied(nn.Module):
    """Two linear layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("names", [["one.weight"], ["two.weight"], ["one.weight", "two.weight"]])
def test_tied_weights_are_scaled_once_and_masked_under_any_of_their_names(names):
    torch.manual_seed(0)
    net, clean = Tied(), Tied()
    masks = {name: torch.rand(4, 4) < 0.8 for name in names}
    kept = torch.stack(list(masks.values())).all(0)
    with torch.no_grad():
        clean.load_state_dict(net.state_dict())
        clean.one.weight.mul_(kept)
        net.one.weight.masked_fill_(~kept, 1e4)
    batches = [(torch.randn(8, 4), torch.randint(4, (8,))) for _ in range(2)]
    expected = rescale(clean, batches, mask=Mask({"one.weight": kept}), settings=SHORT)
    assert rescale(net, batches, mask=Mask(masks), settings=SHORT) == expected
    assert list(expected.scales) == ["one.weight", "two.bias"]
    assert net.two.weight is net.one.weight
    assert same(state(net), state(clean))


def test_scales_of_a_bfloat16_net_are_finer_than_bfloat16():
    torch.manual_seed(0)
    net = nn.Linear(4, 3).bfloat16()
    done = rescale(net, [(torch.randn(8, 4).bfloat16(), torch.randint(3, (8,))) for _ in range(2)], settings=replace(SHORT, iterations=1))
    assert all(abs(abs(scale - 1) - 0.01) < 1e-5 for scale in done.scales.values())
    assert net.weight.dtype is torch.bfloat16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def test_attention_has_the_second_derivative_of_the_norm():
    torch.manual_seed(0)
    batches = [(torch.randn(6, 3, 8), torch.randint(3, (6,))) for _ in range(2)]
    assert len(rescale(Attention(), batches, settings=replace(SHORT, gamma=1e-3)).norms) == 4


# -- batches -----------------------------------------------------------------------------------------------------------


def seen_batches(batches, **changes):
    """The image numbers that the model saw, one list a pass: B1 and B2 of each iteration in turn."""
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append([round(v) for v in x[:, 0].tolist()])
            return super().forward(x / 100)

    torch.manual_seed(0)
    rescale(Spy(1, 2), batches, settings=RescaleSettings(iterations=3, gamma=float("inf"), **changes))
    return seen


def numbered(*sizes):
    x = torch.arange(float(sum(sizes)))[:, None]
    return [(part, (part[:, 0] % 2).long()) for part in x.split(list(sizes))]


def test_half_of_the_look_ahead_images_are_the_gradients_and_half_the_next_batchs():
    assert seen_batches(numbered(4, 4)) == [[0, 1, 2, 3], [0, 1, 4, 5], [4, 5, 6, 7], [4, 5, 0, 1], [0, 1, 2, 3], [0, 1, 4, 5]]


@pytest.mark.parametrize(("overlap", "ahead"), [(0.0, [4, 5, 6, 7]), (0.25, [0, 4, 5, 6]), (1.0, [0, 1, 2, 3])])
def test_overlap_is_the_share_of_images_seen_twice(overlap, ahead):
    assert seen_batches(numbered(4, 4), overlap=overlap)[1] == ahead


def test_batches_of_unequal_size_share_what_there_is():
    assert seen_batches(numbered(4, 2))[:4] == [[0, 1, 2, 3], [0, 1, 4, 5], [4, 5], [4, 0]]


def test_a_lone_batch_is_cut_in_two():
    assert seen_batches(numbered(8))[:4] == [[0, 1, 2, 3], [0, 1, 4, 5], [4, 5, 6, 7], [4, 5, 0, 1]]


def test_an_iterator_serves_as_far_as_it_goes():
    assert seen_batches(iter(numbered(2, 2, 2, 2))) == seen_batches(numbered(2, 2, 2, 2))


# -- refusals leave the model as it was --------------------------------------------------------------------------------


def bad_images(*, nan):
    batches = images(1, 3)
    if nan is not None:
        batches[nan][0][0, 0, 0, 0] = math.nan
    return batches


REFUSED = {
    "nothing": (lambda: [], {}, "no batches"),
    "an iterator too short": (lambda: iter(images(1, 3)), {"iterations": 9}, "none left"),
    "nan at once": (lambda: bad_images(nan=0), {}, "loss nan"),
    "nan in the middle": (lambda: bad_images(nan=2), {}, "loss nan"),
    "nan in the last look-ahead": (lambda: bad_images(nan=1), {"iterations": 1, "gamma": 100.0}, "scale that is not finite"),
    "a norm beyond float": (lambda: [(x * 1e38, y) for x, y in images(1, 3)], {}, "rescaling came to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_have_three_parts_and_change_nothing(case):
    batches, changes, text = REFUSED[case]
    net, mask = conv_net()
    before, modes = state(net), [m.training for m in net.modules()]
    with pytest.raises(TechniqueError, match=text) as caught:
        rescale(net, batches(), mask=mask, settings=replace(SHORT, **changes))
    assert caught.value.allowed
    assert caught.value.fix
    assert same(state(net), before)
    assert [m.training for m in net.modules()] == modes


def test_a_model_without_free_parameters_is_refused():
    with pytest.raises(TechniqueError, match="no parameter that requires a gradient"):
        rescale(nn.Flatten(), images(1, 2))
    net, mask = conv_net()
    with pytest.raises(TechniqueError, match="no parameter that requires a gradient"):
        rescale(net.requires_grad_(False), images(1, 2), mask=mask)


def test_a_net_with_no_weight_left_is_refused():
    net, mask = conv_net()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name not in mask:
                parameter.zero_()
    with pytest.raises(TechniqueError, match="no scale moved"):
        rescale(net, images(1, 2), mask=Mask({name: torch.zeros_like(kept) for name, kept in mask.items()}), settings=SHORT)


def test_a_mask_of_another_model_is_refused():
    with pytest.raises(MaskError, match="does not fit"):
        rescale(nn.Linear(2, 2), [], mask=conv_net()[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", 0), ("iterations", 1.5), ("eta", 0.0), ("eta", math.inf), ("lr", -1.0), ("lr", math.nan), ("clip", 0.0),
        ("gamma", 0.0), ("gamma", math.nan), ("gamma", "1"), ("min_weight_scale", -0.1), ("min_bias_scale", 1.1), ("overlap", 1.1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(SettingError, match=f"{name} came as") as caught:
        RescaleSettings(**{name: value})
    assert caught.value.allowed
    assert caught.value.fix


def test_settings_default_to_the_authors():
    assert (RescaleSettings(), RescaleSettings(gamma=math.inf).gamma) == (
        RescaleSettings(180, 0.1, 1.0, 1e-2, 0.01, 0.0, 1.0, 0.5),
        math.inf,
    )
