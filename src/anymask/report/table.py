"""Tables of finished runs. Every number comes from the rows; nothing is typed in."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from anymask.report.cells import Cell, Group, Row, all_masks, count, differing, groups, names, percent
from anymask.report.stats import Overall, Pairs, compare, compared, missing, overall
from anymask.runlog import CODE_OF

NOTHING = "No finished runs."
NONE = "-"
ACCURACY_NOTE = (
    "Accuracies are test accuracies in %, of the checkpoint chosen on the validation images: mean ± sample standard deviation, "
    "each over all its own seeds."
)
PAIRED = "Differences are in percentage points, between runs that share the mask, the seed and every other setting"
INTERVAL_NOTE = f"{PAIRED}; brackets hold the 95% confidence interval by Student's t over n seeds (n/a with fewer than two)."
GRID_NOTE = f"{PAIRED}; ± is half the width of the 95% confidence interval by Student's t over n seeds (n/a with fewer than two)."
ALL_NOTE = (
    "All masks: differences are averaged over the masks within each seed and the interval is over seeds, because masks "
    "of one seed share initialisation and data order and are not independent. A mask is won when its own interval lies above 0, "
    "lost when it lies below 0, else tied; with one seed it is open."
)
STANDING = {ACCURACY_NOTE, INTERVAL_NOTE, GRID_NOTE, ALL_NOTE}  # true of every table that has them

MADE = (
    ("device", "machine", "device"),
    ("number of threads", "machine", "threads"),
    ("setting of compile", "machine", "compile"),
    ("number of ranks", "machine", "ranks"),
    ("version of torch", "versions", "torch"),
    ("version of anymask", "versions", "anymask"),
    ("commit of anymask", "versions", "commit"),
)
USUAL = {"compile": "off", "ranks": 1}  # where rows do not say it


@dataclass(frozen=True)
class Table:
    """A heading, columns, lines and the notes below them, all as plain text."""

    heading: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str]


def table(rows: Iterable[Row], *, baseline: str = "default") -> str:
    """Markdown: for each data and model, one line per mask and sparsity with each recipe and its paired difference.

    Raises:
        FileFormatError: when a row lacks what the statistics need.

    Example:
        >>> settings = {"data": "d", "model": "m", "mask": "snip", "sparsity": 0.9, "recipe": "default", "seed": 0}
        >>> print(table([{"id": "a", "settings": settings, "accuracy": {"test": 0.8}}]).splitlines()[4])
        | 90% | snip | 80.00 ± n/a |
    """
    return markdown(tables(rows, baseline=baseline))


def grid(rows: Iterable[Row], *, baseline: str = "default") -> str:
    """Markdown: for each data and model, one line per recipe and one column per mask and sparsity, in each the difference.

    Raises:
        FileFormatError: when a row lacks what the statistics need.
    """
    return markdown(grids(rows, baseline=baseline))


def tables(rows: Iterable[Row], *, baseline: str = "default") -> list[Table]:
    """What `table` writes, before it is text."""
    return [_table(group, baseline) for group in groups(rows)]


def grids(rows: Iterable[Row], *, baseline: str = "default") -> list[Table]:
    """What `grid` writes, before it is text."""
    return [_grid(group, baseline) for group in groups(rows)]


def markdown(members: Sequence[Table]) -> str:
    """The tables as Markdown, names escaped; what a note says of all tables stands under the first one alone."""
    said: set[str] = set()
    parts = []
    for member in members:
        parts.append(_markdown(member, [note for note in member.notes if note not in said]))
        said |= STANDING & set(member.notes)
    return "\n".join(parts) if members else NOTHING + "\n"


def _markdown(member: Table, notes: Sequence[str]) -> str:
    lines = [f"### {_escape(member.heading)}", "", _line(member.header), _line(["---"] * len(member.header))]
    lines += [_line(line) for line in member.lines]
    return "\n".join([*lines, "", *(f"- {_escape(note)}" for note in notes), ""])


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, entries))} |" if entries[0] != "---" else f"|{'|'.join(entries)}|"


def _escape(text: str) -> str:
    """A name may hold what Markdown or HTML would take as its own."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _table(group: Group, baseline: str) -> Table:
    others = [recipe for recipe in group.recipes if recipe != baseline]
    header = ["sparsity", "mask", baseline]
    for recipe in others:
        header += [recipe, f"{recipe} - {baseline}, points [95% CI]", "n"]
    sparsities = dict.fromkeys(cell.settings["sparsity"] for cell in group.cells)
    lines = [line for sparsity in sparsities for line in _lines(group.at(sparsity), baseline, others)]
    return Table(group.title, header, lines, [ACCURACY_NOTE, *_notes(group, baseline)])


def _lines(members: Sequence[Cell], baseline: str, others: Sequence[str]) -> list[list[str]]:
    lines = [_cell_line(cell, name, baseline, others) for cell, name in zip(members, names(members), strict=True)]
    return [*lines, *(_all_line(alike, name, baseline, others) for name, alike in all_masks(members))]


def _cell_line(cell: Cell, name: str, baseline: str, others: Sequence[str]) -> list[str]:
    here = {comparison.recipe: comparison for comparison in compare(cell, baseline=baseline)}
    shown = f"{name} (reference)" if cell.settings["mask"] == "dense" else name
    line = [percent(cell.settings["sparsity"]), shown, spread(cell.accuracies(baseline).values())]
    for recipe in others:
        line += [spread(cell.accuracies(recipe).values()), *_difference(here.get(recipe))]
    return line


def _all_line(members: Sequence[Cell], name: str, baseline: str, others: Sequence[str]) -> list[str]:
    """The baseline is shown where all recipes are judged against the same of its runs; a recipe, where it was trained on all members."""
    found = overall(compared(members, baseline=baseline))
    here = {member.recipe: member for member in found if member.cells == len(members)}
    befores = {spread(member.baseline_accuracies) for member in here.values()}
    line = [percent(members[0].settings["sparsity"]), name, befores.pop() if len(befores) == 1 else NONE]
    for recipe in others:
        line += [spread(here[recipe].recipe_accuracies) if recipe in here else NONE, *_difference(here.get(recipe))]
    return line


def _difference(pairs: Pairs | None) -> list[str]:
    return [NONE, NONE] if pairs is None else [interval(pairs), str(pairs.n)]


def spread(accuracies: Collection[float]) -> str:
    """Mean ± sample standard deviation, as text."""
    if not accuracies:
        return NONE
    return f"{fmean(accuracies):.2f} ± {f'{stdev(accuracies):.2f}' if len(accuracies) > 1 else 'n/a'}"


def interval(pairs: Pairs) -> str:
    """Mean difference and its 95% interval, as text."""
    if pairs.mean is None:
        return "n/a"
    return f"{pairs.mean:+.2f} [{'n/a' if pairs.interval is None else '{:+.2f}, {:+.2f}'.format(*pairs.interval)}]"


def _half_width(pairs: Pairs | None) -> str:
    if pairs is None:
        return NONE
    if pairs.mean is None:
        return "n/a"
    return f"{pairs.mean:+.2f} ± {'n/a' if pairs.half_width is None else f'{pairs.half_width:.2f}'} (n={pairs.n})"


def _grid(group: Group, baseline: str) -> Table:
    here = [(cell, {c.recipe: c for c in compare(cell, baseline=baseline)}) for cell in group.cells]
    columns, found = [cell for cell, by in here if by], [by for _, by in here if by]
    places = [f"{name}, {percent(cell.settings['sparsity'])}" for cell, name in zip(columns, names(columns), strict=True)]
    others = [recipe for recipe in group.recipes if recipe != baseline]
    lines = [[recipe, *(_half_width(by.get(recipe)) for by in found)] for recipe in others]
    return Table(group.title, [f"recipe - {baseline}, points", *places], lines, [GRID_NOTE, *_left_out(group, baseline)])


def _notes(group: Group, baseline: str) -> list[str]:
    across = overall(compared(group.cells, baseline=baseline))
    if not across:
        return [
            f"No differences: no mask has runs of both the baseline {baseline!r} and another of these recipes: {', '.join(group.recipes)}."
        ]
    averaged = verdicts([member for member in across if member.cells > 1])
    return [INTERVAL_NOTE, *([ALL_NOTE, *averaged] if averaged else []), *_left_out(group, baseline)]


def verdicts(members: Sequence[Overall]) -> list[str]:
    """A sentence each: how a recipe did over the masks of one sparsity, and with which settings where they differ."""
    every = [member.settings for member in members]
    return [_verdict(member, differing(member.settings, every, alike=("sparsity",))) for member in members]


def _verdict(member: Overall, apart: str) -> str:
    left_out = f"; seeds left out because a mask lacks them: {', '.join(map(str, member.left_out))}" if member.left_out else ""
    where = f"{percent(member.settings['sparsity'])} sparsity{apart}"
    return (
        f"{member.recipe} against {member.baseline} at {where}: {interval(member)} points over "
        f"{count(member.n, 'seed')}; of {count(member.cells, 'mask')}, {member.score}{left_out}."
    )


def _left_out(group: Group, baseline: str) -> list[str]:
    """What is in no difference, and why."""
    gaps = missing(group.cells, baseline=baseline)
    alone = [
        f"{name} at {percent(cell.settings['sparsity'])}"
        for cell, name in zip(group.cells, names(group.cells), strict=True)
        if cell.recipes == [baseline] and cell.settings["mask"] != "dense"
    ]
    unlike = [{**c.settings, "recipe": c.recipe, "seed": seed} for c in compared(group.cells, baseline=baseline) for seed in c.unlike]
    return [
        f"Runs that are missing beside a finished partner, which is in no difference: {_counted(gaps)}."
        if gaps
        else "No pair is incomplete.",
        *([f"Masks with {baseline} alone, in no difference: {'; '.join(alone)}."] if alone else []),
        *([f"Pairs left out because they began with other masks or weights, or had other teachers: {_counted(unlike)}."] if unlike else []),
        *_mixed(group, baseline),
    ]


def _mixed(group: Group, baseline: str) -> list[str]:
    """How many pairs differ in what they were made with, which rounds otherwise."""
    compared = [(cell, c) for cell in group.cells for c in compare(cell, baseline=baseline)]
    pairs = [(cell.runs[c.baseline, seed], cell.runs[c.recipe, seed]) for cell, c in compared for seed in c.pairs]
    own = sorted({name for pair in pairs for row in pair for name in row.get("versions") or {} if name.startswith(CODE_OF)})
    made = [*MADE, *((f"content of {name.removeprefix(CODE_OF)}", "versions", name) for name in own)]
    numbers = {what: sum(_differ(one, other, *where) for one, other in pairs) for what, *where in made}
    said = ", ".join(f"another {what} in {number}" for what, number in numbers.items() if number)
    return [f"Of {count(len(pairs), 'pair')}, the recipe was trained with {said}."] if said else []


def _differ(one: Row, other: Row, part: str, name: str) -> bool:
    usual = USUAL.get(name) if one.get(part) and other.get(part) else None
    here, there = ((row.get(part) or {}).get(name, usual) for row in (one, other))
    if name == "device":  # cuda:0 and cuda:1 are one kind
        here, there = (str(value).partition(":")[0] if value else None for value in (here, there))
    return None not in (here, there) and here != there


def _counted(runs: Sequence[Mapping[str, Any]]) -> str:
    return f"{len(runs)} ({'; '.join(map(_gap, runs[:20]))}{f'; and {len(runs) - 20} more' if len(runs) > 20 else ''})"


def _gap(settings: Mapping[str, Any]) -> str:
    return f"{settings['recipe']} on {settings['mask']} at {percent(settings['sparsity'])}, seed {settings['seed']}"
