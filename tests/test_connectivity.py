"""What a mask leaves of a network, against a graph that is searched by hand."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from anymask import Mask, models, prunable
from anymask.connectivity import PRODUCTS, RULES, reachable, structure
from anymask.errors import MaskError, SettingError
from anymask.models.blocks import Conv, basic, inverted, pad, plain, stack
from anymask.surgery import fingerprint
from tests.graphs import Graph

IMAGE = torch.zeros(2, 2, 5, 5)


def full(model, **instead):
    """Everything kept, but for what is given: name with _ for . -> what is pruned."""
    kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}
    for name, pruned in instead.items():
        for place in pruned:
            kept[name.replace("_", ".")][place] = False
    return Mask(kept)


# -- networks, each with its graph written out -------------------------------------------------------------------------


class Functional(nn.Module):
    """Pools, norms and activations as functions, and changes in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 3, 2, padding=1), nn.Linear(3, 2)

    def forward(self, x):
        x = F.relu(F.group_norm(self.a(x), 3), inplace=True)
        y = F.layer_norm(self.b(F.max_pool2d(F.dropout(x, 0.9), 2, ceil_mode=True)), [3, 3])
        y -= 1 * x
        return F.log_softmax(self.c(F.adaptive_max_pool2d(y, 1).flatten(1)), dim=1)

    @staticmethod
    def graph(g, x):
        x = g.conv(x, "a.weight", stride=2, pad=1)
        y = g.add(g.conv(g.pool(x, 2, ceil=True), "b.weight", pad=1), x)
        return g.linear(g.mean(y), "c.weight")


class Dense(nn.Module):
    """Concatenation, grouped and depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(4, 4, 2, groups=2)
        self.c, self.d = nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.cat([x, self.a(x).relu_()], dim=1)
        return self.d(F.silu(self.c(torch.tanh(self.b(x)))).mean((2, 3)))

    @staticmethod
    def graph(g, x):
        x = np.concatenate([x, g.conv(x, "a.weight")])
        return g.linear(g.mean(g.conv(g.conv(x, "b.weight", groups=2), "c.weight", groups=4, pad=1)), "d.weight")


class Recurrent(nn.Module):
    """One weight used three times."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return {"y": [self.b(self.a(self.a(self.a(x).relu()).relu()))]}

    @staticmethod
    def graph(g, x):
        return g.linear(g.linear(g.linear(g.linear(x, "a.weight"), "a.weight"), "a.weight"), "b.weight")


def residual_graph(g, x):
    """Option A: every second pixel, and channels of zeros on each side."""
    body = g.conv(g.conv(x, "0.body.conv1.weight", stride=2, pad=1), "0.body.conv2.weight", pad=1)
    zeros = g.new(1, 3, 3)
    return g.linear(g.mean(g.add(body, np.concatenate([zeros, x[:, ::2, ::2], zeros]))), "3.weight")


def projected_graph(g, x):
    body = g.conv(g.conv(x, "0.body.conv1.weight", stride=2, pad=1), "0.body.conv2.weight", pad=1)
    return g.mean(g.add(body, g.conv(x, "0.shortcut.conv1.weight", stride=2)))


def inverted_graph(g, x):
    body = g.conv(g.conv(x, "body.conv1.weight"), "body.conv2.weight", pad=1, groups=4)
    return g.add(g.conv(body, "body.conv3.weight"), x)


def vgg_graph(g, x):
    x = g.conv(g.pool(g.conv(x, "0.conv1.weight", pad=1), 2, ceil=True), "1.1.conv1.weight", pad=1)
    return g.linear(g.pool(x, 3, pad=1).reshape(-1), "4.weight")


def transposed_graph(g, x):
    return g.conv(g.transposed(x, "0.weight", stride=2, groups=2), "2.weight", stride=3)


def mlp_graph(g, x):
    return g.linear(g.linear(g.linear(x, "0.weight"), "3.weight"), "6.weight")


def mlp():
    first, second = (nn.LayerNorm(4), nn.ReLU()), (nn.BatchNorm1d(4), nn.GELU())
    return nn.Sequential(nn.Linear(3, 4), *first, nn.Linear(4, 4), *second, nn.Linear(4, 2))


HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
NETS = {  # how to make it, its graph, an input
    "mlp": (mlp, mlp_graph, torch.zeros(2, 3)),
    "functional": (Functional, Functional.graph, IMAGE),
    "concatenation": (Dense, Dense.graph, IMAGE),
    "one weight thrice": (Recurrent, Recurrent.graph, torch.zeros(2, 3)),
    "option A": (lambda: nn.Sequential(basic(2, 4, 2, change=pad), *HEAD, nn.Linear(4, 2)), residual_graph, IMAGE),
    "option B": (lambda: nn.Sequential(basic(2, 3, 2), *HEAD), projected_graph, IMAGE),
    "inverted residual": (lambda: inverted(2, 2, 1, expansion=2), inverted_graph, torch.zeros(1, 2, 3, 3)),
    "max-pools": (
        lambda: nn.Sequential(plain(2, 2, 1), plain(2, 2, 2), nn.MaxPool2d(3, padding=1), nn.Flatten(), nn.Linear(2, 2)),
        vgg_graph,
        torch.zeros(1, 2, 3, 3),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2), nn.Softsign(), nn.Conv2d(4, 1, 2, stride=3)),
        transposed_graph,
        torch.zeros(1, 2, 3, 3),
    ),
}


@pytest.mark.parametrize("net", NETS)
@settings(max_examples=15)
@given(st.integers(0, 2**32), st.sampled_from([0.03, 0.1, 0.3, 0.6]))
def test_reachable_weights_are_those_that_a_search_of_the_graph_finds(net, seed, density):
    make, write_out, example = NETS[net]
    model, random = make(), torch.Generator().manual_seed(seed)
    mask = Mask({name: torch.rand(weight.shape, generator=random) < density for name, weight in prunable(model).items()})
    graph = Graph({name: kept.numpy() for name, kept in mask.items()})
    inputs = graph.new(*example.shape[1:])
    expected = graph.used(inputs, write_out(graph, inputs))
    assert reachable(mask, model, example) == Mask({name: torch.from_numpy(used) for name, used in expected.items()})


@pytest.mark.parametrize("name", ["demonet", "resnet20", "vgg11", "mobilenet-0.25x", "mobilenetv2-0.25x", "resnet50-0.25x"])
def test_every_weight_of_a_dense_network_is_reachable(name):
    model = models.build(name, classes=10, channels=1)
    assert reachable(full(model), model, torch.zeros(1, 1, 32, 32)).sparsity == 0


# -- by hand -----------------------------------------------------------------------------------------------------------


def two_layers(between=None):
    return nn.Sequential(nn.Linear(2, 2), between or nn.ReLU(), nn.Linear(2, 1))


def test_a_dead_filter_takes_what_reads_it_along():
    found = reachable(full(two_layers(), **{"0_weight": [1]}), two_layers(), torch.zeros(1, 2))
    assert found["0.weight"].tolist() == [[True, True], [False, False]]
    assert found["2.weight"].tolist() == [[True, False]]


def test_an_orphan_channel_takes_what_makes_it_along():
    found = reachable(full(two_layers(), **{"2_weight": [(0, 1)]}), two_layers(), torch.zeros(1, 2))
    assert found["0.weight"].tolist() == [[True, True], [False, False]]


def test_a_skip_keeps_a_path_that_the_body_has_lost():
    model = nn.Sequential(stack(1, [Conv(2)]), basic(2, 2, 1), *HEAD, nn.Linear(2, 1))
    cut = full(model, **{"1_body_conv1_weight": [slice(None)]})
    found = reachable(cut, model, torch.zeros(1, 1, 4, 4))
    assert found.layer_density() == {"0.conv1.weight": 1, "1.body.conv1.weight": 0, "1.body.conv2.weight": 0, "4.weight": 1}


def test_weights_that_only_see_the_padding_are_not_reachable():
    found = reachable(full(nn.Conv2d(1, 1, 3, padding=1)), nn.Conv2d(1, 1, 3, padding=1), torch.zeros(1, 1, 1, 1))
    assert found["weight"][0, 0].tolist() == [[False] * 3, [False, True, False], [False] * 3]


def test_a_layer_without_weights_cuts_everything():
    model = two_layers()
    assert reachable(full(model, **{"2_weight": [slice(None)]}), model, torch.zeros(1, 2)).kept == 0


ACTIVATIONS = (
    "ReLU ReLU6 Hardtanh LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish Hardswish Tanh Softsign Tanhshrink Softshrink Hardshrink"
)


@pytest.mark.parametrize("between", [*ACTIVATIONS.split(), "Dropout", "Identity"])
@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(2), nn.BatchNorm1d(2), nn.GroupNorm(2, 2), nn.RMSNorm(2)], ids=repr)
def test_activations_and_norms_hand_on_what_they_are_given(between, norm):
    model = two_layers(nn.Sequential(norm, getattr(nn, between)()))
    found = reachable(full(model, **{"0_weight": [1]}), model, torch.zeros(1, 2))
    assert [kept.tolist() for kept in found.values()] == [[[True, True], [False, False]], [[True, False]]]


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid(), nn.LogSigmoid(), nn.Hardsigmoid()], ids=repr)
def test_what_squashes_the_output_cuts_nothing(end):
    model = nn.Sequential(nn.Linear(2, 3), end)
    assert reachable(full(model), model, torch.zeros(1, 2)).sparsity == 0


class Gated(nn.Module):
    """Squeeze and excitation: a gate that is never 0."""

    def __init__(self):
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        x = self.a(x.sub_(8))
        return self.b(x * torch.sigmoid(self.gate(x)))


def test_a_gate_that_is_cut_off_still_lets_the_rest_through():
    found = reachable(full(Gated(), gate_weight=[slice(None)], a_weight=[1]), Gated(), torch.zeros(1, 2))
    assert found.layer_density() == {"a.weight": 0.5, "gate.weight": 0, "b.weight": 0.5}


class Attention(nn.Module):
    """Grouped queries: 4 heads of queries, 2 of keys and values, each 2 wide; the first place of the answer, which sees only itself."""

    def __init__(self, written_out):
        super().__init__()
        self.written_out = written_out
        self.q, self.k, self.v, self.o = nn.Linear(3, 8), nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 1)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.written_out:
            places = torch.arange(x.shape[1])
            later = 1 - (places[:, None] - places[None, :] >= 0).float()
            k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
            found = F.softmax(q @ k.transpose(-2, -1) / 2**0.5 + later * torch.finfo(x.dtype).min, dim=-1) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(found[:, :, 0].flatten(1))


@pytest.mark.parametrize("written_out", [False, True])
def test_attention_needs_its_values_and_not_its_queries(written_out):
    model, x = Attention(written_out), torch.zeros(1, 3, 3)
    assert reachable(full(model), model, x).sparsity == 0
    without_q = reachable(full(model, q_weight=[slice(None)]), model, x)
    assert without_q.layer_density() == {"q.weight": 0, "k.weight": 0, "v.weight": 1, "o.weight": 1}
    without_v = reachable(full(model, v_weight=[slice(None)]), model, x)
    assert without_v.kept == 0


class ByHand(nn.Module):
    """A norm written out: differences, powers, roots and quotients."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        x = self.a(x)
        x = (x - x.amin(-1, keepdim=True)) * torch.tensor([1.0, 3.0])
        x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.b(1 - (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)))


def test_a_norm_written_out_cuts_nothing():
    assert reachable(full(ByHand()), ByHand(), torch.zeros(1, 2)).sparsity == 0


def test_nothing_over_or_underflows_at_any_depth():
    wide = nn.Sequential(*(layer for _ in range(300) for layer in (nn.Linear(64, 64), nn.Tanh())))
    half = Mask({name: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) < 0.5 for name, p in prunable(wide).items()})
    assert reachable(half, wide, torch.zeros(1, 64)) == half
    deep = nn.Sequential(stack(1, [Conv(4)]), *(basic(4, 4, 1) for _ in range(150)))
    assert reachable(full(deep), deep, torch.zeros(1, 1, 4, 4)).sparsity == 0


def test_biases_and_norms_in_a_mask_are_weights_too_and_no_sources():
    model = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    kept["0.weight"][0] = False
    kept["1.weight"][1] = False
    kept["0.bias"][2] = False
    found = reachable(Mask(kept), model, torch.zeros(1, 1))
    assert found["0.weight"].flatten().tolist() == [False, False, True]
    assert found["1.weight"].tolist() == [False, False, True]
    assert found["2.weight"].tolist() == [[False, False, True]]
    assert found["0.bias"].tolist() == [True, False, False]  # its result is used, and it needs no input
    assert found["1.bias"].tolist() == [True, True, True]


def test_a_tied_weight_is_what_all_its_names_keep():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.append(model[0])
    mask = Mask({"0.weight": torch.tensor([[1, 1], [0, 1]]), "2.weight": torch.tensor([[1, 0], [1, 1]])})
    found = reachable(mask, model, torch.zeros(1, 2))
    assert found["0.weight"].tolist() == found["2.weight"].tolist() == [[True, False], [False, True]]


def test_words_go_in_as_they_are():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    assert reachable(full(model), model, torch.tensor([[0, 4]])).sparsity == 0


class Restless(nn.Module):
    """Draws numbers, scales by what is negative, and has a head that only a training uses."""

    def __init__(self):
        super().__init__()
        self.a, self.extra = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor([-1.0, 2.0]))

    def forward(self, x):
        x = self.a(x) * self.scale + torch.rand(2)
        return (x, self.extra(x)) if self.training else x


def test_it_is_the_network_as_it_is_used_that_is_looked_at():
    model, random = Restless(), torch.get_rng_state()
    assert reachable(full(model), model, torch.zeros(1, 2)).layer_density() == {"a.weight": 1, "extra.weight": 0}
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)


# -- what is left alone, and what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_model_mode_gradients_and_random_state_stay_as_they_were(dtype):
    model = models.build("resnet8", classes=3).to(dtype)
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones(3, dtype=dtype)
    before, state, modes = fingerprint(model), copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    mask = Mask(dict(full(model)), info={"method": "mine"})
    with torch.no_grad():
        found = reachable(mask, model, torch.zeros(2, 3, 8, 8, dtype=dtype))
    assert found.info == {"method": "mine"}
    assert fingerprint(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["fc.bias"]
    assert torch.equal(torch.get_rng_state(), random)


def test_a_weight_under_a_live_mask_of_torch_is_followed():
    model = two_layers()
    example, mask = torch.zeros(1, 2), full(model, **{"2_weight": [(0, 0)]})
    live = Mask({"0.weight_orig": mask["0.weight"], "2.weight": mask["2.weight"]})
    prune.identity(model[0], "weight")
    assert [t.tolist() for t in reachable(live, model, example).values()] == [
        t.tolist() for t in reachable(mask, two_layers(), example).values()
    ]


def test_a_mask_that_does_not_fit_is_refused():
    mask = Mask({"0.weight": torch.ones(3, 2), "9.weight": torch.ones(1)})
    for use in (lambda: reachable(mask, two_layers(), torch.zeros(1, 2)), lambda: structure(mask, two_layers())):
        with pytest.raises(MaskError, match=r"not in the model: 9\.weight .*another shape: 0\.weight"):
            use()


def test_an_example_that_does_not_go_through_is_refused():
    with pytest.raises(SettingError, match=r"an input of shape \(1, 3\) does not go through Sequential \(.*\)"):
        reachable(full(two_layers()), two_layers(), torch.zeros(2, 3))


def test_an_output_without_gradients_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Module())
    model[1].forward = lambda x: x.argmax(1)
    with pytest.raises(MaskError, match="gives Tensor, in which nothing has a gradient"):
        reachable(Mask({"0.weight": torch.ones(2, 2)}), model, torch.zeros(1, 2))


def test_every_rule_is_of_a_function_that_torch_has():
    places = (torch, F, torch.Tensor, torch._C._nn)
    assert [name for name in {*RULES, *PRODUCTS} if not any(hasattr(place, name) for place in places)] == []
