"""The diagnostics on the page: one panel each, recipes side by side."""

import pytest

from anymask.report import write_page
from anymask.report.cells import groups
from anymask.report.figures import figures
from tests.report.made_rows import made_row
from tests.report.test_report_page import CHROMIUM, drawn, own_html

EPOCHS = 3
HEADINGS = [
    "<b>gradient norm over kept weights, median over layers</b>",
    "<b>dead ReLU channels, %</b>",
    "<b>effective rank of the last features</b>",
    "<b>signs flipped since the epoch before, %</b>",
    "<b>signs flipped since the start, %</b>",
    "<b>distance from the start, of its norm</b>",
]


def diagnosed(recipe, seed, **more):
    """A row whose diagnostics are those of the training with chosen numbers."""
    row = made_row("snip", recipe, seed, 0.8, epochs=EPOCHS)
    shift = 0.1 * seed + (recipe == "tost")
    layers = {"a": [1.0 + shift, 1.0, None], "b": [2.0 + shift, None, None], "c": [9.0 + shift, 4.0, None]}
    row["curves"]["diagnostics"] = {
        "gradient_norm": layers,
        "dead_relus": [0.5, 0.25, 0.25],
        "effective_rank": [4.0 + shift] * EPOCHS,
        "sign_flips": [0.1] * EPOCHS,
        "sign_flips_from_start": [0.2] * EPOCHS,
        "distance": layers,
        "distance_overall": [0.5] * EPOCHS,
        **more,
    }
    return row


def rows(**more):
    return [diagnosed(recipe, seed, **more) for recipe in ("default", "tost") for seed in (0, 1)]


def figure(members):
    return next((figure for figure in figures(groups(members), baseline="default") if figure.title == "Diagnostics"), None)


def test_each_number_has_a_panel_and_each_recipe_its_mean_over_seeds_in_it():
    [(name, plot)] = figure(rows()).options
    assert name == "snip, 98%"
    assert [note["text"] for note in plot["layout"]["annotations"]] == HEADINGS
    found = {(trace["yaxis"], trace["name"]): dict(zip(trace["x"], trace["y"], strict=True)) for trace in plot["data"]}
    assert len(found) == len(plot["data"]) == 2 * len(HEADINGS)
    assert found["y", "default"] == {1: 2.05, 2: 2.5}  # the median over layers that have a value; no layer has one in epoch 3
    assert found["y", "tost"] == {1: 3.05, 2: 2.5}
    assert found["y2", "default"] == {1: 50.0, 2: 25.0, 3: 25.0}
    assert found["y3", "tost"] == {1: 5.05, 2: 5.05, 3: 5.05}


def test_sharpness_has_a_panel_where_it_was_asked_for_and_one_row_of_many_is_enough():
    [(_, plot)] = figure([*rows(), diagnosed("tost", 2, sharpness=[7.0, 8.0, None])]).options
    assert len(plot["layout"]["annotations"]) == len(HEADINGS) + 1
    (last,) = [trace for trace in plot["data"] if trace["yaxis"] == "y7"]
    assert (last["name"], last["x"], last["y"]) == ("tost", [1, 2], [7.0, 8.0])


def test_rows_that_were_not_diagnosed_have_no_such_figure():
    assert figure([made_row("snip", "default", 0, 0.8), made_row("snip", "tost", 0, 0.8)]) is None


def test_the_page_has_the_section_with_its_caption(tmp_path):
    write_page(rows(), tmp_path / "r.html", title="r")
    html = own_html(tmp_path / "r.html")
    assert ">Diagnostics</h2>" in html
    assert "docs/diagnostics.md" in html


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_it(tmp_path):
    write_page(rows(sharpness=[1.0, -2.0, 3.0]), tmp_path / "r.html", title="r")
    found = drawn(tmp_path / "r.html", tmp_path, figures=6)
    assert "dead ReLU channels, %" in found
