"""`anymask inspect`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anymask.cli.outcome import ledger_of, show_table, write_outcome
from anymask.cli.settings import RUN
from anymask.errors import SettingError
from anymask.mask import Mask
from anymask.mask_io import load_mask
from anymask.sweep import Overlap, overlap


def inspect(
    *files: Annotated[Path, Parameter(group=RUN, help="Mask files, ledgers or run folders; of two masks the overlap is shown.")],
    page: Annotated[bool, Parameter(group=RUN, negative=(), help="Write table.md and report.html beside the ledger again.")] = False,
    baseline: Annotated[str, Parameter(group=RUN, help="The recipe that others are compared with.")] = "default",
) -> int:
    """Show masks and run folders."""
    if not files:
        raise SettingError("inspect came without a file", allowed="mask files or run folders", fix="name one: anymask inspect my.mask")
    masks: dict[str, Mask] = {}
    for path in files:
        ledger = ledger_of(path)
        if ledger is None:
            masks[str(path)] = load_mask(path)
            show_mask(masks[str(path)], title=str(path))
        elif not ledger.path.is_file():
            raise FileNotFoundError(2, "no such ledger", str(ledger.path))
        else:
            show_table(ledger, baseline=baseline)
            if page:
                write_outcome(ledger, baseline=baseline)
    if len(masks) == 2:
        _show_overlap(*masks.values(), title=" and ".join(masks))
    return 0


def show_mask(mask: Mask, *, title: str) -> None:
    """Print the density of each layer, the layers that collapsed, and where the mask comes from."""
    shown = _table(title, "shape", "kept", "of", "density")
    for name, density in mask.layer_density().items():
        kept = mask[name]
        shape = " x ".join(map(str, kept.shape))
        shown.add_row(
            Text(name), shape, f"{int(kept.sum()):,}", f"{kept.numel():,}", f"{density:.2%}", style="red" if not density else None
        )
    shown.add_section()
    shown.add_row("all", "", f"{mask.kept:,}", f"{mask.total:,}", f"{mask.density:.2%}")
    console = Console(highlight=False)
    console.print(shown)
    if collapsed := mask.collapsed():
        console.print(f"No weight is left, so nothing passes, in: {', '.join(collapsed)}", markup=False)
    if made := [f"{key} {value}" for key, value in mask.info.items() if key != "collapsed"]:
        console.print(f"Made by: {', '.join(made)}", markup=False)


def _show_overlap(first: Mask, second: Mask, *, title: str) -> None:
    shared = overlap(first, second)
    shown = _table(f"overlap of {title}", "kept by both", "by either", "IoU", "places alike")
    for name, layer in {**shared, "all": sum(shared.values(), Overlap(0, 0, 0))}.items():
        shown.add_row(Text(name), f"{layer.both:,}", f"{layer.either:,}", f"{layer.iou:.3f}", f"{layer.hamming:.3f}")
    console = Console(highlight=False)
    console.print(shown)
    console.print("IoU: kept by both / kept by either. Places alike: 1 - Hamming distance / number of places.")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("parameter", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    return table
