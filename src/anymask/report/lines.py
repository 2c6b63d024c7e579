"""Figures over epochs: training curves, diagnostics and schedules."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from anymask.report.cells import Cell, Group, Row
from anymask.report.look import Plot, Style, text

Curve = dict[float, float]  # value by epoch
MEASURED = {  # what is drawn of a row's diagnostics: its heading, and what it is multiplied by
    "gradient_norm": ("gradient norm over kept weights, median over layers", 1.0),
    "dead_relus": ("dead ReLU channels, %", 100.0),
    "effective_rank": ("effective rank of the last features", 1.0),
    "sign_flips": ("signs flipped since the epoch before, %", 100.0),
    "sign_flips_from_start": ("signs flipped since the start, %", 100.0),
    "distance_overall": ("distance from the start, of its norm", 1.0),
    "sharpness": ("sharpness: largest eigenvalue of the Hessian", 1.0),
}
FIRST_RANK = 1000  # of plotly.js; the legend keeps the order of the recipes whichever panel comes first


def curves(cell: Cell, look: dict[str, Style]) -> Plot | None:
    """Validation accuracy and training loss per epoch of every run of a cell, and their means over seeds."""
    data: list[Plot] = []
    for recipe in (name for name in look if name in cell.recipes):
        data += _runs_and_mean(cell.rows(recipe), recipe, look[recipe], key="validation_accuracy", axis="y", scale=100.0)
        data += _runs_and_mean(cell.rows(recipe), recipe, look[recipe], key="train_loss", axis="y2", scale=1.0)
    layout = {
        "height": 560,
        "xaxis": {"title": {"text": "epoch"}, "anchor": "y2", "zeroline": False},
        "yaxis": {"title": {"text": "validation accuracy, %"}, "domain": [0.54, 1.0], "zeroline": False, "automargin": True},
        "yaxis2": {"title": {"text": "training loss"}, "domain": [0.0, 0.46], "zeroline": False, "automargin": True},
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout} if data else None


def _runs_and_mean(rows: Sequence[Row], recipe: str, style: Style, *, key: str, axis: str, scale: float) -> list[Plot]:
    found = [(row["settings"]["seed"], _curve(row, _recorded(row).get(key), scale=scale)) for row in rows]
    found = [(seed, curve) for seed, curve in found if curve]
    if not found:
        return []
    common = {"mode": "lines", "legendgroup": recipe, "yaxis": axis}
    thin = {**common, "line": {"color": style.colour, "width": 1}, "opacity": 0.45, "showlegend": False}
    thick = {**common, "line": {"color": style.colour, "width": 3, "dash": style.dash}, "showlegend": axis == "y"}
    single = [{**thin, **_points(curve, recipe, f", seed {seed}")} for seed, curve in found]
    return [*single, {**thick, **_points(_mean([curve for _, curve in found]), recipe, f", mean of {len(found)}")}]


def diagnostics(cell: Cell, look: dict[str, Style]) -> Plot | None:
    """What was diagnosed in each epoch, one panel each: the mean over seeds of each recipe of a cell."""
    named: list[tuple[str, dict[str, Curve]]] = []
    for key, (heading, scale) in MEASURED.items():
        found = {name: _mean([_diagnosed(row, key, scale=scale) for row in cell.rows(name)]) for name in look if name in cell.recipes}
        drawn = {recipe: curve for recipe, curve in found.items() if curve}
        named += [(heading, drawn)] if drawn else []
    return _panels(named, look) if named else None


def _diagnosed(row: Row, key: str, *, scale: float) -> Curve:
    """One curve of the diagnostics; of a value for each layer the median of those that have one."""
    values = (_recorded(row).get("diagnostics") or {}).get(key)
    if isinstance(values, Mapping):
        layers = [[value for value in epoch if value is not None] for epoch in zip(*values.values(), strict=False)]
        values = [median(epoch) if epoch else None for epoch in layers]
    return _curve(row, values, scale=scale)


def _mean(curves: Sequence[Curve]) -> Curve:
    epochs = sorted({epoch for curve in curves for epoch in curve})
    return {epoch: fmean(curve[epoch] for curve in curves if epoch in curve) for epoch in epochs}


def schedules(group: Group, look: dict[str, Style]) -> Plot | None:
    """The strength of each technique per epoch, one panel each, and at the bottom the learning rate; from one run of each recipe."""
    panels: dict[str, dict[str, Curve]] = {}
    rates: dict[str, Curve] = {}
    for recipe in (name for name in look if name in group.recipes):
        row = max((row for cell in group.cells for row in cell.rows(recipe)), key=lambda row: len(_strengths(row)))
        for technique, values in _strengths(row).items():
            panels.setdefault(technique, {})[recipe] = _curve(row, values)
        rates[recipe] = _curve(row, _recorded(row).get("lr"))
    named = [*sorted(panels.items()), *([("learning rate", rates)] if any(rates.values()) else [])]
    return _panels(named, look) if named else None


def _panels(named: Sequence[tuple[str, dict[str, Curve]]], look: dict[str, Style]) -> Plot:
    last = str(len(named)) if len(named) > 1 else ""
    layout: Plot = {"height": 110 + 120 * len(named), "hovermode": "closest", "annotations": []}
    layout["xaxis"] = {"title": {"text": "epoch"}, "anchor": f"y{last}", "zeroline": False}
    data: list[Plot] = []
    listed: set[str] = set()
    for index, (name, members) in enumerate(named):
        axis, top, step = str(index + 1) if index else "", 1.0 - index / len(named), 1.0 / len(named)
        layout[f"yaxis{axis}"] = {"domain": [top - 0.88 * step, top - 0.28 * step], "rangemode": "tozero", "nticks": 4, "automargin": True}
        layout["annotations"].append(_heading(name, top - 0.26 * step))
        for recipe, curve in members.items():
            drawn = {**_schedule(curve, recipe, look[recipe]), "legendrank": FIRST_RANK + list(look).index(recipe)}
            data.append({**drawn, "yaxis": f"y{axis}", "showlegend": recipe not in listed})
            listed.add(recipe)
    return {"data": data, "layout": layout}


def _heading(name: str, y: float) -> Plot:
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": y, "yref": "paper", "yanchor": "bottom"}
    return {"text": f"<b>{text(name)}</b>", "showarrow": False, **place}


def _schedule(curve: Curve, recipe: str, style: Style) -> Plot:
    line = {"color": style.colour, "dash": style.dash, "width": 5 if style.dash == "solid" else 2}  # seen below another of the same values
    return {
        **_points(curve, recipe, ""),
        "mode": "lines+markers",
        "line": line,
        "marker": {"symbol": style.symbol, "size": 5},
        "legendgroup": recipe,
    }


def _recorded(row: Row) -> dict[str, Any]:
    return row.get("curves") or {}


def _strengths(row: Row) -> dict[str, list[float]]:
    return _recorded(row).get("strength") or {}


def _curve(row: Row, values: Sequence[float | None] | None, *, scale: float = 1.0) -> Curve:
    """Value by epoch, without the epochs that have none."""
    epochs = _recorded(row).get("epoch") or range(1, len(values or []) + 1)
    return {epoch: scale * value for epoch, value in zip(epochs, values or [], strict=False) if value is not None}


def _points(curve: Curve, recipe: str, whose: str) -> Plot:
    """A curve with five digits, which keeps the page small."""
    note = f"epoch %{{x}}: %{{y}}<extra>{text(recipe)}{text(whose)}</extra>"
    return {"x": list(curve), "y": [float(f"{value:.5g}") for value in curve.values()], "name": text(recipe), "hovertemplate": note}
