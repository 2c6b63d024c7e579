"""The figures of the report page, each with its caption, as plain plotly.js dicts; nothing of plotly is imported here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from anymask.report.cells import Cell, Group, names, percent
from anymask.report.layers import densities
from anymask.report.lines import curves, diagnostics, schedules
from anymask.report.look import Plot, Style, styles
from anymask.report.marks import accuracy, differences

ACCURACY = (
    "Each point is one training and each upright bar the mean of a recipe; a grey line joins the runs of one seed, "
    "so lines that all lean the same way mean that a recipe helps, or harms, every seed."
)
DIFFERENCES = (
    "Each large mark is a mean difference between runs of the same mask and seed, its bar the 95% confidence interval and the small "
    "points the seeds; right of the line at 0 the recipe is better, and a bar that crosses 0, or no bar (one seed), settles nothing."
)
CURVES = (
    "Thin lines are single runs and thick ones the mean over seeds: validation accuracy in % above, training loss below, "
    "which techniques that change the loss (label smoothing) raise by themselves; click a name in the legend to hide it."
)
DIAGNOSTICS = (
    "What explains a difference, or its absence: how much gradient reaches the kept weights, how many ReLU channels give nothing, how many "
    "directions the last features use, how far weights go and whether their signs turn. Lines are means over seeds; what each says about "
    "a recipe is in docs/diagnostics.md."
)
SCHEDULES = (
    "How strong each technique of a recipe is in each epoch, from 1 (full) to 0 (gone, the plain model), "
    "with the learning rate at the bottom; one run of each recipe is shown."
)
DENSITIES = (
    "The share of weights, in %, that each mask keeps in each layer, averaged over its runs; light keeps much and dark little "
    "(colours are logarithmic), and 0 is a layer with no weight left."
)


@dataclass(frozen=True)
class Figure:
    """A figure with its caption; `options` are the (name, plot) pairs that its menu offers."""

    title: str
    caption: str
    options: Sequence[tuple[str, Plot]]


def figures(members: Sequence[Group], *, baseline: str) -> list[Figure]:
    """All figures that the groups have numbers for."""
    look = styles([recipe for group in members for recipe in group.recipes], baseline=baseline)
    drawn = [
        Figure("Accuracy by mask and recipe", ACCURACY, _each(members, lambda group: accuracy(group, look))),
        Figure(
            f"Paired differences from {baseline}", DIFFERENCES, _each(members, lambda group: differences(group, look, baseline=baseline))
        ),
        Figure("Training curves", CURVES, _joined(members, partial(_by_cell, draw=curves, look=look))),
        Figure("Diagnostics", DIAGNOSTICS, _joined(members, partial(_by_cell, draw=diagnostics, look=look))),
        Figure("Schedules", SCHEDULES, _each(members, lambda group: schedules(group, look))),
        Figure("Density per layer", DENSITIES, _joined(members, _densities)),
    ]
    return [figure for figure in drawn if figure.options]


def _each(members: Sequence[Group], draw: Callable[[Group], Plot | None]) -> list[tuple[str, Plot]]:
    return [(group.title, plot) for group in members if (plot := draw(group)) is not None]


def _joined(members: Sequence[Group], draw: Callable[[Group], list[tuple[str, Plot]]]) -> list[tuple[str, Plot]]:
    return [(f"{group.title}: {name}" if len(members) > 1 else name, plot) for group in members for name, plot in draw(group)]


def _by_cell(group: Group, *, draw: Callable[[Cell, dict[str, Style]], Plot | None], look: dict[str, Style]) -> list[tuple[str, Plot]]:
    named = zip(names(group.cells), group.cells, strict=True)
    return [(f"{name}, {percent(cell.settings['sparsity'])}", plot) for name, cell in named if (plot := draw(cell, look)) is not None]


def _densities(group: Group) -> list[tuple[str, Plot]]:
    levels = dict.fromkeys(cell.settings["sparsity"] for cell in group.cells)
    return [(f"{percent(level)} sparsity", plot) for level in levels if (plot := densities(group.at(level))) is not None]
