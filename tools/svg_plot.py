"""Small line plots as SVG, written by hand: nothing to install, the same bytes each time, readable on light and dark pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, ALONE, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 330, 520, 280, 46, 34, 44, 14  # of a panel (one alone is wider), and its margins
ROW, KEY = 20, 230  # of the legend: height of a row, width of an entry
COLOURS = ("#2f7ed8", "#e8710a", "#22a06b", "#d6409f", "#8250df", "#b8860b", "#0fa3b1", "#7d8590")  # 3:1 on white and on near-black
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#3d444d}.title{font-weight:600}.grid{stroke:#8c959f;stroke-opacity:.3}"
    ".even{stroke:#8c959f;stroke-width:1.5;stroke-dasharray:2 3}@media(prefers-color-scheme:dark){text{fill:#c9d1d9}}"
)


@dataclass(frozen=True)
class Line:
    """One line: colour by its name's place in the legend, and (sparsity, times as fast) points."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot with a title."""

    title: str
    lines: Sequence[Line] = field(default_factory=tuple)


def figure(panels: Sequence[Panel], *, caption: str) -> str:
    """The panels side by side with one legend: speedup (log 2) against sparsity (by the logarithm of what is kept), a line at 1."""
    lines = [line for panel in panels for line in panel.lines]
    names = list(dict.fromkeys(line.name for line in lines))
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [1.0, *(y for line in lines for _, y in line.points)]
    # A factor of 1.05 beyond the outermost points, and whole powers of 2 as ticks.
    wide = WIDTH if len(panels) > 1 else ALONE
    scale = _Scale(wide, xs, math.log2(min(ys)) - 0.1, math.log2(max(ys)) + 0.1)
    width = wide * len(panels)
    columns = max(1, (width - LEFT) // (KEY if max(map(len, names)) > 20 else KEY // 2))
    key = (width - LEFT) // columns
    height = HEIGHT + ROW * -(-len(names) // columns) + ROW + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{escape(caption)}</title><style>{STYLE}</style>",
    ]
    for number, panel in enumerate(panels):
        parts += [f'<g transform="translate({number * wide} 0)">', *_panel(panel, names, scale), "</g>"]
    for number, name in enumerate(names):
        x, y = LEFT + number % columns * key, HEIGHT + ROW * (number // columns) + 8
        colour = _colour(name, names)
        parts += [f'<path d="M{x} {y}h22" stroke="{colour}" stroke-width="2.5"/>', _text(x + 28, y + 4, name)]
    parts += [_text(LEFT, height - 12, caption), "</svg>"]
    return "\n".join(parts) + "\n"


@dataclass(frozen=True)
class _Scale:
    """Where values are in a panel."""

    width: int
    xs: Sequence[float]
    low: float
    high: float

    def x(self, sparsity: float) -> float:
        first, last = (-math.log(1 - self.xs[end]) for end in (0, -1))
        share = (-math.log(1 - sparsity) - first) / (last - first) if last > first else 0.5
        return round(LEFT + 10 + share * (self.width - LEFT - RIGHT - 20), 1)

    def y(self, ratio: float) -> float:
        share = (math.log2(ratio) - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def ticks(self) -> list[float]:
        return [2.0**power for power in range(math.ceil(self.low), math.floor(self.high) + 1)]


def _panel(panel: Panel, names: list[str], scale: _Scale) -> list[str]:
    parts = [_text(LEFT, 18, panel.title, "title"), _text((LEFT + scale.width - RIGHT) / 2, HEIGHT - 8, "sparsity", anchor="middle")]
    for tick in scale.ticks():
        kind = "even" if tick == 1 else "grid"
        parts += [f'<path class="{kind}" d="M{LEFT} {scale.y(tick)}H{scale.width - RIGHT}"/>']
        parts += [_text(LEFT - 6, scale.y(tick) + 4, f"{tick:g}x", anchor="end")]
    for sparsity in scale.xs:
        parts += [f'<path class="grid" d="M{scale.x(sparsity)} {TOP}V{HEIGHT - BOTTOM}"/>']
        parts += [_text(scale.x(sparsity), HEIGHT - BOTTOM + 16, f"{sparsity:.2f}", anchor="middle")]
    for line in panel.lines:
        colour, points = _colour(line.name, names), [(scale.x(x), scale.y(y)) for x, y in sorted(line.points)]
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        path = " ".join(f"{x},{y}" for x, y in points)
        parts += [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
    return parts


def _colour(name: str, names: list[str]) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _text(x: float, y: float, text: str, kind: str = "", *, anchor: str = "start") -> str:
    said = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{said}>{escape(text)}</text>'
