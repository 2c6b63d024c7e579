"""How recipes and names look in every figure of a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from anymask.report.cells import percent

Plot = dict[str, Any]  # what plotly.js draws: {"data": traces, "layout": layout}

GREY = "#8a8a8a"  # the baseline; the rest is the palette of Okabe and Ito without black, safe for the colour-blind
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A800")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "triangle-down", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Style:
    """How a recipe looks in every figure of a page."""

    colour: str
    symbol: str
    dash: str


def styles(recipes: Sequence[str], *, baseline: str) -> dict[str, Style]:
    """A colour, symbol and dash for each recipe; the baseline is grey. Beyond the palette, symbols and dashes tell them apart."""
    found = {baseline: Style(GREY, SYMBOLS[0], DASHES[0])}
    for index, recipe in enumerate(sorted(set(recipes) - {baseline})):
        found[recipe] = Style(COLOURS[index % len(COLOURS)], SYMBOLS[(index + 1) % len(SYMBOLS)], DASHES[(index + 1) % len(DASHES)])
    return found


def text(name: Any) -> str:
    """A name for a label: plotly.js takes labels for a small HTML."""
    return escape(str(name), quote=False)


def label(name: str, sparsity: float) -> str:
    """A mask and its sparsity, as the label of a line."""
    return text(f"{name}, {percent(sparsity)}")
