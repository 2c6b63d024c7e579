"""S2-SAM: by hand, exact on its way back, and together with masks, scalers, closures, sparse layers and checkpoints."""

import copy
import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anymask
from anymask import Mask, Recipe
from anymask.errors import SettingError, TechniqueError
from anymask.kernels import available
from anymask.schedules import Schedule
from anymask.surgery import fingerprint
from anymask.techniques import SAM, Context, GhostSkip, LabelSmoothing
from anymask.techniques.base import Attached, Technique
from tests.test_hold import assert_zero_where_masked

FOREVER = Schedule("step", end="100%")
STEPS = 9


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def batches(many=STEPS):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 4, 4, generator=generator), torch.arange(8) % 4) for _ in range(many)]


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, **settings})


def attach(model, optimizer, *more, rho=0.2, **how):
    return Recipe((SAM(rho=rho), *more)).attach(model, optimizer, total_steps=STEPS, **how)


def train(model, optimizer, running, data):
    for x, y in data:
        optimizer.zero_grad()
        running.loss(model(x), y).backward()
        optimizer.step()
        running.step()


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def perturbed(model, running):
    """The length of the perturbation that is on the weights now."""
    with running.plain():
        plain = weights(model)
    return float(torch.cat([(p.detach() - plain[name]).flatten() for name, p in model.named_parameters()]).norm())


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# -- the formula -------------------------------------------------------------------------------------------------------
def test_three_steps_on_a_masked_quadratic_are_those_by_hand():
    a, w, kept = np.array([[3.0, 0.5, 0.2], [0.5, 2.0, 0.1], [0.2, 0.1, 1.0]]), np.array([1.0, -2.0, 0.0]), np.array([1.0, 1.0, 0.0])
    rho, lr, momentum, decay = 0.3, 0.1, 0.9, 0.01
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data[0] = torch.from_numpy(w)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    anymask.hold(Mask({"weight": torch.from_numpy(kept)[None]}), model, optimizer)
    running = attach(model, optimizer, rho=rho)
    e, buffer = np.zeros(3), np.zeros(3)
    for _ in range(3):
        quadratic = 0.5 * model.weight @ torch.from_numpy(a) @ model.weight.T
        optimizer.zero_grad()
        quadratic.sum().backward()
        optimizer.step()
        g = kept * (a @ (w + e))
        buffer = momentum * buffer + g + decay * w
        w = w - lr * buffer
        e = rho * g / np.sqrt((g * g).sum())
        np.testing.assert_allclose(model.weight.detach().numpy()[0], w + e, rtol=1e-14)
        with running.plain():
            np.testing.assert_allclose(model.weight.detach().numpy()[0], w, rtol=1e-14)
    assert model.weight[0, 2] == 0


def test_the_strength_scales_the_perturbation_of_all_parameters_together():
    model = net()
    optimizer = sgd(model)
    running = attach(model, optimizer)
    for strength, length in ((1.0, 0.2), (0.25, 0.05), (0.0, 0.0)):
        running._live["sam"][1].set_strength(strength)
        train(model, optimizer, running, batches(1))
        assert perturbed(model, running) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weights_come_back_bit_for_bit(dtype):
    model = net().to(dtype)
    optimizer, before = sgd(model, lr=0.0), dict(net().to(dtype).named_parameters())
    running = attach(model, optimizer)
    for x, y in batches():
        running.loss(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
        assert perturbed(model, running) > 0.1
        there = weights(model)
        with running.plain():
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert_same(weights(model), there)
    running.finish(early=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# -- anybody's loop ----------------------------------------------------------------------------------------------------
def test_step_with_a_closure_is_the_same_training():
    found = []
    for closed in (False, True):
        model = net()
        optimizer = sgd(model)
        running = attach(model, optimizer)

        def closure(x, y, model=model, optimizer=optimizer, running=running):
            optimizer.zero_grad()
            loss = running.loss(model(x), y)
            loss.backward()
            return loss

        for number, (x, y) in enumerate(batches()):
            if not closed:
                closure(x, y)
                optimizer.step()
            elif number % 2:
                assert optimizer.step(lambda x=x, y=y, closure=closure: closure(x, y)) > 0
            else:
                optimizer.step(closure=lambda x=x, y=y, closure=closure: closure(x, y))
            running.step()
        running.finish()
        found.append(weights(model))
    assert_same(*found)


def test_accumulated_gradients_perturb_as_those_of_the_whole_batch():
    found = []
    for parts in (1, 2):
        model = nn.Linear(4, 4)
        model.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
        optimizer = sgd(model)
        running = attach(model, optimizer)
        for x, y in batches():
            optimizer.zero_grad()
            for part, target in zip(x[:, 0, 0].chunk(parts), y.chunk(parts), strict=True):
                (running.loss(model(part), target) / parts).backward()
            optimizer.step()
        found.append(model.weight.detach().clone())
    torch.testing.assert_close(*found)


@dataclass(frozen=True)
class Watching(Technique):
    """Keeps what it is told of the weights around each step."""

    name: ClassVar[str] = "watching"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "a test"
    paper: ClassVar[str] = "none"
    schedule: Schedule = FOREVER

    def attach(self, context):
        seen = Attached()
        seen.before, seen.after = [], []
        seen.before_update = lambda: seen.before.append(weights(context.model))
        seen.after_update = lambda: seen.after.append(weights(context.model))
        return seen


def test_what_follows_it_in_a_recipe_sees_the_weights_that_are_not_perturbed():
    model = net()
    optimizer = sgd(model)
    running = attach(model, optimizer, Watching())
    seen = running._live["watching"][1]
    for batch in batches():
        train(model, optimizer, running, [batch])
        with running.plain():
            assert_same(seen.after[-1], weights(model))
    names = [name for name, _ in model.named_parameters()]
    for after, before in zip(seen.after, seen.before[1:], strict=False):
        assert_same({name: after[name] for name in names}, {name: before[name] for name in names})


def test_parameters_of_ghosts_are_left_alone_and_all_leave():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    before, optimizer = fingerprint(model), sgd(model)
    ghost = GhostSkip(Schedule("linear", end="50%"), kind="learned", where="all")
    running = attach(model, optimizer, ghost, LabelSmoothing(), example=batches()[0][0])
    own = len(list(model.parameters()))
    assert sum(len(group["params"]) for group in optimizer.param_groups) > own
    assert running.found["sam"] == f"{own} parameters"
    train(model, optimizer, running, batches())
    running.finish()
    assert fingerprint(model) == before
    assert all(set(slots) == {"momentum_buffer"} for slots in optimizer.state.values())


def test_a_plain_optimiser_is_left_without_a_slot():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    running = attach(model, optimizer)
    train(model, optimizer, running, batches(2))
    running.finish(early=True)
    assert not optimizer.state


# -- steps that are none ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_gradscaler_skips_neither_pile_up_nor_blow_up(fused):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    running, scaler = attach(model, optimizer), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    lengths = []
    for number, (x, y) in enumerate(batches()):
        with running.plain():
            before = dict(weights(model))
        optimizer.zero_grad()
        loss = running.loss(model(x), y) * (float("inf") if number in (0, 3, 4) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with running.plain():
            moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert moved is (number not in (0, 3, 4))
        lengths.append(perturbed(model, running))
    skipped = 0.0 if fused else 0.2  # a plain optimiser is not called for them: the perturbation waits for the next step
    assert lengths == pytest.approx([0.0, 0.2, 0.2, skipped, skipped, 0.2, 0.2, 0.2, 0.2], rel=1e-4)
    running.finish(early=True)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_scaled_gradients_of_a_fused_optimiser_perturb_as_plain_ones():
    found = []
    for scale in (1.0, 2.0**12):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
        running, scaler = attach(model, optimizer), torch.amp.GradScaler("cpu", init_scale=scale)
        for x, y in batches():
            optimizer.zero_grad()
            scaler.scale(running.loss(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(weights(model))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("gradient", [0.0, float("nan"), float("inf")])
def test_gradients_without_a_direction_leave_the_weights_as_the_optimiser_left_them(gradient):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    running = attach(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    assert perturbed(model, running) == 0.0 or gradient != 0.0  # 0 * nan: the optimiser's own step made the weights nan
    left = {name: value.nan_to_num() for name, value in weights(model).items()}
    with running.plain():
        assert_same(left, {name: value.nan_to_num() for name, value in weights(model).items()})


# -- masks ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW])
def test_pruned_weights_are_0_between_steps_and_in_the_optimiser(make):
    model = net()
    optimizer = make(model.parameters()) if make is torch.optim.AdamW else sgd(model)
    hold = anymask.hold(anymask.prune(model, "random-erk", sparsity=0.7), model, optimizer)
    running = attach(model, optimizer)
    for batch in batches():
        train(model, optimizer, running, [batch])
        assert_zero_where_masked(hold.mask, model, optimizer)
    running.finish()
    assert_zero_where_masked(hold.mask, model, optimizer)


@pytest.mark.parametrize("first", ["recipe", "rewire"])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_mask_that_moves_while_weights_are_perturbed_leaves_exact_zeros_and_nothing_stale(method, first):
    model, data = net(), batches()
    optimizer = sgd(model)
    hold = anymask.hold(anymask.prune(model, "random-erk", sparsity=0.7), model, optimizer)
    running = attach(model, optimizer) if first == "recipe" else None
    rewiring = anymask.rewire(hold, method, total_steps=STEPS, every="2it", end="8it")
    running = running or attach(model, optimizer)
    at_step = []
    optimizer.register_step_pre_hook(lambda *_: at_step.append(assert_zero_where_masked(hold.mask, model, optimizer)))
    for batch in data:
        before = hold.mask
        train(model, optimizer, running, [batch])
        assert_zero_where_masked(hold.mask, model, optimizer)
        with running.plain():
            assert_zero_where_masked(hold.mask, model, optimizer)
            for name in hold.mask:
                grown = hold.mask[name] & ~before[name]
                assert not model.get_parameter(name)[grown].any()
    assert len(rewiring.history) == 3
    assert len(at_step) == STEPS
    assert all(move.grown > 0 for move in rewiring.history)
    running.finish()
    assert_zero_where_masked(hold.mask, model, optimizer)


@pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")
@pytest.mark.parametrize("moves", [False, True])
def test_sparse_layers_train_as_dense_ones(moves):
    found = []
    for sparse in (False, True):
        model, data = net(), batches()
        mask = anymask.prune(model, "random-erk", sparsity=0.7)
        optimizer = sgd(model)
        hold = anymask.hold(mask, model, optimizer)
        if sparse:
            anymask.to_sparse(model, mask, data[0][0], optimizer=optimizer, measure=False)
        running = attach(model, optimizer)
        if moves:
            anymask.rewire(hold, "rigl", total_steps=STEPS, every="2it", end="8it")
        train(model, optimizer, running, data)
        running.finish()
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# -- saved and resumed -------------------------------------------------------------------------------------------------
def saved(model, optimizer, running):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recipe": running.state_dict()}, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("last", ["states", "recipe"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_training_that_is_saved_plain_or_perturbed_goes_on_bit_for_bit(plain, last):
    model, data = net(), batches()
    optimizer = sgd(model)
    running = attach(model, optimizer)
    train(model, optimizer, running, data[:4])
    if plain:  # as the callbacks of trainers save
        with running.plain():
            state = saved(model, optimizer, running)
    else:
        state = saved(model, optimizer, running)
    train(model, optimizer, running, data[4:])
    running.finish()

    again = net(seed=5)
    optimizer = sgd(again)
    if last == "states" and not plain:
        running = attach(again, optimizer, state=state["recipe"])
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if last == "recipe" or plain:
        running = attach(again, optimizer, state=state["recipe"])
    train(again, optimizer, running, data[4:])
    running.finish()
    assert_same(weights(again), weights(model))


def test_a_plain_state_dict_is_kept_as_it_is_while_training_goes_on():
    model = net()
    optimizer = sgd(model)
    running = attach(model, optimizer)
    train(model, optimizer, running, batches(2))
    kept = running.plain_state_dict()
    copied = copy.deepcopy(kept)
    assert not torch.equal(kept["4.weight"], model.state_dict()["4.weight"])
    train(model, optimizer, running, batches(2))
    assert_same(kept, copied)


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rho", [0.0, -0.1, float("inf"), float("nan")])
def test_a_rho_out_of_range_is_refused(rho):
    with pytest.raises(SettingError, match="rho"):
        SAM(rho=rho)


def test_what_it_cannot_work_with_is_refused():
    model = net()
    with pytest.raises(TechniqueError, match="no optimiser"):
        SAM().attach(Context(model, None, F.cross_entropy))
    with pytest.raises(TechniqueError, match="found nothing"):
        attach(model, sgd(net()))
    mask = anymask.prune(model, "random", sparsity=0.5)
    with pytest.raises(TechniqueError, match="nobody holds"):
        attach(model, sgd(model), mask=mask)
    attach(model, sgd(model)).finish(early=True)
