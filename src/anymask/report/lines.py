"""Figures over epochs: training curves and schedules."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from anymask.report.cells import Cell, Group, Row
from anymask.report.look import Plot, Style, text

Curve = dict[float, float]  # value by epoch
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
    epochs = sorted({epoch for _, curve in found for epoch in curve})
    mean = {epoch: fmean(curve[epoch] for _, curve in found if epoch in curve) for epoch in epochs}
    common = {"mode": "lines", "legendgroup": recipe, "yaxis": axis}
    thin = {**common, "line": {"color": style.colour, "width": 1}, "opacity": 0.45, "showlegend": False}
    thick = {**common, "line": {"color": style.colour, "width": 3, "dash": style.dash}, "showlegend": axis == "y"}
    single = [{**thin, **_points(curve, recipe, f", seed {seed}")} for seed, curve in found]
    return [*single, {**thick, **_points(mean, recipe, f", mean of {len(found)}")}]


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
