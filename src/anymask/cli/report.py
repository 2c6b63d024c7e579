"""`anymask report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from anymask.cli.outcome import FAILURES, LEDGER, ledger_of, show, write_files
from anymask.cli.settings import RUN
from anymask.errors import MissingFile, SettingError, naming
from anymask.registry import unknown
from anymask.report import failed_table, markdown, overviews, table
from anymask.report.cells import Row, latest
from anymask.runlog import Ledger


def report(
    *ledgers: Annotated[Path, Parameter(group=RUN, help="Ledgers or run folders; of rows with the same id the last one counts.")],
    baseline: Annotated[str, Parameter(group=RUN, help="The recipe that others are compared with.")] = "default",
    out: Annotated[Path | None, Parameter(group=RUN, help="The folder for table.md and report.html; only shown if left out.")] = None,
) -> int:
    """Turn ledgers into tables and a page."""
    if not ledgers:
        raise SettingError("report came without a ledger", allowed="ledgers or run folders", fix="name one: anymask report runs/compare")
    found = [_ledger(path) for path in ledgers]
    rows = latest(row for ledger in found for row in _rows(ledger))
    failed = failed_table([row for ledger in found for row in _failures(ledger).rows()], rows)
    recipes = sorted({row["settings"]["recipe"] for row in rows})
    if rows and baseline not in recipes and not any(f", {baseline} (" in f"{line[0]} (" for member in failed for line in member.lines):
        raise unknown(baseline, recipes, what="recipe in these ledgers:")
    first = {"Failed": failed, "Over all cells": overviews(rows, baseline=baseline)}
    text = "\n".join([*(markdown(tables) for tables in first.values() if tables), table(rows, baseline=baseline)])
    show(text)
    if out is not None:
        write_files(rows, text, out, baseline=baseline, first=first)
    return 0


def _ledger(path: Path) -> Ledger:
    if not path.exists():
        raise MissingFile(f"nothing is at {path}", allowed=f"a run folder, or its {LEDGER}", fix="check the path")
    ledger = ledger_of(path)
    if ledger is None:
        raise SettingError(f"{path} came as a ledger", allowed=f"a run folder, or its {LEDGER}", fix="`anymask inspect` shows mask files")
    if not ledger.path.is_file() and not _failures(ledger).path.is_file():
        raise MissingFile(
            f"no training has finished in {path}", allowed=f"a run folder with a {LEDGER}", fix="call this again when one has"
        )
    return ledger


def _failures(ledger: Ledger) -> Ledger:
    return Ledger(ledger.path.with_name(FAILURES))


def _rows(ledger: Ledger) -> Sequence[Row]:
    rows = ledger.rows()
    with naming(str(ledger.path)):
        latest(rows)  # checks them
    return rows
