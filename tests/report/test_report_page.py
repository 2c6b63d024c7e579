"""The page: whole, safe, without network, and really drawn by a browser."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from anymask.errors import AnymaskError
from anymask.report import write_page
from anymask.report.cells import groups
from anymask.report.figures import figures
from tests.report.made_rows import made_row, made_rows

HOSTILE = "</script><script>document.documentElement.dataset.error='ran'</script><img src=x onerror=\"trouble('ran')\">"
CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--virtual-time-budget=20000", "--dump-dom"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page([*made_rows(), *hostile_rows()], path, title=f"Report {HOSTILE}")
    return path


def hostile_rows():
    return [made_row(HOSTILE, recipe, seed, 0.8, sparsity=0.9) for recipe in ("default", HOSTILE) for seed in (0, 1)]


def own_html(path):
    """The page without the text of plotly.js."""
    from plotly.offline import get_plotlyjs

    html = path.read_text()
    assert get_plotlyjs() in html
    return html.replace(get_plotlyjs(), "")


def test_page_has_title_language_and_a_caption_for_every_figure(page):
    html = own_html(page)
    assert '<html lang="en">' in html
    assert "<title>Report " in html
    assert html.count("<figure ") == html.count("<figcaption>") == 5


def test_names_are_escaped_everywhere(page):
    html = own_html(page)
    assert html.lower().count("<script") == 4  # error handler, plotly.js, the numbers, the drawing
    assert "<img" not in html


def test_a_hostile_baseline_is_escaped_too(tmp_path):
    write_page(hostile_rows(), tmp_path / "r.html", title="r", baseline=HOSTILE)
    html = own_html(tmp_path / "r.html")
    assert "Paired differences from" in html
    assert html.lower().count("<script") == 4
    assert "<img" not in html


def test_labels_of_figures_hold_no_markup_of_names():
    """plotly.js drops what it does not know of HTML, so a name that is not escaped would not be shown whole."""
    drawn = figures(groups(hostile_rows()), baseline="default")
    assert HOSTILE in [name.removesuffix(", 90%") for name, _ in drawn[2].options]  # menus are escaped where the page is made
    assert "&lt;img" in json.dumps([plot for figure in drawn for _, plot in figure.options])
    words = re.findall(r"<[^>]*>", json.dumps([_without_groups(plot) for figure in drawn for _, plot in figure.options]))
    assert set(words) <= {"<b>", "</b>", "<br>", "<extra>", "</extra>"}


def _without_groups(plot):
    """`legendgroup` is a key that is never shown."""
    return {**plot, "data": [{key: value for key, value in trace.items() if key != "legendgroup"} for trace in plot["data"]]}


def test_page_loads_nothing_from_anywhere(page):
    html = own_html(page)
    assert not re.search(r"https?://|//cdn|@import|\bsrc\s*=\s*[\"']?(?!x)|url\(", re.sub(re.escape("src=x"), "", html))
    assert re.findall(r"<link[^>]*href=\"([^\"]*)\"", html) == ["data:,"]
    assert "default-src 'none'" in html


def test_page_states_command_versions_machine_and_time(page):
    html = own_html(page)
    runs = len(made_rows()) + len(hostile_rows())
    assert f"<dt>Runs</dt><dd>{runs}</dd>" in html
    assert f"<dd>{runs * 12.5 / 60:.1f} min</dd>" in html
    assert f"<dt>Commands</dt><dd>anymask sweep plan.toml ({runs} runs)</dd>" in html
    assert "torch 2.13.0" in html
    assert "processor made" in html


def test_a_recipe_has_one_colour_in_all_figures():
    colours: dict[str, set[str]] = {}
    for figure in figures(groups(made_rows()), baseline="default"):
        for trace in (trace for _, plot in figure.options for trace in plot["data"] if trace.get("legendgroup")):
            colours.setdefault(trace["name"], set()).add(trace.get("marker", {}).get("color") or trace["line"]["color"])
    assert set(colours) == {"default", "ham", "tost"}
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 3


def test_differences_are_averaged_over_masks_at_one_learning_rate_at_a_time():
    rows = [row for lr in (0.1, 0.2) for row in made_rows(masks=("snip", "grasp"), lr=lr)]
    _, differences, *_ = figures(groups(rows), baseline="default")
    labels = differences.options[0][1]["layout"]["yaxis"]["ticktext"]
    assert [label for label in labels if "all" in label] == [f"<b>all masks (lr={lr}), 98%</b>" for lr in (0.1, 0.2)]


def test_accuracy_figure_shows_every_run_and_differences_every_pair():
    accuracy, differences, *_ = (figure.options[0][1]["data"] for figure in figures(groups(made_rows()), baseline="default"))
    shown = sorted(value for trace in accuracy if trace["mode"] == "markers" and "showlegend" not in trace for value in trace["x"])
    assert shown == pytest.approx(sorted(100 * row["accuracy"]["test"] for row in made_rows()))
    assert sum(len(trace["x"]) for trace in differences if "error_x" not in trace) == (3 + 1) * 3 * 2  # masks and all, seeds, recipes


def test_schedules_have_a_panel_for_each_technique_and_the_learning_rate():
    [(_, plot)] = next(figure for figure in figures(groups(made_rows()), baseline="default") if figure.title == "Schedules").options
    assert [note["text"] for note in plot["layout"]["annotations"]] == [
        "<b>ghost_activation</b>",
        "<b>label_smoothing</b>",
        "<b>learning rate</b>",
    ]


def test_rows_without_curves_density_ghosts_or_time_still_make_a_page(tmp_path):
    keep = ("id", "settings", "accuracy")
    write_page([{key: row[key] for key in keep} for row in made_rows()], tmp_path / "r.html", title="bare")
    assert own_html(tmp_path / "r.html").count("<figure ") == 2


def test_no_rows_make_a_page_that_says_so(tmp_path):
    write_page([], tmp_path / "r.html", title="empty")
    assert "No finished runs." in own_html(tmp_path / "r.html")


def test_without_plotly_the_error_says_what_to_install_and_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(AnymaskError, match=r"pip install 'anymask\[report\]'"):
        write_page(made_rows(), tmp_path / "r.html", title="none")
    assert list(tmp_path.iterdir()) == []


def dom(url, profile):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_every_figure_and_runs_no_name(page, tmp_path):
    found = drawn(page, tmp_path, figures=5)
    assert len(re.findall(r'<g class="errorbar', found)) > 0


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_figure_that_cannot_be_drawn_is_said_on_the_page(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace('data-plot="3"', 'data-plot="none"'))
    found = dom(broken.as_uri(), tmp_path / "profile")
    assert "data-error=" in re.search(r"<html[^>]*>", found)[0]
    assert "A figure could not be drawn" in re.search(r'<p class="trouble"[^>]*id="trouble".*?</p>', found, re.DOTALL)[0]


def drawn(page, folder, *, figures):
    """The page after a browser has drawn so many figures and met no error."""
    found = dom(page.as_uri(), folder / "profile")
    root = re.search(r"<html[^>]*>", found)[0]
    assert f'data-drawn="{figures}"' in root
    assert "data-error" not in root
    assert len(re.findall(r'<g class="[^"]*\bcartesianlayer\b', found)) == figures
    assert "<img" not in re.sub(r"&lt;.*?&gt;", "", found)
    return found


def on_a_phone(page, folder):
    """How wide a page is in a frame of 375 pixels, and by how much it is wider than that."""
    excess = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    say = f"setTimeout(() => parent.postMessage(innerWidth + ' wide, excess ' + ({excess}), '*'), 3000)"
    (folder / "phone.html").write_text(page.read_text().replace("</body>\n</html>", f"<script>{say}</script></body></html>"))
    hear = "addEventListener('message', (event) => { document.body.dataset.width = event.data; })"
    phone = '<iframe src="phone.html" style="width:375px;height:3000px;border:0"></iframe>'
    (folder / "frame.html").write_text(f"<body><script>{hear}</script>{phone}</body>")
    return re.search(r'data-width="([^"]*)"', dom((folder / "frame.html").as_uri(), folder / "profile"))[1]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_page_does_not_scroll_sideways_on_a_phone(page, tmp_path):
    assert on_a_phone(page, tmp_path) == "375 wide, excess 0"
