"""Moves of a mask against the papers' formulas written out by hand, and where the edges are."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import anymask
from anymask import Mask
from anymask.errors import MaskError, SettingError
from anymask.pruning.dynamic import DYNAMIC, GROW, Times, dense_mask, dynamic_of, exchange, lots
from anymask.pruning.gradients import DenseGradients
from anymask.surgery import fingerprint

LR, MOMENTUM, FRACTION, EVERY, END, STEPS = 0.1, 0.9, 0.4, 2, 7, 9
SHAPES = {"0.weight": (7, 6), "2.weight": (3, 7)}


def net():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)).double()


def batches(count=STEPS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(10, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def mask_of(density=0.4):
    generator = torch.Generator().manual_seed(6)
    return Mask({name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()})


def by_hand(weights, mask, lot):
    """RigL and SET of the papers in numpy: SGD with momentum on masked gradients of mean((w2 tanh(w1 x) - 1)^2), then drop and grow.

    `lot` gives the grow scores of a layer, or None for the magnitude of the gradient at all places.
    """
    w = {name: value.copy() * mask[name] for name, value in weights.items()}
    m, buffers, story = {name: value.copy() for name, value in mask.items()}, dict.fromkeys(w, 0.0), []
    for t, x in enumerate([batch.numpy() for batch in batches()], 1):
        h = np.tanh(x @ w["0.weight"].T)
        error = h @ w["2.weight"].T - 1
        up = 2 * error / error.size
        g = {"2.weight": up.T @ h, "0.weight": ((up @ w["2.weight"]) * (1 - h**2)).T @ x}
        for name in SHAPES:
            buffers[name] = MOMENTUM * buffers[name] + g[name] * m[name]
            w[name] = w[name] - LR * buffers[name]
        if t % EVERY == 0 and t < END:
            for name in SHAPES:
                n = int(m[name].sum())
                k = round(FRACTION / 2 * (1 + math.cos(math.pi * t / END)) * n)
                kept = list(np.argsort(np.where(m[name], np.abs(w[name]), np.inf), axis=None)[:n])
                stay = set(kept[k:])
                score = (np.abs(g[name]) if lot is None else lot[name]).reshape(-1)
                rest = sorted((i for i in range(score.size) if i not in stay), key=lambda i: -score[i])
                new = np.zeros(score.size, dtype=bool)
                new[list(stay | set(rest[:k]))] = True
                new = new.reshape(m[name].shape)
                fresh = new & ~m[name]
                for tensor in (w[name], buffers[name]):
                    tensor[~new | fresh] = 0.0
                m[name] = new
        story.append(({n: v.copy() for n, v in m.items()}, {n: v.copy() for n, v in w.items()}, {n: v.copy() for n, v in buffers.items()}))
    return story


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_set_and_rigl_are_the_formulas_by_hand_in_float64(method, monkeypatch):
    generator = np.random.default_rng(7)
    lot = {name: generator.random(shape) for name, shape in SHAPES.items()}
    monkeypatch.setitem(GROW, "random", lambda weight, _: torch.from_numpy(lot["0.weight" if weight.shape == (7, 6) else "2.weight"]))
    model, mask = net(), mask_of()
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    story = by_hand(weights, {name: mask[name].numpy() for name in mask}, lot if method == "set" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    hold = anymask.hold(mask, model, optimizer)
    anymask.rewire(hold, method, total_steps=STEPS, every=f"{EVERY}it", end=f"{END}it", fraction=FRACTION)
    for x, (kept, values, buffers) in zip(batches(), story, strict=True):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(hold.mask[name], torch.from_numpy(kept[name])), name
            torch.testing.assert_close(p.detach(), torch.from_numpy(values[name]), rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], torch.from_numpy(buffers[name]), rtol=1e-12, atol=1e-15)
    assert any(not np.array_equal(story[-1][0][name], mask[name].numpy()) for name in mask)


@pytest.mark.parametrize("scope", ["uniform", "global", "erk"])
def test_gradual_pruning_is_the_formula_by_hand(scope):
    """s_t = s_f + (s_i - s_f)(1 - (t - t0) / (T - t0))^3 from t0 on, the smallest of what is left at each update."""
    model, sparsity, begin, every, end = net(), 0.8, 1, 2, 7
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(dense_mask(model), model, optimizer)
    anymask.rewire(hold, "gmp", total_steps=9, sparsity=sparsity, every="2it", begin="1it", end="7it", scope=scope)
    total = {"0.weight": 42, "2.weight": 21}
    final = {"uniform": {"0.weight": 9, "2.weight": 4}, "erk": {"0.weight": 7, "2.weight": 6}}.get(scope)  # 13 (0.2 * 63 = 12.6)
    for t, x in enumerate(batches(9), 1):
        before = {name: hold.mask[name] for name in hold.mask}
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        due = t == end or (begin < t < end and (t - begin) % every == 0)
        left = (1 - (t - begin) / (end - begin)) ** 3
        size = {name: p.detach().abs() for name, p in model.named_parameters()}
        if not due:
            assert all(torch.equal(before[name], hold.mask[name]) for name in before)
        elif scope == "global":
            count = round(13 + (63 - 13) * left)
            threshold = sorted(value for name in size for value in size[name][before[name]].tolist())[-count]
            assert hold.mask.kept == count
            assert all(size[name][hold.mask[name]].min() >= threshold for name in size)
        else:
            for name, all_of_it in total.items():
                now = hold.mask[name]
                count = round(final[name] + (all_of_it - final[name]) * left)
                assert int(now.sum()) == count
                assert not (now & ~before[name]).any()
                assert torch.equal(size[name] > 0, now)
    assert hold.mask.kept == 13


def test_the_smallest_of_the_kept_go_in_gradual_pruning():
    weight = torch.tensor([[5.0, -1.0, 3.0, -4.0, 2.0, 6.0]])
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hold = anymask.hold(dense_mask(model), model, optimizer)
    anymask.rewire(hold, "gmp", total_steps=4, sparsity=0.5, every="1it", end="3it")
    sizes = []
    for _ in range(3):
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
        sizes.append(model.weight.abs().tolist()[0])
    assert sizes == [[5.0, 0.0, 3.0, 4.0, 0.0, 6.0], [5.0, 0.0, 0.0, 4.0, 0.0, 6.0], [5.0, 0.0, 0.0, 4.0, 0.0, 6.0]]


# -- one exchange ------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_dropped_and_grown_again_keeps_its_value_and_slots():
    """As in google-research/rigl: new connections are those that were not there before."""
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold = anymask.hold(Mask({"weight": torch.tensor([[1, 1, 0, 0]])}), model, optimizer)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 1.0, 0.0, 0.0]]))
    rewiring = anymask.rewire(hold, "rigl", total_steps=4, every="1it", end="100%", fraction=0.6)
    (model.weight * torch.tensor([[0.1, 5.0, 1.0, 2.0]])).sum().backward()  # the gradient is largest at the weight that is dropped
    optimizer.step()
    assert [(move.dropped, move.grown) for move in rewiring.history] == [(0, 0)]
    assert model.weight.tolist() == [[pytest.approx(3.99), pytest.approx(0.5), 0.0, 0.0]]
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[pytest.approx(0.1), 5.0, 0.0, 0.0]]


def test_random_growth_favours_no_place_and_may_bring_back_what_was_dropped():
    weight, kept = torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([True, True, False, False, False])
    grown = Counter()
    for seed in range(2000):
        new = exchange(DYNAMIC["set"], weight, kept, count=1, gradient=None, generator=lots(seed, 7))
        assert int(new.sum()) == 2
        assert new[0]
        grown[int((new[1:]).nonzero()) + 1] += 1
    assert set(grown) == {1, 2, 3, 4}
    assert all(abs(times - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75) for times in grown.values())


def test_lots_differ_between_steps_and_seeds():
    draws = {(seed, step): torch.rand(3, generator=lots(seed, step)).tolist() for seed in (0, 1, 2**40) for step in (0, 1, 10**6)}
    assert len({tuple(draw) for draw in draws.values()}) == 9


def test_rows_take_other_settings_and_epochs():
    assert dynamic_of("rigl", {"every": "1ep"}).every == "1ep"
    assert dynamic_of(DYNAMIC["set"], {"fraction": 0.5}) == dynamic_of("set", {"fraction": 0.5})
    times = Times.of(dynamic_of("set", {"every": "1ep", "begin": "2ep", "end": "50%"}), total=100, per_epoch=10)
    assert [step for step in range(101) if times.due(step)] == [30, 40]
    assert (times.passed(20), times.passed(35), times.passed(70)) == (0.0, 0.5, 1.0)


# -- what it goes by ---------------------------------------------------------------------------------------------------


def spoiled(value, *, at=1):
    """A net in which the gradient of a pruned weight is `value` at step number `at`; held, not yet rewired."""
    model, mask, step = net(), mask_of(), Counter()
    place = tuple((~mask["0.weight"]).nonzero()[0].tolist())

    def spoil(gradient):
        step["now"] += 1
        gradient = gradient.clone()
        if step["now"] == at:
            gradient[place] = value
        return gradient

    model[0].weight.register_hook(spoil)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return model, optimizer, anymask.hold(mask, model, optimizer), place


def train(model, optimizer, count):
    for x in batches(count):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def test_a_gradient_that_is_nan_puts_the_move_off_until_it_is_not():
    model, optimizer, hold, _ = spoiled(math.nan, at=2)
    rewiring = anymask.rewire(hold, "rigl", total_steps=9, every="2it")
    train(model, optimizer, 5)
    assert [move.step for move in rewiring.history] == [3, 4]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_gradient_that_overflowed_at_a_pruned_place_grows_there():
    """No GradScaler sees it, for the gradient is masked: put off, it would come again at the same scale."""
    model, optimizer, hold, place = spoiled(math.inf, at=2)
    rewiring = anymask.rewire(hold, "rigl", total_steps=9, every="2it")
    train(model, optimizer, 2)
    assert [move.step for move in rewiring.history] == [2]
    assert hold.mask["0.weight"][place]
    train(model, optimizer, 2)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", DYNAMIC)
def test_weights_that_are_nan_are_not_ranked(method):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(dense_mask(model) if method == "gmp" else mask_of(), model, optimizer)
    before = hold.mask
    rewiring = anymask.rewire(hold, method, total_steps=9, every="1it", **({"sparsity": 0.5} if method == "gmp" else {}))
    with torch.no_grad():
        model[0].weight[hold.mask["0.weight"]] = math.nan
    train(model, optimizer, 3)
    assert rewiring.history == []
    assert hold.mask == before
    assert not rewiring.settled


def test_a_step_that_a_fused_optimiser_skipped_is_no_step():
    model, mask = net(), mask_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
    rewiring = anymask.rewire(anymask.hold(mask, model, optimizer), "rigl", total_steps=9, every="1it")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (1e308, 1.0):
        optimizer.zero_grad()
        scaler.scale((model(batches()[0]) - 1).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1.0
    assert [move.step for move in rewiring.history] == [2]


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_a_frozen_layer_is_left_alone_and_moves_when_it_is_thawed(method):
    model, mask = net(), mask_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(mask, model, optimizer)
    anymask.rewire(hold, method, total_steps=9, every="2it")
    model[0].weight.requires_grad_(False)
    train(model, optimizer, 3)
    assert torch.equal(hold.mask["0.weight"], mask["0.weight"])
    assert not torch.equal(hold.mask["2.weight"], mask["2.weight"])
    model[0].weight.requires_grad_(True)
    train(model, optimizer, 3)
    assert not torch.equal(hold.mask["0.weight"], mask["0.weight"])


def test_a_layer_that_got_no_gradient_is_left_alone_by_rigl():
    model, mask = net(), mask_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(mask, model, optimizer)
    anymask.rewire(hold, "rigl", total_steps=9, every="1it")
    model[0](batches()[0]).square().mean().backward()
    optimizer.step()
    assert torch.equal(hold.mask["2.weight"], mask["2.weight"])
    assert not torch.equal(hold.mask["0.weight"], mask["0.weight"])


@pytest.mark.parametrize("none", [True, False])
def test_gradients_are_summed_over_batches_and_what_is_thrown_away_is_not_counted(none):
    model, mask = net(), mask_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    anymask.hold(mask, model, optimizer)
    plain = net()
    mask.apply(plain)
    first, *rest = batches(3)
    heard = DenseGradients(dict(model.named_parameters()))
    (model(first) - 1).square().mean().backward()
    optimizer.zero_grad(set_to_none=none)
    for x in rest:
        (model(x) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3) if x is rest[-1] else None
        (plain(x) - 1).square().mean().backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(heard.mean()[name], p.grad)
    heard.remove()
    assert heard.mean() == {}


def test_gradients_are_heard_only_in_the_step_before_a_move():
    model, mask = net(), mask_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rewiring = anymask.rewire(anymask.hold(mask, model, optimizer), "rigl", total_steps=9, every="3it")
    listening = []
    for x in batches(9):
        listening.append(bool(model[0].weight._backward_hooks))
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert listening == [step in (3, 6) for step in range(1, 10)]
    assert rewiring.settled


def test_gradients_of_half_precision_and_of_embeddings_are_heard():
    for weight in (nn.Parameter(torch.ones(3, 2, dtype=torch.float16)), nn.Parameter(torch.ones(3, 2))):
        heard = DenseGradients({"w": weight})
        for row in (0, 2, 2):
            nn.functional.embedding(torch.tensor([row]), weight, sparse=weight.dtype == torch.float32).sum().backward()
        found = heard.mean()["w"]
        assert found.tolist() == [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]
        assert found.dtype == torch.float32


# -- budgets and masks that do not go ----------------------------------------------------------------------------------


def shrink(model, mask, **how):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return anymask.rewire(anymask.hold(mask, model, optimizer), "gmp", **{"total_steps": 9, "every": "2it", **how})


def test_gradual_pruning_needs_a_sparsity_that_its_mask_can_shrink_to():
    model = net()
    with pytest.raises(SettingError, match="gmp came without sparsity"):
        shrink(model, dense_mask(model))
    with pytest.raises(SettingError, match=r"\[0, 1\)"):
        shrink(model, dense_mask(model), sparsity=1.0)
    with pytest.raises(MaskError, match="1 weights in 2 layers"):
        shrink(model, dense_mask(model), sparsity=0.98)
    with pytest.raises(MaskError, match="nothing to drop"):
        shrink(model, dense_mask(model), sparsity=0.0)
    with pytest.raises(MaskError, match=r"2\.weight \(3 of 11\).*scope='global'"):
        shrink(model, Mask({"0.weight": torch.ones(7, 6), "2.weight": torch.eye(3, 7)}), sparsity=0.5)
    with pytest.raises(MaskError, match="fewer weights"):
        shrink(model, mask_of(0.1), sparsity=0.5, scope="global")


def test_gradual_pruning_may_begin_with_a_sparse_mask():
    model, mask = net(), mask_of(0.8)
    rewiring = shrink(model, mask, sparsity=0.9, scope="global")
    train(model, rewiring.hold.optimizer, 9)
    assert rewiring.mask.kept == round(0.1 * 63)
    assert all(not (rewiring.mask[name] & ~mask[name]).any() for name in mask)


@pytest.mark.parametrize("scope", ["global", "uniform", "er", "erk", "balanced"])
def test_gradual_pruning_leaves_each_layer_a_weight(scope):
    model = net()
    with torch.no_grad():
        model[2].weight *= 1e-9
    rewiring = shrink(model, dense_mask(model), sparsity=1 - 2 / 63, scope=scope)
    train(model, rewiring.hold.optimizer, 9)
    assert {name: int(rewiring.mask[name].sum()) for name in SHAPES} == {"0.weight": 1, "2.weight": 1}


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_a_mask_with_nothing_to_move_or_a_sparsity_too_many_is_refused(method):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(dense_mask(model), model, optimizer)
    with pytest.raises(MaskError, match="finds nothing to move"):
        anymask.rewire(hold, method, total_steps=9, every="1it")
    hold.release()
    hold = anymask.hold(mask_of(), model, optimizer)
    with pytest.raises(SettingError, match="keeps as many weights as its mask"):
        anymask.rewire(hold, method, total_steps=9, every="1it", sparsity=0.9)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_full_layers_and_layers_of_one_kept_weight_stay(method):
    model = net()
    mask = Mask({"0.weight": torch.rand(7, 6) < 0.5, "2.weight": torch.ones(3, 7)})
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(mask, model, optimizer)
    anymask.rewire(hold, method, total_steps=9, every="1it")
    train(model, optimizer, 5)
    assert hold.mask["2.weight"].all()
    assert not torch.equal(hold.mask["0.weight"], mask["0.weight"])


def test_the_model_and_its_names_are_as_they_were():
    model, mask = net(), mask_of()
    before = fingerprint(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rewiring = anymask.rewire(anymask.hold(mask, model, optimizer), "rigl", total_steps=9, every="1it")
    train(model, optimizer, 9)
    assert fingerprint(model) == before
    rewiring.release()
    assert not any(p._backward_hooks for p in model.parameters())
