"""LRsI against formulas written out by hand in float64 numpy: out = (x W1' + b1) W2' + b2, loss = |out - t|^2 / 2n."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from anymask.mask import Mask
from anymask.techniques.rescale import RescaleSettings, rescale


def half_square(out, target):
    return 0.5 * (out - target).square().sum(1).mean()


def loss_by_hand(w, x, t):
    out = (x @ w["0.weight"].T + w["0.bias"]) @ w["1.weight"].T + w["1.bias"]
    return 0.5 * np.sum((out - t) ** 2) / len(x)


def gradient_by_hand(w, x, t):
    h = x @ w["0.weight"].T + w["0.bias"]
    e = (h @ w["1.weight"].T + w["1.bias"] - t) / len(x)
    back = e @ w["1.weight"]
    return {"0.weight": back.T @ x, "0.bias": back.sum(0), "1.weight": e.T @ h, "1.bias": e.sum(0)}


def gradient_change_by_hand(w, d, x, t):
    """The derivative of the gradient at w along d: the product rule, line by line of `gradient_by_hand`."""
    h = x @ w["0.weight"].T + w["0.bias"]
    dh = x @ d["0.weight"].T + d["0.bias"]
    e = (h @ w["1.weight"].T + w["1.bias"] - t) / len(x)
    de = (dh @ w["1.weight"].T + h @ d["1.weight"].T + d["1.bias"]) / len(x)
    dback = de @ w["1.weight"] + e @ d["1.weight"]
    return {"0.weight": dback.T @ x, "0.bias": dback.sum(0), "1.weight": de.T @ h + e.T @ dh, "1.bias": de.sum(0)}


def dot(a, b):
    return sum(float(np.sum(a[name] * b[name])) for name in a)


def times(a, b):
    return {name: a[name] * b[name] for name in a}


def rescale_by_hand(start, keep, batches, settings):
    names = list(start)
    start = times(start, keep)
    scale = dict.fromkeys(names, 1.0)
    memory = {over: dict.fromkeys(names, (0.0, 0.0)) for over in (False, True)}
    count = {False: 0, True: 0}
    norms = []
    for i in range(settings.iterations):
        (x, t), (x2, t2) = batches[i % len(batches)], batches[(i + 1) % len(batches)]
        w = {name: scale[name] * start[name] for name in names}
        g = times(gradient_by_hand(w, x, t), keep)
        norm = math.sqrt(dot(g, g))
        norms.append(norm)
        over = norm > settings.gamma
        slope = {}
        if over:
            for name in names:  # d||g|| / ds = <g, dg/ds> / ||g||
                along = {n: start[n] if n == name else np.zeros_like(start[n]) for n in names}
                slope[name] = dot(g, times(gradient_change_by_hand(w, along, x, t), keep)) / norm
        else:
            half = len(x) // 2
            x2, t2 = np.concatenate([x[:half], x2[:half]]), np.concatenate([t[:half], t2[:half]])
            ahead = {name: w[name] - settings.eta * g[name] / norm for name in names}
            there = gradient_by_hand(ahead, x2, t2)
            slope = {name: float(np.sum(there[name] * start[name])) / settings.eta for name in names}
        count[over] += 1
        for name in names:
            c = min(max(slope[name], -settings.clip), settings.clip)
            m, v = memory[over][name]
            m, v = 0.9 * m + 0.1 * c, 0.999 * v + 0.001 * c * c
            memory[over][name] = (m, v)
            step = m / (1 - 0.9 ** count[over]) / (math.sqrt(v / (1 - 0.999 ** count[over])) + 1e-8)
            least = settings.min_bias_scale if "bias" in name else settings.min_weight_scale
            scale[name] = max(scale[name] - settings.lr * step, least)
    return scale, norms, count


def linear_case(seed, *, inputs=5, hidden=4, outputs=3):
    """A two-layer linear net in float64, a mask of it, three batches of 6, and all of it as numpy."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)).double()
    mask = Mask({name: torch.rand_like(p) < 0.6 for name, p in net.named_parameters() if "weight" in name})
    batches = [(torch.randn(6, inputs).double(), torch.randn(6, outputs).double()) for _ in range(3)]
    start = {name: p.detach().numpy().copy() for name, p in net.named_parameters()}
    keep = {name: mask[name].numpy().astype(float) if name in mask else np.ones_like(v) for name, v in start.items()}
    return net, mask, batches, start, keep, [(x.numpy(), t.numpy()) for x, t in batches]


def test_the_hand_written_formulas_agree_with_differences():
    _, _, _, start, _, batches = linear_case(0)
    x, t = batches[0]
    rng = np.random.default_rng(0)
    d = {name: rng.standard_normal(v.shape) for name, v in start.items()}
    h = 1e-6
    up, down = ({name: start[name] + sign * h * d[name] for name in d} for sign in (1, -1))
    slope = (loss_by_hand(up, x, t) - loss_by_hand(down, x, t)) / (2 * h)
    assert slope == pytest.approx(dot(gradient_by_hand(start, x, t), d), rel=1e-7)
    high, low = gradient_by_hand(up, x, t), gradient_by_hand(down, x, t)
    for name, change in gradient_change_by_hand(start, d, x, t).items():
        np.testing.assert_allclose((high[name] - low[name]) / (2 * h), change, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("gamma", "branches"), [(float("inf"), {False}), (1e-3, {True}), (None, {False, True})], ids=["objective", "norm", "both in turn"]
)
@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_scales_equal_the_hand_written_ones(gamma, branches, clip):
    net, mask, batches, start, keep, arrays = linear_case(1)
    settings = RescaleSettings(iterations=12, gamma=1.0, clip=clip, lr=0.03)
    if gamma is None:  # halfway between the norms met: some are over it and some are not
        _, norms, _ = rescale_by_hand(start, keep, arrays, replace(settings, gamma=float("inf")))
        gamma = float(np.median(norms))
    settings = replace(settings, gamma=gamma)
    scales, norms, count = rescale_by_hand(start, keep, arrays, settings)
    assert {over for over, n in count.items() if n} == branches
    done = rescale(net, batches, mask=mask, loss=half_square, settings=settings)
    assert done.scales == pytest.approx(scales, rel=1e-9)
    assert done.norms == pytest.approx(norms, rel=1e-9)
    for name, parameter in net.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), scales[name] * start[name] * keep[name], rtol=1e-9)


@hypothesis_settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.3, 1.0, 3.0]), st.sampled_from([0.02, 0.3]))
def test_scales_equal_the_hand_written_ones_for_any_net(seed, inputs, hidden, gamma, eta):
    net, mask, batches, start, keep, arrays = linear_case(seed, inputs=inputs, hidden=hidden)
    settings = RescaleSettings(iterations=5, gamma=gamma, eta=eta)
    scales, _, _ = rescale_by_hand(start, keep, arrays, settings)
    assert rescale(net, batches, mask=mask, loss=half_square, settings=settings).scales == pytest.approx(scales, rel=1e-6)
