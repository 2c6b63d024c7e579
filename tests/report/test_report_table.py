"""The Markdown tables say every number, and what is missing."""

import re

from anymask.report import failed_table, grid, paired, table
from tests.report.made_rows import made_row, made_rows

GOLDEN = """\
### fashion-mnist-5k, demonet, 12 epochs, 2 seeds

| sparsity | mask | default | tost | tost - default, points [95% CI] | n |
|---|---|---|---|---|---|
| 98% | snip | 81.00 ± 1.41 | 83.50 ± 2.12 | +2.50 [-3.85, +8.85] | 2 |
| 98% | synflow | 85.00 ± 1.41 | 87.00 ± n/a | +3.00 [n/a] | 1 |
| 98% | all masks | 82.00 ± n/a | 84.50 ± n/a | +2.50 [n/a] | 1 |
| 0% | dense (reference) | 91.00 ± 1.41 | - | - | - |

- Accuracies are test accuracies in %"""


def small_rows():
    tests = {
        ("snip", "default"): [0.80, 0.82],
        ("snip", "tost"): [0.82, 0.85],
        ("synflow", "default"): [0.84, 0.86],
        ("synflow", "tost"): [0.87],
        ("dense", "default"): [0.90, 0.92],
    }
    return [
        made_row(mask, recipe, seed, test, sparsity=0.0 if mask == "dense" else 0.98)
        for (mask, recipe), values in tests.items()
        for seed, test in enumerate(values)
    ]


def test_small_sweep_gives_the_golden_table():
    assert table(small_rows()).startswith(GOLDEN)


def test_missing_pairs_and_left_out_seeds_are_said():
    text = table(small_rows())
    assert "missing beside a finished partner, which is in no difference: 1 (tost on synflow at 98%, seed 1)" in text
    assert "seeds left out because a mask lacks them: 1" in text
    assert "No pair is incomplete." in table(made_rows())


def test_pairs_that_are_none_because_their_masks_differ_are_said():
    rows = [made_row("snip", recipe, seed, 0.8) | {"mask": {"digest": recipe * seed}} for recipe in ("default", "tost") for seed in (0, 1)]
    said = "Pairs left out because they began with other masks or weights, or had other teachers: 1 (tost on snip at 98%, seed 1)."
    assert said in table(rows)
    assert said in grid(rows)
    assert "Pairs left out" not in table(small_rows())
    taught = [made_row("snip", recipe, seed, 0.8) | {"teacher": recipe * seed} for recipe in ("default", "tost") for seed in (0, 1)]
    assert said in table(taught)


def test_pairs_that_were_trained_on_unlike_machines_are_counted():
    rows = small_rows()
    assert "trained with another" not in table(rows)
    for row in rows:
        if (row["settings"]["recipe"], row["settings"]["mask"]) == ("tost", "snip"):
            row["machine"] = {"device": "cuda:1", "threads": 2, "compile": "graph"}
        if (row["settings"]["recipe"], row["settings"]["mask"]) == ("tost", "synflow"):
            row["versions"] = {"torch": "2.12.0"}
            del row["machine"]  # not known is not unlike
    said = "Of 3 pairs, the recipe was trained with another device in 2, another setting of compile in 2, another version of torch in 1."
    assert said in table(rows)
    assert said in grid(rows)
    for row in rows:
        row["machine"] = {"device": "cpu", **({"ranks": 2} if row["settings"]["recipe"] == "tost" else {})}
        row["versions"] = {"commit": row["settings"]["recipe"]}
    assert "another number of ranks in 3, another commit of anymask in 3." in table(rows)
    for row in rows:
        row |= {"machine": {}, "versions": {"code of mine": row["settings"]["recipe"]}}
    assert "another content of mine in 3." in table(rows)
    for row in rows:
        row |= {"machine": {"device": f"cuda:{row['settings']['seed']}"}, "versions": {}}
    assert "trained with another" not in table(rows)


def test_all_masks_are_all_of_them():
    """A recipe that was not trained on one of them has no line over all, which would be of the others."""
    rows = [made_row(mask, recipe, 0, 0.8) for mask in ("snip", "synflow") for recipe in ("default", "tost", "best")]
    rows = [row for row in rows if (row["settings"]["mask"], row["settings"]["recipe"]) != ("synflow", "best")]
    head, (line,) = [[line.split(" | ") for line in table(rows).splitlines() if word in line] for word in ("| mask |", "all masks |")]
    shown = dict(zip(head[0], line, strict=True))
    assert (shown["tost"], shown["best"], shown["best - default, points [95% CI]"]) == ("80.00 ± n/a", "-", "-")


def test_a_mask_that_only_the_baseline_has_been_trained_on_is_named():
    rows = [row for row in made_rows() if (row["settings"]["mask"], row["settings"]["recipe"]) not in {("snip", "tost"), ("snip", "ham")}]
    said = "Masks with default alone, in no difference: snip at 98%."
    assert said in table(rows)
    assert said in grid(rows)
    assert "alone, in no difference" not in table(made_rows())


def test_every_difference_and_interval_of_the_statistics_is_in_the_table():
    rows = made_rows(seeds=4)
    text = table(rows)
    for comparison in paired(rows):
        low, high = comparison.interval
        assert f"| {comparison.mean:+.2f} [{low:+.2f}, {high:+.2f}] | 4 |" in text


def test_grid_has_a_line_per_recipe_and_a_column_per_mask():
    rows = made_rows(seeds=4)
    text = grid(rows)
    header, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert header == "| recipe - default, points | random-erk, 98% | snip, 98% | synflow, 98% |"
    assert [line.split("|")[1].strip() for line in lines] == ["ham", "tost"]
    for comparison in paired(rows):
        low, high = comparison.interval
        assert f"{comparison.mean:+.2f} ± {(high - low) / 2:.2f} (n=4)" in text


def test_groups_of_other_epochs_get_their_own_table():
    text = table(made_rows() + made_rows(epochs=30, seeds=1))
    assert re.findall("### .*", text) == [
        "### fashion-mnist-5k, demonet, 12 epochs, 3 seeds",
        "### fashion-mnist-5k, demonet, 30 epochs, 1 seed",
    ]


def test_one_mask_at_two_learning_rates_gives_two_lines_that_say_which():
    text = table([made_row("snip", "default", 0, 0.8, lr=lr) for lr in (0.1, 0.2)])
    assert "| snip (lr=0.1) |" in text
    assert "| snip (lr=0.2) |" in text


def test_masks_are_averaged_and_counted_at_one_learning_rate_at_a_time():
    rows = [row for lr in (0.1, 0.2) for row in made_rows(masks=("snip", "grasp"), lr=lr)]
    text = table(rows)
    assert re.findall(r"\| (all masks[^|]*) \|", text) == ["all masks (lr=0.1)", "all masks (lr=0.2)"]
    said = re.findall(r"tost against default at 98% sparsity \((.*)\): .*; of (\d) masks", text)
    assert sorted(said) == [("lr=0.1", "2"), ("lr=0.2", "2")]
    assert "all masks" not in table([row for row in rows if row["settings"]["mask"] == "snip"])


def test_a_baseline_that_nobody_ran_is_said_with_the_recipes_there_are():
    assert "No differences" in table(made_rows(), baseline="tots")
    assert "'tots'" in table(made_rows(), baseline="tots")
    assert "default, ham, tost" in table(made_rows(), baseline="tots")


def test_no_rows_are_said():
    assert table([]) == grid([]) == "No finished runs.\n"


def test_names_cannot_break_the_table_or_become_html():
    text = table([made_row("a|b\n<script>", "default", 0, 0.8)])
    assert "| a\\|b &lt;script> |" in text


def test_one_training_that_failed_with_two_learning_rates_has_a_line_for_each():
    said = {"type": "TechniqueError", "message": "nan", "training": "d, m, snip 0.9, tost, seed 0"}
    [failed] = failed_table([{"id": str(lr), **said, "settings": made_row("snip", "tost", 0, 0.8, lr=lr)["settings"]} for lr in (1, 2)], [])
    assert [line[0] for line in failed.lines] == ["d, m, snip 0.9, tost (lr=1)", "d, m, snip 0.9, tost (lr=2)"]


def test_a_training_that_failed_and_finished_with_other_settings_is_not_said_to_have_done_both():
    """Its learning rate was lowered since; the names of trainings do not say it."""
    said = {"type": "TechniqueError", "message": "nan", "block": "block 1"}
    held = {"techniques": [{"name": "label_smoothing", "eps": 0.1}]}
    rows = [row | held for row in (*(made_row("snip", "best", seed, 0.8) for seed in (0, 1)), made_row("snip", "best", 2, 0.8, lr=9.0))]
    lost = [
        {"id": str(seed), "training": f"fashion-mnist-5k, demonet, snip 0.98, best, seed {seed}", **said}
        | {"settings": made_row("snip", "best", seed, 0.8, lr=9.0)["settings"] | held}
        for seed in (0, 1)
    ]
    [failed] = failed_table(lost, rows)
    assert failed.lines == [["fashion-mnist-5k, demonet, snip 0.98, best (lr=9.0)", "0, 1", "2", "TechniqueError: nan"]]
    assert failed_table([row | {"id": rows[2]["id"]} for row in lost], rows) == []
