"""What is diagnosed, each against its formula written out by hand in float64."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anymask import Diagnostics, Mask, Recipe, hold, models, prune, to_sparse
from anymask.diagnostics import effective_rank, sharpness
from anymask.errors import SettingError
from anymask.kernels import available
from anymask.schedules import Schedule
from anymask.surgery import fingerprint
from anymask.techniques import GhostActivation


def net(seed: int = 0) -> nn.Sequential:
    """A convolution, its norm with statistics that are not 0 and 1, and two linear layers, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(1, 3, 3), norm=nn.BatchNorm2d(3), relu=nn.ReLU(), flat=nn.Flatten(), wide=nn.Linear(12, 5))
        )
        made.add_module("act", nn.ReLU())
        made.add_module("head", nn.Linear(5, 2))
        made(torch.randn(16, 1, 4, 4))
    return made.double()


def data(count: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(count) % 2


def mask_of(model: nn.Module) -> Mask:
    return prune(model, "random", sparsity=0.4, seed=0)


def kept(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """A copy of the kept weights of each layer, as vectors."""
    return {name: model.get_parameter(name).detach().clone()[mask[name]] for name in mask}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, clip: float = 0.0) -> list[dict[str, Tensor]]:
    """Train, and give the gradients that each step was made with."""
    x, y = data()
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return seen


def turned(now: Tensor, then: Tensor) -> int:
    return sum(a * b < 0 for a, b in zip(now.tolist(), then.tolist(), strict=True))


# -- the loop ------------------------------------------------------------------------------------------------------------
def test_gradient_norms_signs_and_distances_are_those_of_the_formulas_in_every_epoch() -> None:
    model = net()
    mask, optimizer = mask_of(model), torch.optim.SGD(model.parameters(), lr=2.0)
    hold(mask, model, optimizer)
    watch, start = Diagnostics(model, optimizer, data()[0]), kept(model, mask)
    before = start
    for steps in (1, 4, 3):
        seen = train(model, optimizer, steps=steps, clip=0.3)
        now, found = kept(model, mask), watch.epoch()
        for name in mask:
            squares = [sum(float(g) ** 2 for g in gradients[name][mask[name]]) for gradients in seen]
            assert found["gradient_norm"][name] == pytest.approx(math.sqrt(sum(squares) / steps), rel=1e-5)
            far, size = (math.sqrt(sum(float(v) ** 2 for v in part)) for part in (now[name] - start[name], start[name]))
            assert found["distance"][name] == pytest.approx(far / size, rel=1e-12)
        whole, first, last = (torch.cat([*part.values()]) for part in (now, start, before))
        assert found["distance_overall"] == pytest.approx(float((whole - first).norm() / first.norm()), rel=1e-12)
        assert found["sign_flips"] == turned(whole, last) / mask.kept
        assert found["sign_flips_from_start"] == turned(whole, first) / mask.kept
        assert 0 < found["sign_flips_from_start"] < 1
        before = now
    assert found["sign_flips"] != found["sign_flips_from_start"]


def test_exactly_the_signs_that_were_turned_are_counted_and_zero_is_no_sign() -> None:
    model = net()
    watch = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), data()[0])
    weight = model.get_parameter("wide.weight").data.view(-1)
    total = sum(model.get_parameter(name).numel() for name in ("conv.weight", "wide.weight", "head.weight"))
    weight[:7] *= -1
    assert watch.epoch()["sign_flips"] == 7 / total
    weight[:2] *= -1
    weight[7:10] = 0
    found = watch.epoch()
    assert (found["sign_flips"], found["sign_flips_from_start"]) == (2 / total, 5 / total)


def test_without_a_hold_every_prunable_weight_counts_and_without_a_step_there_is_no_gradient_norm() -> None:
    model = net()
    watch = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), data()[0])
    found = watch.epoch()
    assert found["gradient_norm"] == {"conv.weight": None, "wide.weight": None, "head.weight": None}
    assert (found["sign_flips"], found["distance_overall"]) == (0.0, 0.0)


def test_a_step_that_overflowed_and_a_frozen_layer_are_left_out_of_the_gradient_norms() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = Diagnostics(model, optimizer, data()[0])
    model.get_parameter("conv.weight").requires_grad_(False)
    (gradients,) = train(model, optimizer, steps=1)
    model.get_parameter("wide.weight").grad[0, 0] = math.inf
    optimizer.step()
    found = watch.epoch()["gradient_norm"]
    assert found["wide.weight"] == pytest.approx(float(gradients["wide.weight"].norm()), rel=1e-5)
    assert found["conv.weight"] is None


def test_what_a_fused_optimiser_unscales_in_its_step_is_unscaled_here_too() -> None:
    norms = []
    for scale in (None, torch.tensor(1024.0)):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        watch = Diagnostics(model, optimizer, data()[0])
        F.cross_entropy(model(data()[0]), data()[1]).backward()
        if scale is not None:
            for p in model.parameters():
                p.grad *= scale
            optimizer.grad_scale, optimizer.found_inf = scale, torch.zeros(())  # as GradScaler does
        optimizer.step()
        norms.append(watch.epoch()["gradient_norm"])
    assert norms[0] == norms[1]


@pytest.mark.parametrize("given", ["alone", "beside a recipe"])
def test_the_gradient_of_a_closure_is_that_of_its_own_step(given: str) -> None:
    """Lightning gives one to each step."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = hold(mask_of(model), model, optimizer) and Recipe.preset("best").without("ghost_activation")
    running = recipe.attach(model, optimizer, total_steps=3) if given != "alone" else None
    watch, (x, y), seen = Diagnostics(model, optimizer, data()[0]), data(), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        seen.append(float(model.get_parameter("wide.weight").grad.norm()))
        return loss

    for _ in range(3):
        assert optimizer.step(closure) is not None
        if running is None:
            assert watch.epoch()["gradient_norm"]["wide.weight"] == pytest.approx(seen[-1])
        else:  # preconditioned, in the norm that it had
            running.step()
            assert watch.epoch()["gradient_norm"]["wide.weight"] == pytest.approx(seen[-1], rel=1e-4)
    assert len(seen) == 3  # each was asked once


def test_after_remove_no_step_is_heard() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Diagnostics(model, optimizer, data()[0])
    watch.remove()
    train(model, optimizer, steps=1)
    assert set(watch.epoch()["gradient_norm"].values()) == {None}


def test_a_model_that_is_cut_over_ranks_is_refused() -> None:
    class Cut(nn.Parameter):
        def to_local(self) -> Tensor:
            return self.data

    model = nn.Linear(2, 2)
    model.weight = Cut(torch.ones(2, 2))
    with pytest.raises(SettingError, match="fully_shard"):
        Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.ones(2, 2))


def test_nothing_of_the_model_and_no_random_state_is_touched() -> None:
    model = net().append(nn.Dropout())
    x, y = data()
    watch = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    F.cross_entropy(model(x), y).backward()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    made, random = fingerprint(model), torch.get_rng_state()
    watch.epoch()
    sharpness(model, x, y)
    assert fingerprint(model) == made
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


# -- dead ReLUs ----------------------------------------------------------------------------------------------------------
class Spelt(nn.Module):
    """A layer, and a ReLU in some spelling."""

    def __init__(self, layer: nn.Module, relu: object) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.layer(x))


RELUS = {
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "torch": torch.relu,
    "method": Tensor.relu_,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
}
LAYERS = {
    "linear": (nn.Linear(3, 10), (8, 3)),
    "tokens": (nn.Linear(3, 10), (8, 4, 3)),
    "conv1d": (nn.Conv1d(3, 10, 1), (8, 3, 4)),
    "conv2d": (nn.Conv2d(3, 10, 3), (8, 3, 6, 5)),
}


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dead", [0, 3, 10])
def test_of_a_net_made_to_have_k_dead_channels_k_are_found(relu: str, layer: str, dead: int) -> None:
    made, shape = LAYERS[layer]
    with torch.no_grad():
        made.bias[:dead], made.bias[dead:] = -100.0, 100.0
    model = Spelt(made, RELUS[relu])
    watch = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(shape))
    assert watch.epoch()["dead_relus"] == dead / 10


def test_a_channel_that_lives_for_one_input_at_one_place_is_not_dead() -> None:
    model = Spelt(nn.Conv2d(1, 2, 1, bias=False), F.relu)
    model.layer.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    x = torch.zeros(4, 1, 3, 3)
    watch = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    assert watch.epoch()["dead_relus"] == 1.0
    x[2, 0, 1, 1] = 1e-3
    assert watch.epoch()["dead_relus"] == 0.5


def test_a_net_without_relu_and_linear_layer_has_neither_number() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU())
    found = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2, 1, 4, 4)).epoch()
    assert (found["dead_relus"], found["effective_rank"]) == (None, None)


@pytest.mark.parametrize("soft", ["swish", "mish"])
def test_relus_below_ghosts_are_found_where_the_network_is_plain(soft: str) -> None:
    model = net()
    model.get_parameter("wide.bias").data[:2] = -100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = Diagnostics(model, optimizer, data()[0]).epoch()
    recipe = Recipe((GhostActivation(Schedule("linear"), soft=soft),)).attach(model, optimizer, total_steps=9, example=data()[0])
    with recipe.plain():
        found = Diagnostics(model, optimizer, data()[0]).epoch()
    assert found["dead_relus"] == expected["dead_relus"] >= 2 / 8
    assert found["effective_rank"] == expected["effective_rank"]


@pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")
@pytest.mark.parametrize("name", ["resnet8-0.25x", "mobilenetv2-0.25x", "vgg11-0.125x"])
def test_sparse_layers_that_take_relus_along_give_the_numbers_of_dense_ones(name: str) -> None:
    found, x, y = [], torch.randn(16, 3, 16, 16), torch.arange(16) % 4
    for sparse in (False, True):
        model = models.build(name, classes=4, channels=3, seed=0)
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.data.normal_(-1.0, 1.0)
        mask = prune(model, "random-erk", sparsity=0.8, seed=0)
        if sparse:
            to_sparse(model, mask, x, measure=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        hold(mask, model, optimizer)
        watch = Diagnostics(model, optimizer, x)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append({**watch.epoch(), "sharpness": sharpness(model, x, y, mask=mask, iterations=5)})
    dense, ours = found
    assert 0 < dense["dead_relus"] < 1
    assert ours["dead_relus"] == pytest.approx(dense["dead_relus"], abs=0.02)  # of a few hundred channels
    assert ours["gradient_norm"] == pytest.approx(dense["gradient_norm"], rel=1e-2)
    assert ours["distance"] == pytest.approx(dense["distance"], rel=1e-2)
    for key in ("effective_rank", "distance_overall", "sharpness"):
        assert ours[key] == pytest.approx(dense[key], rel=1e-2)


# -- effective rank --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0] * 6, 6.0),
        ([5.0, 0.0, 0.0], 1.0),
        ([3.0, 1.0], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        ([4.0, 2.0, 2.0], math.exp(1.5 * math.log(2))),
    ],
)
def test_effective_rank_of_known_singular_values(values: list[float], expected: float) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(9, len(values), dtype=torch.float64)).Q for _ in range(2))
    assert effective_rank(left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=50)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_effective_rank_lies_between_one_and_the_rank_whatever_the_scale(rows: int, columns: int, seed: int, scale: float) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = effective_rank(matrix)
    assert 1 - 1e-9 <= found <= min(rows, columns) + 1e-9
    assert effective_rank(scale * matrix.T) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_effective_rank_of_nothing_and_of_what_is_not_finite_is_none(value: float) -> None:
    assert effective_rank(torch.full((3, 2), value)) is None


def test_the_features_are_what_the_last_linear_layer_takes_in_eval_mode() -> None:
    model, (x, _) = net(), data()
    found = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), x).epoch()
    model.eval()
    values = torch.linalg.svdvals(model[:-1](x).detach())
    shares = (values / values.sum()).tolist()
    assert found["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares if p > 0)), rel=1e-9)


# -- sharpness -------------------------------------------------------------------------------------------------------------
def hessian(model: nn.Module, mask: Mask | None) -> Tensor:
    """The whole Hessian of the cross-entropy over the kept weights, forward pass written out."""
    x, y = data()
    names = ("conv.weight", "wide.weight", "head.weight")
    weights = tuple(model.get_parameter(name).detach().clone() for name in names)
    norm, wide, head = model.norm, model.wide, model.head

    def loss(conv: Tensor, second: Tensor, third: Tensor) -> Tensor:
        z = F.conv2d(x, conv, model.conv.bias)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        z = (z - norm.running_mean.view(1, 3, 1, 1)) * scale.view(1, 3, 1, 1) + norm.bias.view(1, 3, 1, 1)
        z = z.clamp(min=0).flatten(1) @ second.T + wide.bias
        z = z.clamp(min=0) @ third.T + head.bias
        return (z.logsumexp(1) - z[torch.arange(len(y)), y]).mean()

    blocks = torch.autograd.functional.hessian(loss, weights)
    sizes = [w.numel() for w in weights]
    rows = [torch.cat([b.reshape(n, m) for b, m in zip(row, sizes, strict=True)], 1) for row, n in zip(blocks, sizes, strict=True)]
    whole = torch.cat(rows)
    if mask is None:
        return whole
    places = torch.cat([mask[name].flatten() for name in names])
    return whole[places][:, places]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_sharpness_is_the_largest_eigenvalue_of_the_exact_hessian_over_kept_weights(masked: bool, seed: int) -> None:
    model = net(seed)
    mask = mask_of(model) if masked else None
    if mask is not None:
        mask.apply(model)
    expected = float(torch.linalg.eigvalsh(hessian(model, mask))[-1])
    x, y = data()
    assert sharpness(model, x, y, mask=mask) == pytest.approx(expected, rel=2e-2)
    assert sharpness(model, x, y, mask=mask, iterations=2000, tolerance=1e-12) == pytest.approx(expected, rel=1e-6)
    assert sharpness(model, x, y, mask=mask, iterations=2) <= expected * (1 + 1e-12)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (lambda z: (z @ torch.diag(torch.tensor([-5.0, 3.0])) * z).sum() / 2, 3.0),  # the one of largest size is negative
        (lambda z: (z @ torch.diag(torch.tensor([-5.0, -2.0])) * z).sum() / 2, -2.0),
        (lambda z: z[0, 0] * z[0, 1], 1.0),  # 1 and -1
        (lambda z: z.sum(), 0.0),
    ],
)
def test_sharpness_is_the_largest_and_not_the_one_of_largest_size(curve: object, expected: float) -> None:
    model = nn.Linear(1, 2, bias=False)
    found = sharpness(model, torch.ones(1, 1), None, loss=lambda z, _: curve(z), iterations=500, tolerance=1e-7)
    assert found == pytest.approx(expected, abs=1e-4)


def test_equal_seeds_give_equal_sharpness_and_its_inputs_may_have_names() -> None:
    model, (x, y) = net(), data()
    first = sharpness(model, x, y, iterations=3)
    assert first == sharpness(model, {"input": x}, y, iterations=3) == sharpness(model, (x,), y, iterations=3)
    assert first != sharpness(model, x, y, iterations=3, seed=1)


def test_no_iteration_is_refused() -> None:
    with pytest.raises(SettingError, match="iterations"):
        sharpness(net(), *data(), iterations=0)


def test_an_attention_layer_and_a_hard_sigmoid_have_a_sharpness() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    model = nn.Sequential(OrderedDict(body=layer, gate=nn.Hardsigmoid(), pool=nn.Flatten(), head=nn.Linear(24, 3))).double()
    assert math.isfinite(sharpness(model, torch.randn(4, 3, 8, dtype=torch.float64), torch.arange(4) % 3, iterations=5))
