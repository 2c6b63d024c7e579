"""Layer densities: against numbers worked out by hand, and the laws that hold for any network."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anymask.pruning.distribution import DISTRIBUTIONS, densities, layer_counts

shape = st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple)
nets = st.lists(shape, min_size=1, max_size=6).map(lambda shapes: {f"l{i}": s for i, s in enumerate(shapes)})
names = st.sampled_from(sorted(DISTRIBUTIONS))

NET = {"conv": (8, 4, 3, 3), "fc": (10, 8), "head": (10, 10)}  # 288, 80 and 100 weights


def total(net):
    return sum(math.prod(s) for s in net.values())


@pytest.mark.parametrize(
    ("distribution", "count", "by_hand"),
    [
        # ERK: r * size = 8 + 4 + 3 + 3 = 18, 10 + 8 = 18, 10 + 10 = 20; eps = 100 / 56; kept eps * (18, 18, 20)
        ("erk", 100, {"conv": 1800 / 56 / 288, "fc": 1800 / 56 / 80, "head": 2000 / 56 / 100}),
        # all of fc (0.225 * 368 / 56 > 1) and of head (0.2 * 368 / 56 > 1) are kept; conv takes the rest: 188 of 288
        ("erk", 368, {"conv": 188 / 288, "fc": 1.0, "head": 1.0}),
        # ER: r = 12/32, 18/80, 20/100; r * size = 108, 18, 20; eps = 100 / 146
        ("er", 100, {"conv": 100 / 146 * 12 / 32, "fc": 100 / 146 * 18 / 80, "head": 100 / 146 * 20 / 100}),
        ("uniform", 117, {"conv": 0.25, "fc": 0.25, "head": 0.25}),
    ],
)
def test_densities_equal_the_formula_by_hand(distribution, count, by_hand):
    assert densities(NET, count, distribution=distribution) == pytest.approx(by_hand, rel=1e-12)


def test_equal_remainders_go_to_the_earlier_layers():
    assert layer_counts(dict.fromkeys("abcd", (3, 1)), 6, distribution="uniform") == {"a": 2, "b": 2, "c": 1, "d": 1}


@given(nets, names, st.data())
def test_counts_sum_to_the_budget_and_fit_their_layers(net, distribution, data):
    count = data.draw(st.integers(0, total(net)))
    counts = layer_counts(net, count, distribution=distribution)
    assert sum(counts.values()) == count
    assert all(0 <= counts[name] <= math.prod(net[name]) for name in net)
    exact = densities(net, count, distribution=distribution)
    assert all(abs(counts[name] - exact[name] * math.prod(net[name])) < 1 + 1e-6 for name in net)


@given(nets, names, st.data())
def test_the_floor_holds_and_the_sum_with_it(net, distribution, data):
    assume(total(net) >= len(net))
    count = data.draw(st.integers(len(net), total(net)))
    counts = layer_counts(net, count, distribution=distribution, floor=1)
    assert sum(counts.values()) == count
    assert all(1 <= counts[name] <= math.prod(net[name]) for name in net)


@given(nets, names, st.data())
def test_densities_share_one_factor_below_1_and_the_excess_is_spread(net, distribution, data):
    count = data.draw(st.integers(0, total(net)))
    found = densities(net, count, distribution=distribution)
    assert sum(found[name] * math.prod(net[name]) for name in net) == pytest.approx(count, abs=1e-6)
    factors = {name: found[name] / DISTRIBUTIONS[distribution](net[name]) for name in net}
    below = [factors[name] for name in net if found[name] < 1]
    if below:
        assert below == pytest.approx([below[0]] * len(below))
        assert all(factors[name] <= below[0] * (1 + 1e-9) for name in net)  # a full layer would get more, were there room


@given(nets, names, st.data())
def test_no_layer_loses_density_as_sparsity_falls(net, distribution, data):
    more = data.draw(st.integers(0, total(net)))
    fewer = data.draw(st.integers(0, more))
    low, high = densities(net, fewer, distribution=distribution), densities(net, more, distribution=distribution)
    assert all(low[name] <= high[name] + 1e-9 for name in net)
