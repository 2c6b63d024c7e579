"""Tables over all finished runs, whatever their data and network. Every number comes from the rows; nothing is typed in."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from anymask.report.cells import Cell, Group, Row, count, groups, names, percent
from anymask.report.stats import Comparison, Overall, compare, overall
from anymask.report.table import INTERVAL_NOTE, NONE, Table, interval

VERDICT_NOTE = "A cell is won when its own interval lies above 0, lost when it lies below 0, else tied; with one seed it is open."
MEAN_NOTE = "Mean of cells: the average of the differences of all cells in points, each cell counting the same, whatever its seeds."
SEEDS_NOTE = (
    "Within seeds: the differences are averaged over the cells within each seed and the interval is over the n seeds that every cell has, "
    "because cells of one seed share initialisation and data order and are not independent."
)


def overviews(rows: Iterable[Row], *, baseline: str = "default") -> list[Table]:
    """Two tables: each recipe against `baseline` in every cell, and their means at each sparsity, over masks, data and networks.

    Raises:
        FileFormatError: when a row lacks what the statistics need.

    Example:
        >>> def row(recipe, seed, test):
        ...     settings = {"data": "d", "model": "m", "mask": "snip", "sparsity": 0.9, "recipe": recipe, "seed": seed}
        ...     return {"id": f"{recipe}{seed}", "settings": settings, "accuracy": {"test": test}}
        >>> every, effect = overviews([row("default", 0, 0.80), row("default", 1, 0.82), row("tost", 0, 0.83), row("tost", 1, 0.86)])
        >>> every.lines[0][:5], every.lines[0][-2:], effect.lines[0][:3]
        (['d', 'm', '-', '90%', 'snip'], ['2', 'tied'], ['90%', 'tost', '+3.50'])
    """
    found = [(group, cell, name) for group in groups(rows) for cell, name in zip(group.cells, names(group.cells), strict=True)]
    compared = [(group, name, compared) for group, cell, name in found for compared in _judged(cell, baseline)]
    members = [comparison for _, _, comparison in compared]
    if not members:
        return []
    return [_every(compared, baseline), _effect(members, baseline)]


def _judged(cell: Cell, baseline: str) -> list[Comparison]:
    return [comparison for comparison in compare(cell, baseline=baseline) if comparison.n]


def _every(compared: Sequence[tuple[Group, str, Comparison]], baseline: str) -> Table:
    header = ["data", "model", "epochs", "sparsity", "mask", "recipe", f"recipe - {baseline}, points [95% CI]", "n", "verdict"]
    lines = []
    for group, name, comparison in compared:
        shared = [str(NONE if group.settings[key] is None else group.settings[key]) for key in ("data", "model", "epochs")]
        what = [percent(comparison.settings["sparsity"]), name, comparison.recipe]
        lines.append([*shared, *what, interval(comparison), str(comparison.n), comparison.verdict])
    sentences = [f"{_sentence(member)}." for member in overall((c for _, _, c in compared), by=())]
    return Table("All cells", header, lines, [*sentences, INTERVAL_NOTE, VERDICT_NOTE])


def _sentence(member: Overall) -> str:
    return f"{member.recipe} against {member.baseline}: of {count(member.cells, 'cell')}, {member.score}"


def _effect(members: Sequence[Comparison], baseline: str) -> Table:
    header = [
        "sparsity",
        "recipe",
        f"recipe - {baseline}, points: mean of cells",
        "within seeds [95% CI]",
        "n",
        "cells",
        "won",
        "tied",
        "lost",
        "open",
    ]
    lines = []
    for member in sorted(overall(members, by=("sparsity",)), key=lambda member: (member.settings["sparsity"], member.recipe)):
        here = [c for c in members if (c.recipe, c.settings["sparsity"]) == (member.recipe, member.settings["sparsity"])]
        mean = f"{fmean(c.mean for c in here if c.mean is not None):+.2f}"
        counts = map(str, (member.n, member.cells, member.won, member.tied, member.lost, member.open))
        lines.append([percent(member.settings["sparsity"]), member.recipe, mean, interval(member), *counts])
    return Table("Effect against sparsity", header, lines, [MEAN_NOTE, SEEDS_NOTE, VERDICT_NOTE])
