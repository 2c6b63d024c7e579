"""Refitting pruned networks: the least squares by hand, what stays as it was, and what is refused."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import anymask
from anymask import Mask, data, fit, models, prune, to_sparse
from anymask.errors import MaskError, SettingError, TechniqueError
from anymask.surgery import fingerprint
from anymask.techniques.refitting import Refit, least_squares
from anymask.train import Protocol, accuracy


class Grouped(nn.Module):
    """Plain, strided and dilated, grouped and depthwise convolutions with and without bias, a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, dilation=2, padding=2, padding_mode="circular")
        self.grouped, self.depthwise = nn.Conv2d(8, 8, (1, 3), groups=2), nn.Conv2d(8, 8, 2, groups=8, bias=False)
        self.head, self.drop = nn.Linear(8, 5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.plain(x)).relu()
        x = self.depthwise(self.grouped(self.strided(x).relu()).relu()).relu()
        return self.head(self.drop(x.mean((2, 3))))


def network(seed: int = 0) -> tuple[nn.Module, Mask, Tensor]:
    torch.manual_seed(seed)
    model, x = Grouped(), torch.randn(16, 3, 9, 9)
    model.train()(x)  # statistics of its own
    return model.eval(), prune(model, "magnitude+uniform", sparsity=0.5), x


def by_hand(rows: Tensor, wanted: Tensor, start: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The normal equations of each neuron, solved."""
    found = torch.zeros_like(start)
    for g, neuron in ((g, n) for g in range(start.shape[0]) for n in range(start.shape[1])):
        k = kept[g, neuron].nonzero()[:, 0]
        seen, held = rows[g][:, k], damping * (rows[g] ** 2).mean()
        left = seen.T @ seen / len(seen) + held * torch.eye(len(k), dtype=rows.dtype)
        right = seen.T @ wanted[g][:, neuron] / len(seen) + held * start[g, neuron, k]
        found[g, neuron, k] = torch.linalg.solve(left, right)
    return found


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 9), st.integers(1, 4))  # groups, samples, inputs, neurons


@given(st.integers(0, 2**31), SIZES, st.sampled_from([0.01, 1.0]))
def test_the_weights_are_those_of_the_normal_equations(seed: int, sizes: tuple[int, int, int, int], damping: float) -> None:
    groups, samples, inputs, neurons = sizes
    draws = torch.Generator().manual_seed(seed)
    shape = {"generator": draws, "dtype": torch.float64}
    rows, wanted = torch.randn(groups, samples, inputs, **shape), torch.randn(groups, samples, neurons, **shape)
    kept = torch.rand(groups, neurons, inputs, generator=draws) < 0.6  # a neuron may have nothing left
    start = torch.randn(groups, neurons, inputs, **shape) * kept
    found = least_squares(rows, wanted, start, kept, damping=damping, iterations=60)
    assert not found[~kept].any()
    torch.testing.assert_close(found, by_hand(rows, wanted, start, kept, damping), rtol=1e-6, atol=1e-8)


def test_every_kind_of_layer_explains_its_outputs_better_and_nothing_else_changes() -> None:
    model, mask, x = network()
    dense, print_before, random = copy.deepcopy(model), fingerprint(model), torch.get_rng_state()
    model.head.train()
    done = anymask.reconstruct(model, mask, data=[x, (x.flip(3), torch.zeros(16))])
    assert list(done.unexplained) == ["plain", "strided", "grouped", "depthwise", "head"]
    assert all(after < before for before, after in done.unexplained.values())
    assert not any(p[~mask[n]].any() for n, p in mask.check(model).items())
    assert all(torch.equal(t, dense.state_dict()[n]) for n, t in model.state_dict().items() if n.startswith("norm."))
    assert (fingerprint(model), model.head.training, model.norm.training) == (print_before, True, False)
    assert torch.equal(torch.get_rng_state(), random)


def test_what_can_be_made_up_for_is() -> None:
    """Of two inputs that say the same, one is pruned: the other takes over its weight, and a bias what is left."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    x = torch.randn(200, 1)
    x = torch.cat([x, x, torch.ones(200, 1)], 1)
    whole, before = copy.deepcopy(layer), layer(x)
    mask = Mask({"weight": torch.tensor([[True, False, False]]).expand(4, 3).clone()})
    pruned = copy.deepcopy(layer)
    mask.apply(pruned)
    anymask.reconstruct(layer, mask, data=[x], settings=Refit(damping=1e-6))
    assert (pruned(x) - before).abs().max() > 0.1
    torch.testing.assert_close(layer(x), before, atol=1e-3, rtol=0)
    both = Mask({"weight": mask["weight"], "bias": torch.tensor([True, False, False, False])})
    anymask.reconstruct(whole, both, data=[x])
    assert not whole.bias[1:].any()


def test_a_network_that_was_pruned_is_nearly_what_it_was_without_training() -> None:
    images = data.load("fashion-mnist-5k")
    train = data.Batches(data.Split(images.train.images[:1500], images.train.labels[:1500]), batch_size=100, shuffle=True)
    test = data.Batches(images.test, batch_size=500)
    dense = models.build("demonet-0.5x", classes=10, channels=1, seed=0)
    fit(dense, train, recipe="default", protocol=Protocol(epochs=3, lr=0.05, augment=False))
    model = copy.deepcopy(dense)
    mask = prune(model, "magnitude+erk", sparsity=0.8)
    pruned = copy.deepcopy(model)
    mask.apply(pruned)
    anymask.reconstruct(model, mask, data=train)
    whole, cut, mended = (accuracy(net, test) for net in (dense, pruned, model))
    assert whole > 0.7
    assert mended - cut > 0.5 * (whole - cut)


def test_sparse_layers_stay_sparse() -> None:
    model, mask, x = network()
    wider = Mask({n: kept | (torch.arange(kept.numel()).view(kept.shape) % 3 == 0) for n, kept in mask.items()})
    wider.apply(model)
    twin = to_sparse(copy.deepcopy(model), wider, x)
    kinds = [type(m) for m in twin.modules()]
    anymask.reconstruct(model, mask, data=[x])
    anymask.reconstruct(twin, mask, data=[x])
    assert [type(m) for m in twin.modules()] == kinds
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(anymask.to_dense(twin).state_dict(), model.state_dict(), atol=1e-6, rtol=1e-5)


class Twice(nn.Module):
    """A layer that does more than multiply, one whose bias is computed, one that is called twice, and plain ones; under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.computed, self.twice, self.plain = Scaled(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        torch.nn.utils.prune.identity(self.computed, "bias")
        self.again = self.plain

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.twice(self.twice(self.computed(self.scaled(x)).relu()).relu()))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 0.1, self.bias)


def test_layers_that_are_not_what_they_seem_are_only_pruned() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    mask = Mask({f"{n}.weight": torch.rand(model.get_submodule(n).weight.shape) < 0.6 for n in ("scaled", "computed", "twice", "again")})
    pruned = copy.deepcopy(model.state_dict())
    done = anymask.reconstruct(model, mask, data=[torch.randn(50, 4)])
    assert list(done.unexplained) == ["again"]
    for name in ("scaled", "computed", "twice"):
        assert torch.equal(model.get_submodule(name).weight, pruned[f"{name}.weight"] * mask[f"{name}.weight"]), name
        assert torch.equal(model.get_submodule(name).bias, pruned.get(f"{name}.bias", pruned.get(f"{name}.bias_orig")))


def test_an_encoder_with_padding_is_refitted() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(20, 5, 8), torch.arange(5).expand(20, 5) > 3
    mask = prune(model, "magnitude", sparsity=0.5, exclude=["layers.0.self_attn", "layers.1.self_attn"])
    was = torch.backends.mha.get_fastpath_enabled()
    done = anymask.reconstruct(model, mask, data=[{"src": x, "src_key_padding_mask": padding}])
    assert len(done.unexplained) == 4
    assert torch.backends.mha.get_fastpath_enabled() == was


def test_outputs_that_do_not_vary_have_nothing_to_explain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    mask = prune(model, "magnitude", sparsity=0.5)
    done = anymask.reconstruct(model, mask, data=[torch.randn(1, 4)])  # one sample, drawn again and again
    assert list(done.unexplained.values()) == [(0.0, 0.0)] * 2


class Experts(nn.Module):
    """Sends each sample to one of two layers, by what the first one says of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        to, out = self.gate(x).argmax(1), x.new_zeros(len(x), 3)
        for index, expert in enumerate(self.experts):
            out[to == index] = expert(x[to == index])
        return out


def test_a_layer_that_gets_other_inputs_once_it_is_pruned_is_only_pruned() -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(30, 4)
    gate = torch.tensor([[True, True, True, False], [False, False, False, False]])
    mask = Mask({"gate.weight": gate, "experts.0.weight": torch.eye(3, 4).bool()})
    before = model.experts[0].weight.detach() * mask["experts.0.weight"]
    dense = copy.deepcopy(model)
    done = anymask.reconstruct(model, mask, data=[x])
    sent = [int((net.gate(x).argmax(1) == 0).sum()) for net in (dense, model)]
    assert sent[0] != sent[1]
    assert list(done.unexplained) == ["gate"]
    assert torch.equal(model.experts[0].weight, before)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"data": []}, TechniqueError, "no data"),
        ({"data": torch.zeros(2, 3, 9, 9)}, TechniqueError, r"give \[batch\]"),
        ({"mask": "a.mask"}, MaskError, "mask came as str"),
        (
            {"mask": Mask({"plain.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)})},
            TechniqueError,
            "prunes nothing that is not 0 already",
        ),
        ({"mask": Mask({"norm.weight": torch.ones(8, dtype=torch.bool)})}, TechniqueError, "nothing to refit in Grouped"),
        ({"mask": Mask({"gone.weight": torch.ones(8, dtype=torch.bool)})}, MaskError, "gone.weight"),
        ({"data": [torch.zeros(0, 3, 9, 9)]}, TechniqueError, "no masked layer of Grouped was called"),
        ({"data": [torch.full((2, 3, 9, 9), float("nan"))]}, TechniqueError, "not finite"),
        ({"data": [torch.zeros(2, 4, 9, 9)]}, RuntimeError, "channels"),  # the network's own
    ],
)
def test_what_cannot_be_is_refused_and_the_model_is_as_before(change: dict, error: type[Exception], said: str) -> None:
    model, mask, x = network()
    before, prints = copy.deepcopy(model.state_dict()), fingerprint(model)
    given = {"mask": mask, "data": [x]} | change
    with pytest.raises(error, match=said):
        anymask.reconstruct(model, given.pop("mask"), **given)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert fingerprint(model) == prints


@pytest.mark.parametrize(
    "wrong", [{"batches": 0}, {"batches": 2.5}, {"samples": 1}, {"iterations": 0}, {"damping": 0.0}, {"damping": float("nan")}]
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Refit(**wrong)
