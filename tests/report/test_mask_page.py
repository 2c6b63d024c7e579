"""The page of masks: its numbers are those of the masks, names cannot harm it, and a browser draws it."""

import json
import re
import sys

import pytest
import torch

from anymask import Mask
from anymask.connectivity import structure
from anymask.errors import AnymaskError, MaskError
from anymask.overlaps import Overlap, overlap, whole
from anymask.report.mask_figures import by_chance, figures
from anymask.report.mask_page import write_mask_page
from anymask.report.mask_tiles import lines_of, shares, tiles
from anymask.report.seen import Seen
from tests.report.test_report_page import CHROMIUM, HOSTILE, drawn, on_a_phone, own_html

SHAPES = {"conv.weight": (6, 4, 3, 3), "depthwise.weight": (6, 1, 3, 3), f"{HOSTILE}.weight": (70, 130), "norm": (6,), "scale": ()}


def seen(name, seed=0, density=0.2, known=True):
    random = torch.Generator().manual_seed(seed)
    mask = Mask({n: torch.rand(s, generator=random) < density for n, s in SHAPES.items()}, info={"method": HOSTILE, "kinds": ["conv"]})
    used = {n: kept & (torch.rand(kept.shape, generator=random) < 0.5) for n, kept in mask.items()}
    return Seen(name, mask, structure(mask), reachable=Mask(used) if known else None, network="net" * known, why="not known" * (not known))


def drawings(*members):
    shared = {(a, b): overlap(members[a].mask, members[b].mask) for a in range(len(members)) for b in range(a + 1, len(members))}
    return {figure.title: dict(figure.options) for figure in figures(members, shared)}


def traces(plot):
    return plot["data"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "masks.html"
    write_mask_page([seen("a.mask"), seen(HOSTILE, 1), seen("c.mask", 2, 0.9, known=False)], path, title=f"Masks {HOSTILE}")
    return path


# -- what masks have in common -----------------------------------------------------------------------------------------


def test_overlap_counts_places():
    first = Mask({"a": torch.tensor([1, 1, 0, 0]), "b": torch.zeros(3)})
    found = overlap(first, Mask({"a": torch.tensor([1, 0, 1, 0]), "b": torch.zeros(3)}))
    assert found == {"a": Overlap(both=1, either=3, total=4), "b": Overlap(0, 0, 3)}
    assert (found["a"].iou, found["a"].hamming, found["a"].alike) == (1 / 3, 2, 0.5)
    assert (found["b"].iou, found["b"].hamming, found["b"].alike) == (1.0, 0, 1.0)
    assert whole(found) == Overlap(1, 3, 7)


def test_masks_of_other_shapes_are_refused():
    with pytest.raises(MaskError, match=r"not the same in both: bias, wieght \(nearest|not the same in both: weight, wieght"):
        overlap(Mask({"weight": torch.ones(2)}), Mask({"wieght": torch.ones(2)}))


def test_the_overlap_by_chance_is_that_of_random_masks():
    random = torch.Generator().manual_seed(0)
    first, second = (torch.rand(200_000, generator=random) < density for density in (0.1, 0.3))
    assert by_chance(0.1, 0.3) == pytest.approx(overlap(Mask({"a": first}), Mask({"a": second}))["a"].iou, abs=0.004)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_show_the_numbers_of_the_masks():
    a, b = seen("a"), seen("b", 1)
    found = drawings(a, b)
    assert list(found) == [
        "Density per layer",
        "Kept channels",
        "Dead filters",
        "Unreachable weights",
        "Overlap per layer",
        "Layer by layer",
    ]
    densities = traces(found["Density per layer"][""])[0]
    assert [line[1] for line in densities["text"]] == [f"{100 * share:.3g}" for share in b.mask.layer_density().values()]
    channels = traces(found["Kept channels"]["b"])[0]
    assert channels["text"] == [[f"{x.outs_kept} / {x.outs}", f"{x.ins_kept} / {x.ins}"] for x in b.layers.values()]
    dead = traces(found["Dead filters"][""])
    assert [bar["x"] for bar in dead] == [[100 * x.dead / x.outs for x in m.layers.values()] for m in (a, b)]
    lost = traces(found["Unreachable weights"][""])[0]
    assert lost["x"] == [100 * a.unreachable[n] / x.kept if x.kept else 0 for n, x in a.layers.items()]
    iou, chance, differ = traces(found["Overlap per layer"]["a and b"])
    shared = overlap(a.mask, b.mask).values()
    assert iou["x"] == [layer.iou for layer in shared]
    assert differ["x"] == [100 * layer.hamming / layer.total for layer in shared]
    assert chance["x"] == [by_chance(x.density, y.density) for x, y in zip(a.layers.values(), b.layers.values(), strict=True)]


def test_of_three_masks_there_is_a_matrix_of_pairs_and_a_menu():
    members = [seen("a"), seen("b", 1), seen("c", 2, 0.9)]
    found = drawings(*members)
    assert list(found["Overlap per layer"]) == ["a and b", "a and c", "b and c"]
    matrix = traces(found["Overlap of every pair"][""])[0]["z"]
    assert matrix[2][1] == matrix[1][2] == whole(overlap(members[1].mask, members[2].mask)).iou
    assert [matrix[i][i] for i in range(3)] == [1, 1, 1]


def test_one_mask_of_an_unknown_network_has_no_figure_of_overlap_or_reach():
    assert list(drawings(seen("a", known=False))) == ["Density per layer", "Kept channels", "Dead filters", "Layer by layer"]


def test_pictures_are_means_over_fields_of_at_most_64_by_64():
    conv, depthwise, linear, norm, scale = (shares(kept, 64) for kept in seen("a").mask.values())
    assert [tuple(each.shape) for each in (conv, depthwise, linear, norm, scale)] == [(6, 4), (6, 9), (64, 64), (6, 1), (1, 1)]
    assert torch.equal(conv, seen("a").mask["conv.weight"].float().mean((2, 3)))
    assert torch.equal(depthwise, seen("a").mask["depthwise.weight"].float().reshape(6, 9))
    halves = torch.zeros(128, 128, dtype=torch.bool)
    halves[:, 64:] = halves[0, 0] = True
    assert shares(halves, 2)[1].tolist() == [0, 1]
    assert shares(halves, 64)[0, 0] == 0.25
    plot, side = tiles(Mask({f"layer{i}": torch.ones(2, 2) for i in range(101)}))
    assert (len(plot["data"]), side) == (101, 32)


@pytest.mark.parametrize("name", ["a", "layer1.0.body.conv1", "layer1.0.shortcut.conv1", "a.b" * 30, "x" * 50, "x" * 30 + "." + "y" * 30])
def test_titles_of_pictures_are_two_short_lines_that_hold_the_end_of_the_name(name):
    lines = lines_of(name)
    assert len(lines) <= 2
    assert max(map(len, lines)) <= 20
    assert name.endswith("".join(lines).removeprefix("…")) or lines[1].startswith("…")


def test_words_about_a_mask():
    mask = Mask(
        {"a": torch.tensor([[1, 1], [0, 0]])}, info={"method": "x", "kinds": ["p", "q"], "exclude": [], "model": {"k": 1}, "n": None}
    )
    member = Seen("a", mask, structure(mask), reachable=Mask({"a": torch.tensor([[1, 0], [0, 0]])}))
    assert member.summary == (
        "sparsity 50%, 2 of 4 weights kept; 1 of 2 filters dead; "
        "effective sparsity 75%, as 1 kept weight lies on no path from input to output"
    )
    assert member.made == "method x, kinds p q"


# -- the page ----------------------------------------------------------------------------------------------------------


def test_every_figure_has_a_caption_and_tables_hold_the_layers(page):
    html = own_html(page)
    assert html.count("<figure ") == html.count("<figcaption>") == 7
    assert html.count("<td>conv.weight</td>") == 3 + 3  # each mask, each pair
    assert "Not known." in html
    assert "torch 2." in html


def test_names_are_escaped_everywhere(page):
    html = own_html(page)
    assert html.lower().count("<script") == 4  # error handler, plotly.js, the numbers, the drawing
    assert "<img" not in html
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', html)[1])
    words = re.findall(r"<[^>]*>", json.dumps(plots))
    assert set(words) <= {"<br>", "<extra>", "</extra>"}


def test_page_loads_nothing_from_anywhere(page):
    html = re.sub(re.escape("src=x"), "", own_html(page))
    assert not re.search(r"https?://|//cdn|@import|\bsrc\s*=\s*[\"']?(?!x)|url\(", html)


def test_without_plotly_the_error_says_what_to_install_and_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(AnymaskError, match=r"pip install 'anymask\[report\]'"):
        write_mask_page([seen("a")], tmp_path / "m.html", title="none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_every_figure_and_runs_no_name(page, tmp_path):
    found = drawn(page, tmp_path, figures=7)
    assert len(re.findall(r'<g class="hm"', found)) == 3 + len(SHAPES)  # densities, channels, pairs, a picture for each layer


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_page_does_not_scroll_sideways_on_a_phone(page, tmp_path):
    assert on_a_phone(page, tmp_path) == "375 wide, excess 0"
