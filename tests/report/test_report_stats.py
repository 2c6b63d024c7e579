"""Laws of the paired statistics."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from anymask.errors import FileFormatError
from anymask.report import overall, paired
from anymask.report.cells import cells, newest
from anymask.report.overview import overviews
from anymask.report.stats import missing
from tests.report.made_rows import made_row, made_rows

SHARES = st.floats(0, 1, allow_nan=False)
PAIRS = st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=6)


def pair_rows(pairs, *, mask="snip", **more):
    return [
        made_row(mask, name, seed, test, **more)
        for seed, pair in enumerate(pairs)
        for name, test in zip(("default", "tost"), pair, strict=True)
    ]


def test_three_pairs_give_the_numbers_worked_out_by_hand():
    [found] = paired(pair_rows([(0.80, 0.81), (0.82, 0.85), (0.84, 0.86)]))
    assert (found.recipe, found.baseline, found.n) == ("tost", "default", 3)
    assert found.baseline_mean == pytest.approx(82.0)
    assert found.recipe_mean == pytest.approx(84.0)
    assert list(found.differences.values()) == pytest.approx([1.0, 3.0, 2.0])
    assert found.mean == pytest.approx(2.0)
    assert found.std == pytest.approx(1.0)
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975) of 2 degrees of freedom, from a printed table
    assert found.interval == pytest.approx((2.0 - half, 2.0 + half))
    assert found.verdict == "tied"


@given(st.lists(st.tuples(SHARES, SHARES), min_size=2, max_size=8).filter(lambda pairs: len({b - a for a, b in pairs}) > 1))
def test_interval_equals_that_of_scipys_paired_t_test(pairs):
    [found] = paired(pair_rows(pairs))
    truth = ttest_rel([100 * b for _, b in pairs], [100 * a for a, _ in pairs]).confidence_interval(0.95)
    assert found.interval == pytest.approx((truth.low, truth.high), abs=1e-9)


def test_one_pair_has_a_difference_but_no_interval():
    [found] = paired(pair_rows([(0.8, 0.9)]))
    assert (found.n, found.std, found.interval, found.verdict) == (1, None, None, "open")
    assert found.mean == pytest.approx(10.0)


@pytest.mark.parametrize(("gain", "verdict"), [(0.05, "won"), (-0.05, "lost"), (0.0, "tied")])
def test_verdict_asks_for_the_whole_interval_on_one_side(gain, verdict):
    [found] = paired(pair_rows([(0.5, 0.5 + gain + wobble) for wobble in (-0.001, 0.0, 0.001)]))
    assert found.verdict == verdict


@given(PAIRS)
def test_swapping_baseline_and_recipe_negates_every_difference(pairs):
    rows = pair_rows(pairs)
    [one], [other] = paired(rows), paired(rows, baseline="tost")
    assert other.differences == {seed: -difference for seed, difference in one.differences.items()}
    assert other.mean == -one.mean
    if one.interval:
        assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]))


@given(st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_order_of_rows_does_not_matter(rng: random.Random):
    rows = made_rows()
    mixed = rng.sample(rows, len(rows))
    assert paired(mixed) == paired(rows)
    assert overall(paired(mixed)) == overall(paired(rows))


def test_runs_that_differ_in_another_setting_are_never_paired():
    rows = [made_row("snip", "default", 0, 0.8, lr=0.1), made_row("snip", "tost", 0, 0.9, lr=0.2)]
    assert paired(rows) == []
    assert [(gap["recipe"], gap["lr"]) for gap in missing(cells(rows))] == [("default", 0.2)]


@pytest.mark.parametrize("part", ["digest", "weights"])
def test_runs_that_began_with_other_masks_or_weights_are_no_pair_and_those_that_do_not_say_are(part):
    begun = {("default", 0): "a", ("tost", 0): "a", ("default", 1): "a", ("tost", 1): "b", ("default", 2): None, ("tost", 2): "b"}
    rows = [made_row("snip", recipe, seed, 0.8) for recipe, seed in begun]
    rows = [row if said is None else {**row, "mask": {part: said}} for row, said in zip(rows, begun.values(), strict=True)]
    [found] = paired(rows)
    assert (list(found.pairs), found.unlike) == ([0, 2], (1,))
    assert missing(cells(rows)) == []


def test_a_run_from_a_tickets_weights_and_one_from_the_initialisation_are_no_pair():
    begun = {"default": {"digest": "a", "weights": "b"}, "tost": {"digest": "a"}}
    rows = [{**made_row("snip", recipe, 0, 0.8), "mask": mask} for recipe, mask in begun.items()]
    [found] = paired(rows)
    assert (found.n, found.unlike) == (0, (0,))


def test_of_two_rows_with_one_id_the_later_counts():
    rows = pair_rows([(0.8, 0.7)])
    again = made_row("snip", "tost", 0, 0.9)
    assert [found.mean for found in paired([*rows, again])] == [pytest.approx(10.0)]
    assert [found.mean for found in paired([again, *rows])] == [pytest.approx(-10.0)]


def holding(row, *techniques):
    return {**row, "id": f"{row['id']} {techniques}", "techniques": list(techniques)}


def test_a_recipe_file_that_was_edited_between_seeds_is_two_recipes_named_by_what_differs():
    smooth = {"name": "label_smoothing", "eps": 0.1, "schedule": {"shape": "step", "end": "100%"}}
    edited = {**smooth, "eps": 0.9}
    rows = [holding(made_row("snip", "default", seed, 0.8)) for seed in (0, 1)]
    rows += [holding(made_row("snip", "my.toml", seed, 0.9), each) for seed, each in enumerate((smooth, edited))]
    names = ["my.toml (label_smoothing.eps=0.1)", "my.toml (label_smoothing.eps=0.9)"]
    assert [(found.recipe, found.n) for found in paired(rows)] == [(name, 1) for name in names]
    assert [(found.recipe, found.n) for found in paired(rows[::-1])] == [(name, 1) for name in names]
    assert paired(rows, baseline="my.toml") == []  # there is no such one recipe
    assert [found.recipe for found in paired(rows, baseline=names[0]) if found.n] == ["default"]
    assert (newest(rows, "my.toml"), newest(rows, "default"), newest(rows[:3], "my.toml")) == (names[1], "default", "my.toml")


def test_recipes_of_one_name_with_other_techniques_are_told_apart_by_them():
    sam, smooth = {"name": "sam", "rho": 0.1}, {"name": "label_smoothing", "schedule": {"end": "60%"}}
    shorter = {"name": "label_smoothing", "schedule": {"end": "50%"}}
    several = [(), (sam,), (sam, smooth), (smooth, sam), (sam, shorter)]
    rows = [made_row("snip", "default", 0, 0.8), *(holding(made_row("snip", "tost", 0, 0.9), *each) for each in several)]
    assert [found.recipe for found in paired(rows)] == [
        "tost (label_smoothing+sam, label_smoothing.schedule.end=60%)",
        "tost (no technique)",
        "tost (sam)",
        "tost (sam+label_smoothing, label_smoothing.schedule.end=50%)",
        "tost (sam+label_smoothing, label_smoothing.schedule.end=60%)",
    ]


def test_runs_without_partner_are_counted_and_their_partners_named():
    rows = [*pair_rows([(0.8, 0.9), (0.8, 0.9)]), made_row("snip", "default", 7, 0.8), made_row("snip", "tost", 8, 0.9)]
    [found] = paired(rows)
    assert found.n == 2
    assert [(gap["recipe"], gap["seed"]) for gap in missing(cells(rows))] == [("default", 8), ("tost", 7)]


def test_a_baseline_alone_lacks_nothing_and_a_recipe_alone_lacks_its_baseline():
    assert missing(cells([made_row("dense", "default", 0, 0.9)])) == []
    assert [gap["recipe"] for gap in missing(cells([made_row("snip", "tost", 0, 0.9)]))] == ["default"]


def test_overall_averages_masks_within_a_seed_before_the_interval():
    rows = pair_rows([(0.80, 0.82), (0.80, 0.84)]) + pair_rows([(0.70, 0.74), (0.70, 0.78)], mask="synflow")
    [found] = overall(paired(rows))
    assert (found.n, found.cells) == (2, 2)
    assert list(found.differences.values()) == pytest.approx([3.0, 6.0])
    half = 12.706204736432095 * 3 / math.sqrt(2) / math.sqrt(2)  # t(0.975) of 1 degree of freedom: seeds, not 4 runs
    assert found.interval == pytest.approx((4.5 - half, 4.5 + half))


def test_overall_keeps_sparsities_and_recipes_apart_and_counts_verdicts():
    sure, unsure = [(0.5, 0.600), (0.5, 0.601), (0.5, 0.602)], [(0.5, 0.6), (0.5, 0.4), (0.5, 0.5)]
    worse = [(b, a) for a, b in sure]
    rows = pair_rows(sure) + pair_rows(unsure, mask="grasp") + pair_rows(worse, mask="synflow") + pair_rows(sure, sparsity=0.9)
    low, high = overall(paired(rows))
    assert (low.settings["sparsity"], low.cells, low.won, low.lost, low.tied) == (0.9, 1, 1, 0, 0)
    assert (high.settings["sparsity"], high.cells, high.won, high.lost, high.tied) == (0.98, 3, 1, 1, 1)
    assert high.score == "won 1, tied 1, lost 1"
    [once] = overall(paired(pair_rows(sure[:1])))
    assert once.score == "won 0, tied 0, lost 0, open 1"


def test_the_effect_against_sparsity_counts_cells_of_one_seed_as_open():
    sure = [(0.5, 0.600), (0.5, 0.601)]
    _, effect = overviews(pair_rows(sure) + pair_rows(sure[:1], mask="grasp"))
    counted = dict(zip(effect.header, effect.lines[0], strict=True))
    assert [counted[name] for name in ("cells", "won", "tied", "lost", "open")] == ["2", "1", "0", "0", "1"]


def test_overall_is_over_masks_alone_and_never_over_learning_rates_or_other_data():
    one, other = {"lr": 0.1, "data_hash": "a"}, {"lr": 0.2, "data_hash": "b"}
    rows = pair_rows([(0.8, 0.9)], **one) + pair_rows([(0.8, 0.7)], **other) + pair_rows([(0.8, 0.86)], mask="grasp", **one)
    rows += pair_rows([(0.8, 0.88)], mask="my.mask", mask_hash="c", **one)
    found = {(each.settings["lr"], each.settings["data_hash"]): (each.cells, each.mean) for each in overall(paired(rows))}
    assert found == {(0.1, "a"): (3, pytest.approx(8.0)), (0.2, "b"): (1, pytest.approx(-10.0))}


def test_overall_leaves_out_and_names_seeds_that_some_mask_lacks():
    rows = pair_rows([(0.8, 0.9), (0.8, 0.9), (0.8, 0.9)]) + pair_rows([(0.8, 0.7), (0.8, 0.7)], mask="synflow")
    [found] = overall(paired(rows))
    assert (found.n, found.left_out) == (2, (2,))
    assert found.mean == pytest.approx(0.0)


@pytest.mark.parametrize("broken", [{"id": "a"}, {"settings": {"mask": "snip"}, "accuracy": {"test": None}}])
def test_a_row_that_lacks_something_is_named_with_what_it_lacks(broken):
    with pytest.raises(FileFormatError, match=r"row 2 lacks .*settings\.seed.*accuracy\.test"):
        paired([made_row("snip", "default", 0, 0.8), broken])


@pytest.mark.parametrize("test", [3.7156, -0.1, math.nan, math.inf])
def test_an_accuracy_that_is_no_share_is_refused(test):
    with pytest.raises(FileFormatError, match=r"row 2 has accuracy\.test .*\[0, 1\]"):
        paired([made_row("snip", "default", 0, 0.8), made_row("snip", "tost", 0, test)])


@pytest.mark.parametrize(("wrong", "says"), [({"sparsity": "90%"}, r"settings\.sparsity '90%'"), ({"seed": "a"}, r"settings\.seed 'a'")])
def test_settings_that_cannot_be_put_in_order_are_refused(wrong, says):
    row = made_row("snip", "default", 0, 0.8)
    with pytest.raises(FileFormatError, match=rf"row 2 has {says}.*a share of zeros, and a whole number"):
        paired([row, {**row, "id": "b", "settings": row["settings"] | wrong}])


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: "abc"} for name in ("settings", "accuracy", "techniques", "versions", "machine", "density", "curves", "time")),
        {"id": ["a"]},
        {"techniques": [{"x": 1}]},
        {"techniques": 3},
        *({"settings": {key: value}} for key, value in (("recipe", 3), ("sparsity", math.nan), ("sparsity", math.inf), ("seed", 0.5))),
    ],
)
def test_values_of_other_kinds_are_refused_and_named(wrong):
    row = made_row("snip", "default", 0, 0.8)
    ((name, value),) = wrong.items()
    with pytest.raises(FileFormatError, match=rf"row 2 has {'settings.' if isinstance(value, dict) else name}"):
        paired([row, {**row, "id": "b", name: row["settings"] | value if isinstance(value, dict) else value}])
