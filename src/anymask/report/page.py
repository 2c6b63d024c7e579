"""The report as one HTML file that needs no network: plotly.js, figures and tables are all inside."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from anymask.errors import AnymaskError
from anymask.report.cells import Group, Row, groups, latest
from anymask.report.figures import Figure, figures
from anymask.report.stats import compared, overall
from anymask.report.table import NOTHING, Table, grids, tables, verdicts
from anymask.runlog import atomic

LEAD = "Differences in test accuracy, in percentage points with their 95% confidence intervals; how they are made is said below the tables."
UNCOMPARED = "No mask has runs of the baseline and of another recipe yet, so there is nothing to compare."


def write_page(
    rows: Iterable[Row],
    path: str | os.PathLike[str],
    *,
    title: str,
    baseline: str = "default",
    first: Mapping[str, Sequence[Table]] | None = None,
) -> None:
    """Write finished runs to `path` as one interactive HTML page that loads nothing from anywhere.

    Args:
        rows: of `anymask.runlog.Ledger.rows()`.
        path: such as "report.html"; an older file is replaced.
        title: the heading of the page.
        baseline: the recipe that the others are judged against.
        first: tables before the others, by the heading of their section.

    Raises:
        AnymaskError: when plotly is not installed.
        FileFormatError: when a row lacks what the statistics need.
    """
    rows = latest(rows)
    members = groups(rows)
    drawn = figures(members, baseline=baseline)
    several = [grid for grid in grids(rows, baseline=baseline) if len(grid.lines) > 1]
    sections = {**(first or {}), "Results": tables(rows, baseline=baseline), "Recipe by recipe": several}
    save(path, Page(title, _summary(members, baseline), drawn, sections, {"Run facts": _facts(rows)}))


@dataclass(frozen=True)
class Page:
    """What stands on a page, from top to bottom.

    Args:
        title: its heading.
        summary: HTML, names escaped.
        figures: each with its menu and caption.
        tables: by the heading of their section; a section without tables is left out.
        facts: names and values, by the heading of their section.
    """

    title: str
    summary: str
    figures: Sequence[Figure]
    tables: Mapping[str, Sequence[Table]]
    facts: Mapping[str, Mapping[str, str]]


def save(path: str | os.PathLike[str], page: Page) -> None:
    """Write `page` as one HTML file; an older one is replaced.

    Raises:
        AnymaskError: when plotly is not installed.
    """
    parts = {
        "title": escape(page.title),
        "summary": page.summary,
        "figures": "".join(_figure(number, figure) for number, figure in enumerate(page.figures)),
        "tables": "\n".join(_section(title, members) for title, members in page.tables.items()),
        "facts": "\n".join(f"<section><h2>{escape(title)}</h2>{_pairs(facts)}</section>" for title, facts in page.facts.items()),
        "plots": _json([[plot for _, plot in figure.options] for figure in page.figures]),
        "plotly": _plotly(),
    }
    whole = _fill(parts)
    with atomic(path, "w") as file:
        file.write(whole)


def _summary(members: Sequence[Group], baseline: str) -> str:
    found = [(group.title, overall(compared(group.cells, baseline=baseline))) for group in members]
    lists = [f"<h3>{escape(title)}</h3>{listed(verdicts(across) or [UNCOMPARED])}" for title, across in found]
    return f"<p>{LEAD if lists else NOTHING}</p>{''.join(lists)}"


def _fill(parts: dict[str, str]) -> str:
    """The template with its {{names}} replaced, in one pass, so that no part is searched for names."""
    template = files("anymask.report").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise AnymaskError(
            "plotly is not installed, and the report page is drawn with it",
            allowed="plotly 5.20 or newer",
            fix="pip install 'anymask[report]'",
        ) from error
    return str(get_plotlyjs())


def _json(value: Any) -> str:
    """JSON that can stand in a script element: no name in it can end the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _figure(number: int, figure: Figure) -> str:
    choices = "".join(f'<option value="{index}">{escape(name)}</option>' for index, (name, _) in enumerate(figure.options))
    menu = f'<label class="menu">Show <select data-menu="{number}">{choices}</select></label>' if len(figure.options) > 1 else ""
    return (
        f'<figure aria-labelledby="figure-{number}"><h2 id="figure-{number}">{escape(figure.title)}</h2>{menu}'
        f'<div class="plot" data-plot="{number}"></div><figcaption>{escape(figure.caption)}</figcaption></figure>\n'
    )


def _section(title: str, members: Sequence[Table]) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(map(_table, members))}</section>" if members else ""


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(entry)}</td>' for entry in line)}</tr>" for line in table.lines)
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    heading = escape(table.heading)
    return f'<h3>{heading}</h3><div class="wide" tabindex="0" role="region" aria-label="{heading}">{grid}</div>{listed(table.notes)}\n'


def listed(entries: Sequence[str]) -> str:
    """A list in HTML, its entries escaped."""
    return f"<ul>{''.join(f'<li>{escape(entry)}</li>' for entry in entries)}</ul>" if entries else ""


def _pairs(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()) + "</dl>"


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    finished = sorted(time for row in rows if (time := (row.get("time") or {}).get("finished")))
    return {
        "Runs": str(len(rows)),
        "Training time": _duration(sum((row.get("time") or {}).get("seconds") or 0 for row in rows)),
        "Time to find the masks": _duration(sum((row.get("time") or {}).get("mask_seconds") or 0 for row in rows)),
        "Finished": f"{finished[0]} to {finished[-1]}" if finished else "not recorded",
        "Commands": _counted(row.get("command") for row in rows),
        "Versions": _counted(_listed(row.get("versions")) for row in rows),
        "Machines": _counted(_listed(row.get("machine")) for row in rows),
    }


def _counted(entries: Iterable[str | None]) -> str:
    counts = Counter(entry or "not recorded" for entry in entries)
    return "; ".join(f"{entry} ({count} runs)" for entry, count in counts.most_common())


def _listed(facts: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (facts or {}).items())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
