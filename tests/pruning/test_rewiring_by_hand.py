"""Moves of a mask against the papers' formulas written out by hand, in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import anymask
from anymask import Mask
from anymask.pruning.dynamic import GROW, dense_mask

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
    monkeypatch.setitem(GROW, "random", lambda weight, *_: torch.from_numpy(lot["0.weight" if weight.shape == (7, 6) else "2.weight"]))
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
