"""The tables of docs/masks.md: what each method costs and gives, and masks that move against one that stays."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from tables import table

from anymask.report.cells import Cell, cells, percent
from anymask.report.stats import compare, paired
from anymask.report.table import grid, interval, spread

HEADER = ("sparsity", "mask", "seconds", "MiB", "effective sparsity", "default", "tost", "tost - default, points [95% CI]", "n")
STATIC = "random-erk"


def luck(rows: list[dict], what: str) -> str:
    """One sentence: how many of all intervals against `default` lie to one side of 0; `what` says what each of them is of."""
    found = [comparison.verdict for comparison in paired(rows) if comparison.interval]
    won, lost = found.count("won"), found.count("lost")
    return (
        f"Of {len(found)} comparisons ({what}), the 95% interval lies above 0 in {won}, below 0 in {lost} and "
        f"holds 0 in {len(found) - won - lost}. By luck alone about {0.05 * len(found):.0f} would not hold it.\n"
    )


def methods(rows: list[dict], costs: Mapping[tuple[str, float], Mapping[str, Any]]) -> str:
    """One line per sparsity and mask; `costs` by (method, sparsity)."""
    found = cells(rows)
    lines = [_entries(cell, costs) for cell in found if cell.settings["mask"] != "dense"]
    dense = [cell for cell in found if cell.settings["mask"] == "dense"]
    lines += [("0%", "dense (reference)", "-", "-", "-", spread(cell.accuracies("default").values()), "-", "-", "-") for cell in dense]
    return table(HEADER, lines)


def _entries(cell: Cell, costs: Mapping[tuple[str, float], Mapping[str, Any]]) -> tuple[str, ...]:
    mask, sparsity = cell.settings["mask"], cell.settings["sparsity"]
    cost = costs.get((mask, sparsity))
    effective = 1 - fmean(row["density"]["effective"] for row in cell.runs.values())
    [pairs] = compare(cell, baseline="default")
    return (
        percent(sparsity),
        mask,
        "-" if cost is None else f"{cost['seconds']:.2f}",
        "-" if cost is None else f"{cost['extra_mib']:.0f}",
        f"{100 * effective:.2f}%",
        *(spread(cell.accuracies(recipe).values()) for recipe in ("default", "tost")),
        interval(pairs),
        str(pairs.n),
    )


def moving(rows: list[dict], *, recipe: str, against: str) -> str:
    """Masks that move, trained with `recipe`, minus the static ERK mask trained with `against`, seed by seed."""
    names = {row["settings"]["mask"] for row in rows if row["settings"]["mask"].partition("+")[0] in {"set", "rigl"}}
    static = [row for row in rows if (row["settings"]["mask"], row["settings"]["recipe"]) == (STATIC, against)]
    others = [row for row in rows if row["settings"]["mask"] in names and row["settings"]["recipe"] == recipe]
    return grid([_as_recipe(row) for row in static + others], baseline=f"{STATIC}, {against}")


def _as_recipe(row: dict) -> dict:
    """The mask's name made part of the recipe's, so that masks are what is compared."""
    settings = row["settings"]
    return {**row, "settings": {**settings, "mask": "ERK at the start", "recipe": f"{settings['mask']}, {settings['recipe']}"}}


def growth(results: list[Mapping[str, Any]]) -> str:
    """One line per method that was measured on several networks, one column per network."""
    models = list(dict.fromkeys(r["model"] for r in results))
    weights = {r["model"]: r["weights"] for r in results}
    several = [
        m for m in dict.fromkeys(r["method"] for r in results) if sum(r["method"] == m and r["sparsity"] == 0.98 for r in results) > 1
    ]
    found = {(r["method"], r["model"]): f"{r['seconds']:.2f} s, {r['extra_mib']:,.0f} MiB" for r in results if r["sparsity"] == 0.98}
    head = ("method", *(f"{model}, {weights[model] / 1e6:.1f} M weights" for model in models))
    return table(head, ([m, *(found.get((m, model), "-") for model in models)] for m in several))
