"""The figure of layers: what share of its weights a mask keeps in each."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from anymask.report.cells import Cell, names
from anymask.report.look import Plot, text

LEAST_DENSITY = 1e-4  # the colour of a layer with no weight at all, where a logarithm has no value
MARGIN = {"l": 8, "r": 12, "t": 40, "b": 8}  # the columns are named at the top


def densities(members: Sequence[Cell]) -> Plot | None:
    """A heat map of the kept share, one column per mask and one line per layer."""
    columns = [(name, _mean_density(cell)) for name, cell in zip(names(members), members, strict=True)]
    return density_map([(name, layers) for name, layers in columns if layers])


def density_map(columns: Sequence[tuple[str, Mapping[str, float]]]) -> Plot | None:
    """The same of (mask, layer -> kept share in [0, 1]); colours are logarithmic. None without columns."""
    layers = list(dict.fromkeys(layer for _, found in columns for layer in found))
    z = [[found.get(layer) for _, found in columns] for layer in layers]
    heat = {
        "z": [[None if share is None else math.log10(max(share, LEAST_DENSITY)) for share in line] for line in z],
        "text": [["" if share is None else f"{100 * share:.3g}" for share in line] for line in z],
        "hovertemplate": "%{y}<br>%{x}: %{text}% kept<extra></extra>",
        "zmin": math.log10(LEAST_DENSITY),
        "zmax": 0,
    }
    return heat_map(heat, columns=[name for name, _ in columns], lines=layers) if columns else None


def heat_map(heat: Plot, *, columns: Sequence[str], lines: Sequence[str]) -> Plot:
    """A heat map with its `text` in each field; columns are named at the top, the first line is the uppermost."""
    look = {"type": "heatmap", "texttemplate": "%{text}", "colorscale": "Cividis", "xgap": 1, "ygap": 1, "showscale": False}
    axis = {"type": "category", "automargin": True, "showgrid": False, "zeroline": False}
    return {
        "data": [{**look, "x": [text(name) for name in columns], "y": [text(name) for name in lines], **heat}],
        "layout": {
            "height": 60 + 24 * len(lines),
            "margin": MARGIN,
            "xaxis": {**axis, "side": "top"},
            "yaxis": {**axis, "autorange": "reversed"},
        },
    }


def _mean_density(cell: Cell) -> dict[str, float]:
    found = [(row.get("density") or {}).get("layers") or {} for row in cell.runs.values()]
    layers = dict.fromkeys(layer for masks in found for layer in masks)
    return {layer: fmean(masks[layer] for masks in found if layer in masks) for layer in layers}
