"""`anymask inspect`."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anymask.cli.outcome import ledger_of, show_table, write_outcome
from anymask.cli.settings import RUN
from anymask.errors import SettingError
from anymask.formats.opening import file_in
from anymask.mask import Mask
from anymask.overlaps import Overlap, overlap, whole
from anymask.registry import unknown
from anymask.report.cells import latest, newest
from anymask.report.mask_page import write_mask_page
from anymask.report.seen import Seen
from anymask.runlog import Ledger
from anymask.sweep import look, look_at

PAGE_SUFFIX = ".html"
BASELINE = "default"
CHANNELS = ("outputs", "inputs", "dead")
WIDE, UNBOUNDED = 110, 160  # columns: of a terminal that has room for all, and of what is no terminal


def inspect(
    *files: Annotated[Path, Parameter(group=RUN, help="Mask files, ledgers or run folders; of two masks the overlap is shown.")],
    page: Annotated[
        bool,
        Parameter(group=RUN, negative=(), help="Write a page with pictures of masks; of a run folder table.md and report.html again."),
    ] = False,
    out: Annotated[
        Path | None, Parameter(group=RUN, help="The page of masks, FILE.html; beside the first mask and named like it if not given.")
    ] = None,
    model: Annotated[
        str | None, Parameter(group=RUN, help="The network of masks that do not name theirs, as in `anymask list models`; needs --input.")
    ] = None,
    shape: Annotated[
        tuple[int, int, int] | None, Parameter(name="--input", group=RUN, help="Its input: channels, height and width, such as 3 32 32.")
    ] = None,
    baseline: Annotated[str, Parameter(group=RUN, help="The recipe that others are compared with.")] = BASELINE,
    force: Annotated[bool, Parameter(group=RUN, negative=(), help="Replace the page of masks if it is there.")] = False,
) -> int:
    """Show masks and run folders."""
    if not files:
        raise SettingError("inspect came without a file", allowed="mask files or run folders", fix="name one: anymask inspect my.mask")
    ledgers = {path: ledger for path in files if (ledger := _ledger(path)) is not None}
    paths = [path for path in files if path not in ledgers]
    _check_options(paths, out=out, model=model, shape=shape)
    _check_baseline(ledgers.values(), baseline)
    target = out or (paths[0].with_suffix(PAGE_SUFFIX) if page and paths else None)
    if target is not None and target.exists() and not force:
        raise SettingError(f"{target} is there already", allowed="a new file", fix="choose another --out, or add --force to replace it")
    seen = [look_at(path, name=name, model=model, shape=shape) for path, name in zip(paths, names_of(paths), strict=True)]
    shared = {(a.name, b.name): overlap(a.mask, b.mask) for a, b in combinations(seen, 2)}  # refuses before anything is shown
    for ledger in ledgers.values():
        show_table(ledger, baseline=baseline)
        if page:
            write_outcome(ledger, baseline=baseline)
    for member in seen:
        _show(member)
    _show_shared([member.name for member in seen], shared)
    if target is not None:
        _write_page(seen, target)
    return 0


def names_of(paths: Sequence[Path]) -> list[str]:
    """What the files are called: by their names, or by their paths where two have the same name.

    Example:
        >>> names_of([Path("a/x.mask"), Path("b/x.mask"), Path("b/y.mask")])
        ['a/x.mask', 'b/x.mask', 'y.mask']
    """
    times = Counter(path.name for path in paths)
    return [path.name if times[path.name] == 1 else str(path) for path in paths]


def show_mask(mask: Mask, *, title: str) -> None:
    """Print what `mask`, which was made here, keeps of each layer, the layers that collapsed, and where it comes from."""
    _show(look(mask, name=title, trusted=True))


def _check_options(masks: Sequence[Path], *, out: Path | None, model: str | None, shape: tuple[int, int, int] | None) -> None:
    given = {"--out": out, "--model": model, "--input": shape}
    useless = [name for name, value in given.items() if value is not None]
    if useless and not masks:
        raise SettingError(f"{useless[0]} came without a mask file", allowed="it with mask files", fix="leave it out, or name a mask file")
    if (model is None) != (shape is None):
        there, lacking = ("--input", "--model") if model is None else ("--model", "--input")
        raise SettingError(f"{there} came without {lacking}", allowed="both, or none", fix="give both: --model resnet20 --input 3 32 32")
    if out is not None and out.suffix != PAGE_SUFFIX:
        raise SettingError(
            f"--out came as {out}", allowed=f"a name that ends in {PAGE_SUFFIX}", fix=f"write {out.with_suffix(PAGE_SUFFIX)}"
        )
    twice = [str(path) for path, times in Counter(masks).items() if times > 1]
    if twice:
        raise SettingError(f"{twice[0]} came twice", allowed="each mask once", fix="leave one out")


def _check_baseline(ledgers: Iterable[Ledger], baseline: str) -> None:
    """Refuse a baseline that was named and is in none of these; many a run folder lacks `default`."""
    every = [rows for ledger in ledgers if (rows := ledger.rows())]
    recipes = {row["settings"]["recipe"] for rows in every for row in latest(rows)}
    if recipes and baseline != BASELINE and not any(newest(rows, baseline) in recipes for rows in every):
        raise unknown(baseline, sorted(recipes), what="recipe in these ledgers:")


def _ledger(path: Path) -> Ledger | None:
    """The ledger that `path` stands for; None for a mask file and for the folder of a checkpoint."""
    ledger = ledger_of(path)
    if ledger is None or ledger.path.is_file():
        return ledger
    with suppress(FileNotFoundError):
        if path.is_dir() and file_in(path):
            return None
    raise FileNotFoundError(2, "no such ledger", str(ledger.path))


def _show(seen: Seen) -> None:
    console = _console()
    wide = console.width >= WIDE
    shown = _table(seen.name, *(["shape"] if wide else []), "kept", *(["of"] if wide else []), "density", *CHANNELS, "unreachable")
    lost = {name: f"{count:,}" for name, count in seen.unreachable.items()}
    for name, layer in seen.layers.items():
        shape, total = ([" x ".join(map(str, layer.shape))], [f"{layer.total:,}"]) if wide else ([], [])
        channels = (f"{layer.outs_kept}/{layer.outs}", f"{layer.ins_kept}/{layer.ins}", f"{layer.dead}")
        entries = (*shape, f"{layer.kept:,}", *total, f"{layer.density:.2%}", *channels, lost.get(name, ""))
        shown.add_row(Text(name), *entries, style="red" if not layer.kept else None)
    shown.add_section()
    mask, everywhere = seen.mask, f"{sum(seen.unreachable.values()):,}" if lost else ""
    shape, total = ([""], [f"{mask.total:,}"]) if wide else ([], [])
    shown.add_row("all", *shape, f"{mask.kept:,}", *total, f"{mask.density:.2%}", "", "", f"{seen.dead:,}", everywhere)
    console.print(shown)
    for line in _words(seen):
        console.print(line, markup=False)


def _words(seen: Seen) -> list[str]:
    collapsed = seen.mask.collapsed()
    lines = [
        f"{seen.summary}.",
        f"no weight is left, so nothing passes, in: {', '.join(collapsed)}" if collapsed else "",
        f"made by: {seen.made}" if seen.made else "",
        f"network: {seen.network}" if seen.network else seen.why,
    ]
    return [line[:1].upper() + line[1:] for line in lines if line]


def _console() -> Console:
    """Off a terminal lines are as long as the tables need; rich would cut numbers to fit 80 columns."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, UNBOUNDED))


def _show_shared(names: Sequence[str], shared: Mapping[tuple[str, str], Mapping[str, Overlap]]) -> None:
    if len(names) == 2:
        _show_overlap(shared[names[0], names[1]], title=f"overlap of {names[0]} and {names[1]}")
    elif shared:
        _show_pairs(names, {pair: whole(layers).iou for pair, layers in shared.items()})


def _show_overlap(shared: Mapping[str, Overlap], *, title: str) -> None:
    shown = _table(title, "kept by both", "by either", "IoU", "Hamming", "places alike")
    for name, layer in {**shared, "all": whole(shared)}.items():
        shown.add_row(Text(name), f"{layer.both:,}", f"{layer.either:,}", f"{layer.iou:.3f}", f"{layer.hamming:,}", f"{layer.alike:.3f}")
    console = _console()
    console.print(shown)
    console.print("IoU: kept by both / kept by either. Hamming: places where they differ. Places alike: 1 - Hamming / number of places.")


def _show_pairs(names: Sequence[str], totals: Mapping[tuple[str, str], float]) -> None:
    numbers = [f"({number})" for number in range(1, len(names) + 1)]
    shown = _table("overlap of each pair: IoU of all layers together", *numbers, first="mask")
    for number, name in zip(numbers, names, strict=True):
        shared = [1.0 if name == other else totals.get((name, other), totals.get((other, name), 0.0)) for other in names]
        shown.add_row(Text(f"{number} {name}"), *(f"{iou:.3f}" for iou in shared))
    _console().print(shown)


def _write_page(seen: Sequence[Seen], path: Path) -> None:
    names = " and ".join(member.name for member in seen) if len(seen) < 3 else f"{len(seen)} masks"
    write_mask_page(seen, path, title=f"anymask: {names}")
    print(f"Page: {path}", file=sys.stderr)


def _table(title: str, *columns: str, first: str = "parameter") -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table
