"""Laws of choosing the best: exact, best, nested, unbiased, by layer at least the floor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anymask.errors import MaskError
from anymask.pruning.select import check_finite, keep_best

# few distinct values: ties at nearly every threshold
layers = st.lists(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 0.5000000001, 3.0]), min_size=1, max_size=9), min_size=1, max_size=4)


def best(values, count, *, seed=0, floor=0):
    scores = {f"layer{i}": torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}
    kept = keep_best(scores, count, generator=torch.Generator().manual_seed(seed), floor=floor)
    return torch.cat(list(scores.values())), torch.cat(list(kept.values())), kept


@given(layers, st.data(), st.integers(0, 9))
def test_exactly_count_are_kept_and_none_is_worse_than_one_left_out(values, data, seed):
    count = data.draw(st.integers(0, sum(map(len, values))))
    scores, kept, _ = best(values, count, seed=seed)
    assert int(kept.sum()) == count
    if 0 < count < len(scores):
        assert scores[kept].min() >= scores[~kept].max()


@given(layers, st.data(), st.integers(0, 1))
def test_fewer_kept_are_a_subset_of_more_kept(values, data, floor):
    more = data.draw(st.integers(len(values), max(len(values), sum(map(len, values)))))
    fewer = data.draw(st.integers(len(values), more))
    _, large, _ = best(values, more, floor=floor)
    _, small, _ = best(values, fewer, floor=floor)
    assert bool((large | ~small).all())


@given(layers, st.data())
def test_the_floor_holds_in_every_layer_within_the_same_count(values, data):
    count = data.draw(st.integers(len(values), sum(map(len, values))))
    _, together, kept = best(values, count, floor=1)
    assert int(together.sum()) == count
    for name, values_of_layer in zip(kept, values, strict=True):
        chosen = torch.tensor(values_of_layer)[kept[name]]
        assert len(chosen) >= 1
        assert chosen.max() == max(values_of_layer)  # the floor is a layer's best, not any


def test_ties_favour_no_position():
    hits = sum(best([[1.0] * 10], 3, seed=seed)[1].double() for seed in range(2000))
    # 2000 draws with p = 0.3: standard deviation 20.5; five of them
    assert bool(((hits - 600).abs() < 103).all()), hits


def test_scores_keep_their_shapes_and_any_dtype_ranks():
    scores = {"a": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4), "b": torch.arange(6).reshape(1, 2, 3)}
    kept = keep_best(scores, 3, generator=torch.Generator())
    assert {name: k.shape for name, k in kept.items()} == {"a": (3, 4), "b": (1, 2, 3)}
    assert kept["a"].nonzero().tolist() == [[2, 1], [2, 2], [2, 3]]


def test_minus_infinity_is_never_kept_while_there_is_something_else():
    _, kept, _ = best([[-torch.inf, -5.0, -torch.inf, 0.0]], 2)
    assert kept.tolist() == [False, True, False, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_cannot_be_ranked_are_refused_by_name(bad):
    scores = {"fine": torch.ones(3), "broken.weight": torch.tensor([1.0, bad])}
    with pytest.raises(MaskError, match=r"snip gave NaN or infinite scores for broken\.weight\."):
        check_finite(scores, "snip")
