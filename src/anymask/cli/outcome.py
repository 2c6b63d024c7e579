"""What a run folder says, as files and on the screen; and whether it can be written."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console
from rich.markdown import Markdown

from anymask.cli.errors import explain
from anymask.errors import AnymaskError, SettingError
from anymask.ranks import by_rank_0
from anymask.report import table, write_page
from anymask.report.cells import Row, newest
from anymask.report.table import Table
from anymask.runlog import Ledger, atomic
from anymask.sweep.study import REPORT, STUDY

LEDGER, FAILURES, TABLE, PAGE = "ledger.jsonl", "failures.jsonl", "table.md", "report.html"


def show_table(ledger: Ledger, *, baseline: str) -> None:
    """Print the table of the finished trainings."""
    rows = ledger.rows()
    show(table(rows, baseline=newest(rows, baseline)))


def show(text: str) -> None:
    """Print Markdown: laid out on a terminal, as it is elsewhere."""
    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        console.out(text, end="", highlight=False)


def write_outcome(ledger: Ledger, *, baseline: str) -> None:
    """Write table.md and report.html beside the ledger."""
    rows = ledger.rows()
    baseline = newest(rows, baseline)
    write_files(rows, table(rows, baseline=baseline), ledger.path.parent, baseline=baseline)


def write_files(rows: Sequence[Row], text: str, folder: Path, *, baseline: str, first: Mapping[str, Sequence[Table]] | None = None) -> None:
    """Write `text` to table.md and the page to report.html in `folder`, and say where; without plotly, what to install."""
    with atomic(folder / TABLE, "w") as file:
        file.write(text)
    print(f"Table: {folder / TABLE}", file=sys.stderr)
    try:
        write_page(rows, folder / PAGE, title=f"anymask: {folder.resolve().name}", baseline=baseline, first=first)
    except AnymaskError as error:
        print(explain(error), file=sys.stderr)
    else:
        print(f"Page:  {folder / PAGE}", file=sys.stderr)


def ledger_of(path: Path) -> Ledger | None:
    """The ledger that `path`, a run folder or the file itself, stands for; None when it is another file.

    Raises:
        SettingError: for the folder of a study, whose ledgers lie within.
    """
    if (path / STUDY).is_file() and not (path / LEDGER).is_file():
        confirmed = f"name {path / 'confirm'}, or read {path / REPORT}"
        fix = confirmed if (path / REPORT).is_file() else "call this again when the study is finished"
        raise SettingError(f"{path} came as a run folder", allowed="a folder of trainings; this is a study's", fix=fix)
    if path.is_dir():
        return Ledger(path / LEDGER)
    return Ledger(path) if path.suffix == ".jsonl" else None


def writable(out: Path) -> None:
    """Refuse a folder that cannot be made or written to now, not after the work; makes none, which another process may be about to."""
    by_rank_0(lambda: _try_to_write(out))


def for_many(out: Path) -> None:
    """Refuse what is not `writable`, and the folder of a single training: of several rows `ship` would not know which has the weights."""
    writable(out)
    there = by_rank_0(lambda: {path.name for path in out.glob("*")})
    if {"model.safetensors", LEDGER} <= there and "claims" not in there:  # which the first training of many makes
        raise SettingError(
            f"--out came as {out}, which holds the network of `anymask train`",
            allowed="a folder of `anymask compare` or `anymask sweep`, or a new one",
            fix="choose another --out; `anymask report` puts the rows of both together",
        )


def _try_to_write(out: Path) -> None:
    there = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise SettingError(
            f"--out came as {out}, where nothing can be written ({error.strerror})",
            allowed="a folder that can be made, or written to",
            fix="choose another --out",
        ) from error
