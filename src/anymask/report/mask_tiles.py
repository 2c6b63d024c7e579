"""A small picture of each layer's mask."""

import math
import re

from torch import Tensor
from torch.nn import functional as F

from anymask.mask import Mask
from anymask.report.look import Plot, text

SIDES = ((100, 64), (400, 32))  # with at most so many layers, so many fields a side: pages stay small
LEAST_SIDE = 16
COLUMNS, TOP, TITLE, PICTURE, GAP = 3, 24, 56, 120, 10  # pixels
WIDEST = 20  # letters of a line of the title, for a third of a phone


def tiles(mask: Mask) -> tuple[Plot, int]:
    """One heat map for each parameter, three in a row, and the most fields on a side of them."""
    side = next((side for most, side in SIDES if len(mask) <= most), LEAST_SIDE)
    lines = math.ceil(len(mask) / COLUMNS)
    height = lines * (TITLE + PICTURE + GAP)
    layout: Plot = {"height": height + TOP, "margin": {"l": 0, "r": 0, "t": TOP, "b": 0}, "annotations": []}
    data = []
    for index, (name, kept) in enumerate(mask.items()):
        axis, column, top = str(index + 1) if index else "", index % COLUMNS, 1 - index // COLUMNS / lines
        x0, y1 = column / COLUMNS, top - TITLE / height
        common = {"visible": False, "fixedrange": True}
        layout[f"xaxis{axis}"] = {**common, "domain": [x0, x0 + 0.97 / COLUMNS], "anchor": f"y{axis}"}
        layout[f"yaxis{axis}"] = {**common, "domain": [y1 - PICTURE / height, y1], "anchor": f"x{axis}", "autorange": "reversed"}
        layout["annotations"].append(_title(name, kept, x=x0, y=y1))
        data.append({**_tile(name, shares(kept, side)), "xaxis": f"x{axis}", "yaxis": f"y{axis}"})
    return {"data": data, "layout": layout}, side


def shares(kept: Tensor, side: int) -> Tensor:
    """Kept share, in [0, 1], by output and input channel, at most `side` of each; by place in the kernel where there is one input.

    Example:
        >>> import torch
        >>> shares(torch.tensor([[1, 1, 0, 0]] * 3), 2)[0].tolist()
        [1.0, 0.0]
    """
    whole = kept.reshape(kept.shape[0] if kept.ndim else 1, kept.shape[1] if kept.ndim > 1 else 1, -1).float()
    flat = whole[:, 0] if whole.shape[1] == 1 else whole.mean(2)
    return F.adaptive_avg_pool2d(flat[None], (min(side, flat.shape[0]), min(side, flat.shape[1])))[0]


def _tile(name: str, fields: Tensor) -> Plot:
    return {
        "type": "heatmap",
        "z": [[round(value, 1) for value in line] for line in (100 * fields).tolist()],
        "zmin": 0,
        "zmax": max(round(100 * float(fields.max()), 1), 0.1),
        "colorscale": "Cividis",
        "showscale": False,
        "hovertemplate": f"{text(name)}<br>%{{z}}% kept here<extra></extra>",
    }


def _title(name: str, kept: Tensor, *, x: float, y: float) -> Plot:
    shape = " x ".join(map(str, kept.shape)) or "1"
    words = [*map(text, lines_of(name.removesuffix(".weight"))), shape, f"{100 * int(kept.sum()) / kept.numel():.3g}%"]
    place = {"x": x, "xref": "paper", "xanchor": "left", "y": y, "yref": "paper", "yanchor": "bottom", "align": "left"}
    return {"text": "<br>".join(words), "showarrow": False, "font": {"size": 10}, **place}


def lines_of(name: str) -> list[str]:
    """A name in at most two lines that fit above a picture; of what is longer the end is shown, which says most.

    Example:
        >>> lines_of("layer1.0.shortcut.conv1")
        ['layer1.', '0.shortcut.conv1']
        >>> lines_of("model.encoder.layers.11.attention.output")
        ['…encoder.layers.', '11.attention.output']
    """
    parts, lines = re.findall(r"[^.]*\.?", name), [""]
    for part in reversed(parts):
        if len(part + lines[0]) > WIDEST and lines[0]:
            lines.insert(0, "")
        lines[0] = part + lines[0]
    shown = [line if len(line) <= WIDEST else "…" + line[1 - WIDEST :] for line in lines[-2:]]
    return shown if len(lines) < 3 or shown[0].startswith("…") else ["…" + shown[0][-WIDEST + 1 :], shown[1]]
