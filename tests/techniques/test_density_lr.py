"""density_lr: the same training as with a learning rate for each tensor; masks that move, scalers, sparse layers, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anymask
from anymask import Mask, Recipe
from anymask.errors import SettingError, TechniqueError
from anymask.kernels import available
from anymask.schedules import Schedule
from anymask.techniques import Context, DensityLR

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.01, foreach=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 8, generator=generator).double(), torch.arange(12) % 3


def mask_of(model):
    """Densities 1/4 and 1/16; the last layer is full."""
    kept = {"0.weight": torch.zeros(16, 8), "2.weight": torch.zeros(16, 16), "4.weight": torch.ones(3, 16)}
    kept["0.weight"][:, ::4] = 1
    kept["2.weight"][::4, ::4] = 1
    return Mask(kept)


def train(model, optimizer, steps, *, running=None):
    x, y = data()
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if running is not None:
            running.step()


def attached(technique, model, optimizer, *, total_steps=9):
    anymask.hold(mask_of(model), model, optimizer)
    return Recipe((technique,)).attach(model, optimizer, total_steps=total_steps)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_a_learning_rate_for_each_tensor(name):
    ours, theirs = net(), net()
    make = OPTIMIZERS[name]
    rates = {"0.weight": 4.0, "2.weight": 10.0}  # 1/4; 1/16, of which no more than 10
    optimizer = make(ours.parameters())
    running = attached(DensityLR(), ours, optimizer)
    assert running.found == {"density_lr": "updates of 3 tensors, times 1 to 10"}
    train(ours, optimizer, 5, running=running)

    lr = optimizer.param_groups[0]["lr"]
    grouped = make([{"params": [p], "lr": lr * rates.get(n, 1.0)} for n, p in theirs.named_parameters()])
    anymask.hold(mask_of(theirs), theirs, grouped)
    train(theirs, grouped, 5)
    for (key, value), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=key)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == lr
    assert all(not ours.get_parameter(n)[~kept].any() for n, kept in mask_of(ours).items())


@pytest.mark.parametrize(("steps", "factors"), [(1000, (4, 10)), (15_000, (4, 4)), (30_000, (2, 2)), (60_000, (1, 1))])
def test_how_often_weight_decay_replaces_the_weights_bounds_the_factor(steps, factors):
    """lr * weight_decay * steps * factor stays within 30."""
    ours, theirs = net(), net()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05, weight_decay=0.01)
    running = attached(DensityLR(), ours, optimizer, total_steps=steps)
    assert ("because weight decay replaces weights" in running.found["density_lr"]) == (factors != (4, 10))
    grouped = torch.optim.SGD([{"params": [p]} for p in theirs.parameters()], lr=0.05, weight_decay=0.01)
    for group, factor in zip(grouped.param_groups[::2], (*factors, 1), strict=True):
        group["lr"] = 0.05 * factor
    anymask.hold(mask_of(theirs), theirs, grouped)
    train(ours, optimizer, 3)
    train(theirs, grouped, 3)
    for value, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12)


REPLACED = {  # times 1 to 2 in 3,000 steps
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "dampened": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, dampening=0.9, weight_decay=0.1),
    "plain": lambda params: torch.optim.SGD(params, lr=0.05, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("name", REPLACED)
def test_momentum_counts_where_the_decay_goes_through_it(name):
    model = net()
    assert "times 1 to 2," in attached(DensityLR(), model, REPLACED[name](model.parameters()), total_steps=3000).found["density_lr"]


@pytest.mark.parametrize("name", ["plain", "momentum", "nesterov", "dampened", "adamw"])
def test_weight_decay_replaces_weights_as_often_as_is_said(name):
    """What is left of a weight without a gradient after T = 1 is about 1 / e."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = REPLACED[name]([weight])
    steps = 200 if name != "dampened" else 400  # T = 1 but for the dampened one, of which it is 2
    for _ in range(steps):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    settled = {"plain": 1, "momentum": 1, "nesterov": 1, "dampened": 2, "adamw": 1}[name]
    assert -torch.log(weight.detach()).item() == pytest.approx(settled, rel=0.06)


@pytest.mark.parametrize(
    "scheduled",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=3000, cycle_momentum=False),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=3000, base_momentum=0.8),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100)),
        lambda optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.05)),
        lambda optimizer: None,
    ],
)
def test_the_peak_of_the_learning_rate_counts_and_is_remembered(scheduled):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    _ = scheduled(optimizer)
    running = attached(DensityLR(), model, optimizer, total_steps=3000)
    assert "times 1 to 2," in running.found["density_lr"]
    state = running.state_dict()
    running.finish()

    resumed = net()
    late = torch.optim.SGD(resumed.parameters(), lr=0.0005, weight_decay=0.1)  # without a scheduler, after its rate was dropped
    anymask.hold(mask_of(resumed), resumed, late)
    running = Recipe((DensityLR(),)).attach(resumed, late, total_steps=3000, start=2000, state=state)
    assert running.found == state["found"]
    before = resumed[2].weight.detach().clone()
    x, y = data()
    (gradient,) = torch.autograd.grad(F.cross_entropy(resumed(x), y), resumed[2].weight)
    train(resumed, late, 1)
    moved = -0.0005 * 2 * (gradient * mask_of(resumed)["2.weight"] + 0.1 * before)
    torch.testing.assert_close(resumed[2].weight.detach() - before, moved, rtol=1e-6, atol=1e-12)


def test_without_a_bound_or_weight_decay_only_the_density_counts():
    model = net()
    for technique, decay in ((DensityLR(turnover=0.0), 0.01), (DensityLR(), 0.0)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=decay)
        running = attached(technique, model, optimizer, total_steps=10**6)
        assert running.found == {"density_lr": "updates of 3 tensors, times 1 to 10"}
        running.finish()


def test_the_strength_is_between_the_factor_and_one():
    ours, theirs = net(), net()
    fade = Schedule("linear", full="0%", end="100%")
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    train(ours, optimizer, 3, running=attached(DensityLR(schedule=fade), ours, optimizer, total_steps=3))
    grouped = torch.optim.SGD([{"params": [p]} for p in theirs.parameters()], lr=0.05)
    anymask.hold(mask_of(theirs), theirs, grouped)
    for strength in (1, 2 / 3, 1 / 3):
        for group, rate in zip(grouped.param_groups[::2], (4, 10, 1), strict=True):
            group["lr"] = 0.05 * (1 + strength * (rate - 1))
        train(theirs, grouped, 1)
    for value, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12)


def test_schedulers_of_the_learning_rate_act_as_they_do():
    updates = []
    for rate in (0.05, 0.005):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        attached(DensityLR(), model, optimizer)
        optimizer.param_groups[0]["lr"] = rate
        before = model[0].weight.detach().clone()
        train(model, optimizer, 1)
        updates.append(model[0].weight.detach() - before)
    torch.testing.assert_close(updates[0], 10 * updates[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("density", "settings", "factor"),
    [
        (0.25, {}, 4.0),
        (0.01, {}, 10.0),
        (0.01, {"most": 1000.0}, 100.0),
        (0.25, {"power": 0.5}, 2.0),
        (0.25, {"power": 0.0}, 1.0),
        (0.0, {}, 1.0),
    ],
)
def test_the_factor_is_a_power_of_the_density_within_bounds(density, settings, factor):
    kept = torch.arange(100) < round(100 * density)
    assert DensityLR(**settings).factors(Mask({"weight": kept})) == {"weight": pytest.approx(factor)}


@pytest.mark.parametrize("first", ["rewire", "recipe"])
@pytest.mark.parametrize("method", ["set", "rigl", "gmp"])
def test_a_mask_that_moves_is_followed_and_its_zeros_stay(method, first):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    hold = anymask.hold(mask_of(model), model, optimizer)
    how = {"sparsity": 0.9, "every": "2it", "scope": "global"} if method == "gmp" else {"every": "2it"}
    started = {}
    for what in (first, "recipe" if first == "rewire" else "rewire"):
        if what == "rewire":
            started[what] = anymask.rewire(hold, method, total_steps=12, **how)
        else:
            started[what] = Recipe((DensityLR(),)).attach(model, optimizer, total_steps=12)
    for _ in range(12):
        before = {name: p.detach().clone() for name, p in hold.parameters.items()}
        train(model, optimizer, 1, running=started["recipe"])
        assert all(not p[~hold.mask[name]].any() for name, p in hold.parameters.items())
        assert any(not torch.equal(p, before[name]) for name, p in hold.parameters.items())
    assert len(started["rewire"].history) > 1
    started["recipe"].finish()


def test_dense_weights_that_are_loaded_after_it_was_attached_are_zero_after_a_step():
    """What a step and the hold take away from a pruned weight is no update to be scaled: it came back, and grew with each step."""
    model = net()
    optimizer, mask = torch.optim.SGD(model.parameters(), lr=0.01), mask_of(model)
    dense = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    running = attached(DensityLR(), model, optimizer)
    model.load_state_dict(dense)
    for _ in range(2):
        train(model, optimizer, 1, running=running)
        assert all(not model.get_parameter(name)[~mask[name]].any() for name in mask)


def test_after_a_move_the_factors_are_those_of_the_new_mask():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    hold = anymask.hold(mask_of(model), model, optimizer)
    Recipe((DensityLR(),)).attach(model, optimizer, total_steps=9)
    denser = dict(mask_of(model).items())
    denser["0.weight"][:, ::2] = True  # 1/2, before 1/4
    hold.move(Mask(denser))
    before = model[0].weight.detach().clone()
    x, y = data()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].weight)
    train(model, optimizer, 1)
    torch.testing.assert_close(model[0].weight.detach() - before, -0.05 * 2 * gradient * denser["0.weight"], rtol=1e-6, atol=1e-12)


def test_a_step_that_the_scaler_skips_changes_nothing_and_the_next_one_is_scaled():
    plain, scaled = net().float(), net().float()
    x, y = data()
    for model, technique in ((plain, None), (scaled, DensityLR(most=4.0))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        anymask.hold(mask_of(model), model, optimizer)
        Recipe(() if technique is None else (technique,)).attach(model, optimizer, total_steps=9)
        scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), copy.deepcopy(model.state_dict())
        for factor in (float("inf"), 1.0):
            scaler.scale(F.cross_entropy(model(x.float()), y) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if factor != 1.0:
                assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    start = net().float()
    mask_of(start).apply(start)
    moved = [(model[0].weight - start[0].weight).detach() for model in (plain, scaled)]
    torch.testing.assert_close(moved[1], 4 * moved[0], rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")
@pytest.mark.parametrize("method", ["static", "rigl"])
def test_sparse_layers_train_as_dense_ones_do(method):
    dense, sparse = net().float(), net().float()
    x, _ = data()
    mask_of(sparse).apply(sparse)
    anymask.to_sparse(sparse, mask_of(sparse), x.float(), measure=False)
    for model in (dense, sparse):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        hold = anymask.hold(mask_of(model), model, optimizer)
        running = Recipe((DensityLR(),)).attach(model, optimizer, total_steps=8)
        if method != "static":
            anymask.rewire(hold, method, total_steps=8, every="3it")
        for _ in range(8):
            F.cross_entropy(model(x.float()), data()[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            running.step()
        hold.release()
        running.finish()
    for key, value in anymask.to_dense(sparse).state_dict().items():
        torch.testing.assert_close(value, dense.state_dict()[key], rtol=1e-3, atol=1e-5)


def test_what_it_cannot_do_is_refused():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    refused = {
        "density_lr got no mask": (sgd, None),
        "density_lr got no optimiser": (None, mask_of(model)),
        "density_lr got an optimiser that trains none": (torch.optim.SGD([model[0].bias], lr=0.1), mask_of(model)),
    }
    for said, (optimizer, mask) in refused.items():
        with pytest.raises(TechniqueError, match=said):
            DensityLR().attach(Context(model, optimizer, F.cross_entropy, mask=mask))


@pytest.mark.parametrize(
    "wrong", [{"power": -1.0}, {"power": 3.0}, {"most": 0.5}, {"most": float("inf")}, {"turnover": -0.1}, {"turnover": float("inf")}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        DensityLR(**wrong)
