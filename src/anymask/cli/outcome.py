"""What a run folder says, as files and on the screen; and whether it can be written."""

from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console
from rich.markdown import Markdown

from anymask.cli.errors import explain
from anymask.errors import AnymaskError, SettingError
from anymask.ranks import by_rank_0
from anymask.report import table, write_page
from anymask.report.cells import newest
from anymask.runlog import Ledger, atomic

LEDGER, FAILURES = "ledger.jsonl", "failures.jsonl"


def show_table(ledger: Ledger, *, baseline: str) -> None:
    """Print the table of the finished trainings: laid out on a terminal, as Markdown elsewhere."""
    rows = ledger.rows()
    text, console = table(rows, baseline=newest(rows, baseline)), Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        console.out(text, end="", highlight=False)


def write_outcome(ledger: Ledger, *, baseline: str) -> None:
    """Write table.md and report.html beside the ledger, and say where; without plotly, what to install."""
    folder, note = ledger.path.parent, Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    rows = ledger.rows()
    baseline = newest(rows, baseline)
    with atomic(folder / "table.md", "w") as file:
        file.write(table(rows, baseline=baseline))
    note.print(f"Table: {folder / 'table.md'}")
    try:
        write_page(rows, folder / "report.html", title=f"anymask: {folder.resolve().name}", baseline=baseline)
    except AnymaskError as error:
        note.print(explain(error))
    else:
        note.print(f"Page:  {folder / 'report.html'}")


def ledger_of(path: Path) -> Ledger | None:
    """The ledger that `path`, a run folder or the file itself, stands for; None when it is another file."""
    if path.is_dir():
        return Ledger(path / LEDGER)
    return Ledger(path) if path.suffix == ".jsonl" else None


def writable(out: Path) -> None:
    """Refuse a folder that cannot be made or written to now, not after the work; makes none, which another process may be about to."""
    by_rank_0(lambda: _try_to_write(out))


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
