"""Patterns: what a unit and a window is, by hand; what every criterion, scope and pattern together promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import anymask
from anymask.errors import MaskError
from anymask.prunables import rows_of
from anymask.pruning import METHODS
from anymask.pruning.patterns import pattern
from anymask.pruning.select import keep_in_windows, keep_units
from anymask.pruning.selector import SCOPES, Selector

FORMS = ("unstructured", "2:4", "1:2", "2x2", "3x2", "channel", "fan-in")

# few distinct values: ties at nearly every threshold
values = st.sampled_from([0.0, 0.25, 1.0, 4.0])
shapes = st.lists(st.sampled_from([(1, 1), (5, 3), (4, 2, 3), (3, 4, 2, 2), (2, 8)]), min_size=1, max_size=3)


def choose(nets, name, *, scope="global", floor=0):
    named = {f"layer{i}": shape for i, shape in enumerate(nets)}
    rows = {layer: rows_of(shape) for layer, shape in named.items()}
    generator = torch.Generator().manual_seed(0)
    return Selector(named, rows, scope=scope, pattern=pattern(name), floor=floor, generator=generator)


def draw_scores(data, nets):
    return {
        f"layer{i}": torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64).reshape(shape)
        for i, shape in enumerate(nets)
        for n in [math.prod(shape)]
    }


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_rows_are_outputs_by_places_by_inputs():
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)  # two outputs, three inputs, four places
    rows = rows_of(weight.shape)
    assert rows.shape == (2, 4, 3)
    assert rows[1, 2].tolist() == weight[1, :, 1, 0].tolist()


def test_rows_of_a_transposed_convolution_are_those_whose_output_they_make():
    conv = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
    rows = rows_of(conv.weight.shape, transposed=2)
    assert rows.shape == (6, 4, 2)
    x = torch.randn(1, 4, 3, 3)
    for output in range(6):
        only = torch.zeros(conv.weight.numel())
        only[rows[output].reshape(-1)] = 1
        out = F.conv_transpose2d(x, conv.weight * only.reshape(conv.weight.shape), groups=2)
        assert out.abs().sum((0, 2, 3)).nonzero().reshape(-1).tolist() == [output]


def test_two_of_every_four_inputs_at_the_same_place_are_kept():
    conv = nn.Conv2d(8, 1, (1, 2), bias=False)
    row = torch.tensor([1.0, 2, 3, 4, 8, 7, 6, 5])
    conv.weight.data = torch.stack([row, row.flip(0)], dim=1).reshape(1, 8, 1, 2)
    kept = anymask.prune(conv, "magnitude+2:4")["weight"]
    assert kept[0, :, 0, 0].int().tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert kept[0, :, 0, 1].int().tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    conv.weight.data[0, :, 0, 1] = row
    assert anymask.prune(conv, "magnitude", pattern="2:4")["weight"][0, :, 0, 1].int().tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_blocks_of_outputs_by_inputs_go_by_their_mean_and_are_smaller_at_the_edges():
    linear = nn.Linear(3, 4, bias=False)
    linear.weight.data = torch.tensor([[1.0, 1, 9], [1, 1, 0], [2, 2, 0], [2, 2, 0]])
    # means of the 2x2 blocks: 1 and, at the edge, 4.5; 2 and 0
    for kept, wanted in (
        (2, [[0, 0, 1]] * 2 + [[0, 0, 0]] * 2),
        (6, [[0, 0, 1]] * 2 + [[1, 1, 0]] * 2),
        (10, [[1, 1, 1]] * 2 + [[1, 1, 0]] * 2),
    ):
        assert anymask.prune(linear, "magnitude+2x2", sparsity=1 - kept / 12)["weight"].int().tolist() == wanted
    # of 5 weights the block of 4 that is next does not fit into the 3 left, but the worse one of 2 does
    assert anymask.prune(linear, "magnitude+2x2", sparsity=1 - 5 / 12)["weight"].int().tolist() == [[0, 0, 1]] * 4


def test_whole_channels_are_those_of_torch_prune():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 10, 3)
    mask = anymask.prune(conv, "magnitude+channel", sparsity=0.6)
    torch_prune.ln_structured(conv, "weight", amount=0.6, n=1, dim=0)
    assert torch.equal(mask["weight"], conv.weight_mask.bool())


def test_constant_fan_in_keeps_the_best_of_each_output():
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2, 3, 4], [50, 70, 60, 80]])
    mask = anymask.prune(linear, "magnitude+fan-in", sparsity=0.5)
    assert mask["weight"].int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]


# -- units and windows alone -------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(values, st.integers(1, 5)), min_size=1, max_size=12), st.data())
def test_units_stay_within_the_budget_and_none_that_is_left_out_would_fit(units, data):
    scores, sizes = (torch.tensor(column) for column in zip(*units, strict=True))
    count = data.draw(st.integers(0, int(sizes.sum())))
    kept = keep_units(scores.double(), sizes, count, generator=torch.Generator())
    left = count - int(sizes[kept].sum())
    assert left >= 0
    assert bool((sizes[~kept] > left).all())
    for out in (~kept).nonzero():  # what is better and left out did not fit into what the better ones had left
        better = kept & (scores >= scores[out])
        assert int(sizes[better].sum() + sizes[out]) > count


@given(st.lists(st.lists(values, min_size=4, max_size=4), min_size=1, max_size=6), st.integers(0, 4))
def test_windows_keep_their_best(lines, each):
    scores = torch.tensor(lines, dtype=torch.float64)
    kept = keep_in_windows(scores, each, generator=torch.Generator())
    assert kept.sum(1).tolist() == [each] * len(lines)
    for line, keep in zip(scores, kept, strict=True):
        assert each in (0, 4) or line[keep].min() >= line[~keep].max()


def test_ties_in_windows_and_between_units_favour_no_position():
    generator = torch.Generator().manual_seed(0)
    hits = keep_in_windows(torch.ones(4000, 4), 1, generator=generator).double().sum(0)
    assert bool(((hits - 1000).abs() < 140).all()), hits  # p = 1/4 of 4000: standard deviation 27; five of them
    sizes = torch.ones(5, dtype=torch.int64)
    hits = sum(keep_units(torch.ones(5), sizes, 1, generator=generator).double() for _ in range(2000))
    assert bool(((hits - 400).abs() < 90).all()), hits


# -- laws of the whole -------------------------------------------------------------------------------------------------
@given(shapes, st.sampled_from(["unstructured", "2x2", "3x2", "channel", "fan-in"]), st.sampled_from(SCOPES), st.integers(0, 1), st.data())
def test_the_budget_is_kept_and_the_pattern_with_it(nets, name, scope, floor, data):
    selector = choose(nets, name, scope=scope, floor=floor)
    count = data.draw(st.integers(sum(selector.least.values()), selector.total))
    kept = selector.keep(draw_scores(data, nets), count)
    assert {layer: k.shape for layer, k in kept.items()} == {layer: torch.Size(shape) for layer, shape in selector.shapes.items()}
    got = sum(int(k.sum()) for k in kept.values())
    room = [selector.step[layer] for layer, k in kept.items() if not bool(k.all())]  # of the layers that could take more
    assert got == count if name == "unstructured" else (0 <= count - got < max(room) if room else got <= count)
    assert all(int(k.sum()) >= floor for k in kept.values())
    assert all(follows(kept[layer], rows, pattern(name)) for layer, rows in selector.rows.items())


def follows(kept, rows, form):
    flat = kept.reshape(-1)[rows]
    if form.windows is not None:
        return len(set(kept.reshape(-1)[form.windows(rows)].sum(1).tolist())) == 1
    return form.units is None or all(
        len(set(flat[form.units(rows) == unit].tolist())) == 1 for unit in range(int(form.units(rows).max()) + 1)
    )


@given(shapes, st.sampled_from(["unstructured", "2x2", "channel", "fan-in"]), st.sampled_from(SCOPES), st.data())
def test_in_rounds_nothing_comes_back_and_sparsity_0_keeps_all(nets, name, scope, data):
    selector = choose(nets, name, scope=scope)
    scores = draw_scores(data, nets)
    before = selector.keep(scores, selector.total)
    assert all(bool(k.all()) for k in before.values())
    for count in sorted(data.draw(st.lists(st.integers(0, selector.total), max_size=3)), reverse=True):
        after = selector.keep(draw_scores(data, nets), count, alive=before)
        assert all(bool((before[layer] | ~after[layer]).all()) for layer in after)
        assert sum(int(k.sum()) for k in after.values()) <= count
        before = after


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 4)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_any_method_goes_with_any_scope_and_pattern(method, scope, form):
    torch.manual_seed(0)
    model, loader = Net(), [(torch.randn(4, 4, 5, 5), torch.arange(4))]

    def train(model, mask, first, last):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        if mask is not None:
            mask.apply(model)

    how = {"data": loader, "train": train, "rewind_step": 1 if method == "lottery-rewind" else None, "rounds": 2, "on_collapse": "avoid"}
    mask = anymask.prune(model, f"{method}+{form}+{scope}", sparsity=None if ":" in form else 0.4, **how)
    assert (mask.info["scope"], mask.info["pattern"]) == (scope, form)
    steps = {"unstructured": 1, "2:4": 1, "1:2": 1, "2x2": 4, "3x2": 6, "channel": 36, "fan-in": 8}
    wanted = round((0.5 if ":" in form else 0.6) * mask.total)
    assert 0 <= wanted - mask.kept < 2 * steps[form]
    assert all(follows(mask[name], rows_of(mask[name].shape), pattern(form)) for name in mask)


def test_n_of_m_is_refused_where_it_does_not_fit_and_works_with_that_layer_left_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(MaskError, match=r"0\.weight \(3 inputs\).*multiple of 4.*exclude=\['0\.weight'\]"):
        anymask.prune(model, "magnitude+2:4", sparsity=0.5)
    assert anymask.prune(model, "magnitude+2:4", sparsity=0.5, exclude=["0"]).sparsity == 0.5
