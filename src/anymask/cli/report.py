"""`anymask report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.markdown import Markdown

from anymask.cli.errors import explain
from anymask.cli.outcome import LEDGER, ledger_of
from anymask.cli.settings import RUN
from anymask.errors import AnymaskError, SettingError, naming
from anymask.registry import unknown
from anymask.report import markdown, overviews, table, write_page
from anymask.report.cells import Row, latest
from anymask.runlog import atomic


def report(
    *ledgers: Annotated[Path, Parameter(group=RUN, help="Ledgers or run folders; of rows with the same id the last one counts.")],
    baseline: Annotated[str, Parameter(group=RUN, help="The recipe that others are compared with.")] = "default",
    out: Annotated[Path | None, Parameter(group=RUN, help="The folder for table.md and report.html; only shown if left out.")] = None,
) -> int:
    """Turn ledgers into tables and a page."""
    if not ledgers:
        raise SettingError("report came without a ledger", allowed="ledgers or run folders", fix="name one: anymask report runs/compare")
    rows = latest(row for path in ledgers for row in _rows(path))
    recipes = sorted({row["settings"]["recipe"] for row in rows})
    if rows and baseline not in recipes:
        raise unknown(baseline, recipes, what="recipe in these ledgers:")
    text = "\n".join([*([markdown(overviews(rows, baseline=baseline))] if rows else []), table(rows, baseline=baseline)])
    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        console.out(text, end="", highlight=False)
    if out is not None:
        _write(rows, text, out, baseline=baseline)
    return 0


def _rows(path: Path) -> Sequence[Row]:
    ledger = ledger_of(path)
    if ledger is None:
        raise SettingError(f"{path} came as a ledger", allowed=f"a run folder, or its {LEDGER}", fix="`anymask inspect` shows mask files")
    if not ledger.path.is_file():
        raise FileNotFoundError(2, "no such ledger", str(ledger.path))
    rows = ledger.rows()
    with naming(str(ledger.path)):
        return latest(rows)


def _write(rows: Sequence[Any], text: str, out: Path, *, baseline: str) -> None:
    note = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    with atomic(out / "table.md", "w") as file:
        file.write(text)
    note.print(f"Table: {out / 'table.md'}")
    first = {"Over all cells": overviews(rows, baseline=baseline)} if rows else {}
    try:
        write_page(rows, out / "report.html", title=f"anymask: {out.resolve().name}", baseline=baseline, first=first)
    except AnymaskError as error:
        note.print(explain(error))
    else:
        note.print(f"Page:  {out / 'report.html'}")
