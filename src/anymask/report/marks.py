"""Figures with one line per mask: accuracies and paired differences."""

from collections.abc import Sequence
from statistics import fmean

from anymask.report.cells import Cell, Group, all_masks, names
from anymask.report.look import GREY, Plot, Style, label, text
from anymask.report.stats import Pairs, compare, overall
from anymask.report.table import interval

SEEDS_BELOW = 0.2  # how far below its interval the points of a recipe lie, where 1 is all room for a recipe


def _cell_labels(members: Sequence[Cell]) -> list[str]:
    return [label(name, cell.settings["sparsity"]) for cell, name in zip(members, names(members), strict=True)]


def _offset(index: int, count: int) -> float:
    """Where recipe number `index` of `count` lies within a line that is 1 high."""
    return 0.76 * ((index + 0.5) / count - 0.5)


def _rows_layout(labels: Sequence[str], *, title: str, marks: int) -> Plot:
    """A layout with one line per label, the first at the top, high enough for `marks` marks in each line."""
    return {
        "height": 110 + len(labels) * max(34, 16 * marks),
        "xaxis": {"title": {"text": title}, "zeroline": False, "automargin": True},
        "yaxis": {
            "tickvals": list(range(len(labels))),
            "ticktext": list(labels),
            "range": [len(labels) - 0.5, -0.5],
            "automargin": True,
            "zeroline": False,
            "showgrid": False,
        },
        "hovermode": "closest",
    }


def accuracy(group: Group, look: dict[str, Style]) -> Plot:
    """Test accuracies of every run, one line per cell."""
    recipes = [recipe for recipe in look if recipe in group.recipes]
    labels = _cell_labels(group.cells)
    data = [_seed_lines(group, recipes)]
    for index, recipe in enumerate(recipes):
        data += _accuracy_marks(group, labels, recipe, look[recipe], _offset(index, len(recipes)))
    return {"data": data, "layout": _rows_layout(labels, title="test accuracy, %", marks=len(recipes))}


def _accuracy_marks(group: Group, labels: Sequence[str], recipe: str, style: Style, offset: float) -> list[Plot]:
    found = [(line, seed, value) for line, cell in enumerate(group.cells) for seed, value in cell.accuracies(recipe).items()]
    means = [(line, fmean(cell.accuracies(recipe).values())) for line, cell in enumerate(group.cells) if recipe in cell.recipes]
    runs = {
        "x": [value for _, _, value in found],
        "y": [line + offset for line, _, _ in found],
        "hovertext": [f"{text(recipe)} on {labels[line]}<br>seed {text(seed)}: {value:.2f}%" for line, seed, value in found],
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 8, "opacity": 0.75},
    }
    bars = {
        "x": [value for _, value in means],
        "y": [line + offset for line, _ in means],
        "hovertext": [f"{text(recipe)} on {labels[line]}<br>mean {value:.2f}%" for line, value in means],
        "marker": {"color": style.colour, "symbol": "line-ns", "size": 16, "line": {"width": 3, "color": style.colour}},
        "showlegend": False,
    }
    common = {"mode": "markers", "name": text(recipe), "legendgroup": recipe, "hoverinfo": "text"}
    return [{**common, **bars}, {**common, **runs}]


def _seed_lines(group: Group, recipes: Sequence[str]) -> Plot:
    x: list[float | None] = []
    y: list[float | None] = []
    for line, cell in enumerate(group.cells):
        by_recipe = [cell.accuracies(recipe) for recipe in recipes]
        for seed in sorted({seed for _, seed in cell.runs}):
            at = [(found[seed], line + _offset(index, len(recipes))) for index, found in enumerate(by_recipe) if seed in found]
            x += [*(value for value, _ in at), None]
            y += [*(place for _, place in at), None]
    return {
        "x": x,
        "y": y,
        "mode": "lines",
        "name": "same seed",
        "line": {"color": "rgba(138,138,138,0.45)", "width": 1},
        "hoverinfo": "skip",
    }


def differences(group: Group, look: dict[str, Style], *, baseline: str) -> Plot | None:
    """Paired differences with their intervals: one line per cell, and one per sparsity for all masks."""
    lines = _difference_lines(group, baseline)
    recipes = [recipe for recipe in look if any(pairs.recipe == recipe for _, members in lines for pairs in members)]
    if not recipes:
        return None
    data: list[Plot] = []
    for index, recipe in enumerate(recipes):
        data += _difference_marks(lines, recipe, look[recipe], index=index, count=len(recipes))
    layout = _rows_layout([name for name, _ in lines], title="difference, points", marks=len(recipes))
    zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": GREY, "width": 2}, "layer": "below"}
    return {"data": data, "layout": {**layout, "shapes": [zero]}}


def _difference_lines(group: Group, baseline: str) -> list[tuple[str, Sequence[Pairs]]]:
    lines: list[tuple[str, Sequence[Pairs]]] = []
    for sparsity in dict.fromkeys(cell.settings["sparsity"] for cell in group.cells):
        members = group.at(sparsity)
        compared = [compare(cell, baseline=baseline) for cell in members]
        lines += zip(_cell_labels(members), compared, strict=True)
        for name, alike in all_masks(members):
            across = overall(pairs for cell in alike for pairs in compare(cell, baseline=baseline))
            lines.append((f"<b>{label(name, sparsity)}</b>", [member for member in across if member.cells > 1]))
    return [(name, full) for name, pairs in lines if (full := [each for each in pairs if each.n])]


def _difference_marks(lines: Sequence[tuple[str, Sequence[Pairs]]], recipe: str, style: Style, *, index: int, count: int) -> list[Plot]:
    offset = _offset(index, count)
    found = [(line, name, pairs) for line, (name, members) in enumerate(lines) for pairs in members if pairs.recipe == recipe]
    seeds = [(line, name, seed, value) for line, name, pairs in found for seed, value in pairs.differences.items()]
    common = {"mode": "markers", "name": text(recipe), "legendgroup": recipe, "hoverinfo": "text"}
    points = {
        "x": [value for *_, value in seeds],
        "y": [line + offset + SEEDS_BELOW / count for line, *_ in seeds],
        "hovertext": [f"{text(recipe)} on {name}<br>seed {text(seed)}: {value:+.2f} points" for _, name, seed, value in seeds],
        "marker": {"color": style.colour, "symbol": "circle", "size": 5, "opacity": 0.6},
        "showlegend": False,
    }
    means = {
        "x": [pairs.mean for _, _, pairs in found],
        "y": [line + offset for line, *_ in found],
        "hovertext": [f"{text(recipe)} on {name}<br>{interval(pairs)} points, n = {pairs.n}" for _, name, pairs in found],
        "error_x": {
            "type": "data",
            "array": [pairs.half_width or 0 for _, _, pairs in found],
            "color": style.colour,
            "thickness": 2,
            "width": 5,
        },
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 10},
    }
    return [{**common, **points}, {**common, **means}]
