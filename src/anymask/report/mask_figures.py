"""The figures of the page of masks, as plain plotly.js dicts."""

from collections.abc import Mapping, Sequence

from anymask.connectivity import Layer
from anymask.overlaps import Overlap, whole
from anymask.report.cells import percent
from anymask.report.figures import Figure
from anymask.report.layers import density_map, heat_map
from anymask.report.look import COLOURS, Plot, styles, text
from anymask.report.mask_tiles import tiles
from anymask.report.seen import Seen

Shared = Mapping[tuple[int, int], Mapping[str, Overlap]]
Counts = dict[str, tuple[int, int]]  # layer -> how many, and of how many

AMBER = COLOURS[4]  # seen on white, on black and on a bar

DENSITIES = (
    "The share of weights, in %, that each mask keeps in each layer; light keeps much and dark little (colours are logarithmic), "
    "and 0 is a layer with no weight left."
)
CHANNELS = (
    "How many output and input channels of each layer have at least one kept weight, and of how many. Where the network is not known, "
    "a grouped convolution shows the inputs of one group, and a transposed one its inputs as outputs."
)
DEAD = "The share of output channels, in %, that have no kept weight: such a filter gives a constant, whatever the image."
UNREACHABLE = (
    "The share of kept weights, in %, that lie on no path of kept weights from the input to the output: what they see is always 0, or "
    "nothing uses what they give. Effective sparsity counts them as zeros (arXiv 2107.02306)."
)
SHARED = (
    "Left, the intersection over union of the kept weights (1: the same weights, 0: none in common), and as amber lines what two "
    "random masks of the same densities would have on average; right, the share of places, in %, where the two masks differ, "
    "which is the Hamming distance over the number of weights."
)
PAIRS = "The intersection over union of the kept weights of all layers together, for every pair: 1 is the same mask, 0 nothing in common."
PICTURES = (
    "The share of weights kept between each input channel (left to right) and output channel (top to bottom), shrunk to at most "
    "{side} x {side} fields by averaging; layers with one input per filter show the places of the kernel instead. "
    "Light keeps much, dark none; each layer has colours of its own, from 0 to its fullest field."
)


def figures(seen: Sequence[Seen], shared: Shared) -> list[Figure]:
    """All figures there are numbers for; `shared` is what each pair has in common, by the places of the two in `seen`."""
    known = [member for member in seen if member.reachable is not None]
    columns = [(member.name, _by_label(member.mask.layer_density())) for member in seen]
    drawn = [
        Figure("Density per layer", DENSITIES, _alone(density_map(columns))),
        Figure("Kept channels", CHANNELS, [(member.name, _channels(member.layers)) for member in seen]),
        Figure("Dead filters", DEAD, _alone(_bars({member.name: _dead(member) for member in seen}, title="dead filters, %"))),
        Figure("Unreachable weights", UNREACHABLE, _alone(_bars({m.name: _lost(m) for m in known}, title="unreachable, %"))),
        *_shared(seen, shared),
        _pictures(seen),
    ]
    return [figure for figure in drawn if figure.options]


def _alone(plot: Plot | None) -> list[tuple[str, Plot]]:
    return [] if plot is None else [("", plot)]


def label(name: str) -> str:
    """A parameter's name without what nearly all of them end in."""
    return name.removesuffix(".weight")


def _by_label(values: Mapping[str, float]) -> dict[str, float]:
    return {label(name): value for name, value in values.items()}


def _channels(layers: Mapping[str, Layer]) -> Plot:
    pairs = [[(layer.outs_kept, layer.outs), (layer.ins_kept, layer.ins)] for layer in layers.values()]
    heat = {
        "z": [[kept / total for kept, total in line] for line in pairs],
        "text": [[f"{kept} / {total}" for kept, total in line] for line in pairs],
        "hovertemplate": "%{y}<br>%{x}: %{text}<extra></extra>",
        "zmin": 0,
        "zmax": 1,
    }
    return heat_map(heat, columns=["outputs", "inputs"], lines=list(map(label, layers)))


def _dead(member: Seen) -> Counts:
    return {name: (layer.dead, layer.outs) for name, layer in member.layers.items()}


def _lost(member: Seen) -> Counts:
    return {name: (lost, member.layers[name].kept) for name, lost in member.unreachable.items()}


def _bars(counts: Mapping[str, Counts], *, title: str) -> Plot | None:
    """A bar for each mask and layer, with the counts beside those that are not 0."""
    look = styles(list(counts), baseline="")
    layers = list(dict.fromkeys(label(layer) for members in counts.values() for layer in members))
    data = [_bar(name, members, look[name].colour) for name, members in counts.items()]
    layout = {
        "height": 110 + len(layers) * max(20, 15 * len(counts)),
        "barmode": "group",
        "bargap": 0.25,
        "xaxis": {"title": {"text": title}, "range": [0, 108], "tickvals": [0, 25, 50, 75, 100], "zeroline": False},
        "yaxis": _layer_axis(layers),
        "showlegend": len(counts) > 1,
    }
    return {"data": data, "layout": layout} if data else None


def _bar(name: str, members: Counts, colour: str) -> Plot:
    words = [f"{part:,} of {of:,}" for part, of in members.values()]
    return {
        "type": "bar",
        "orientation": "h",
        "name": text(name),
        "x": [100 * part / of if of else 0 for part, of in members.values()],
        "y": [text(label(layer)) for layer in members],
        "text": [f"{part:,}" if part else "" for part, _ in members.values()],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertext": [f"{text(label(layer))}<br>{text(name)}: {count}" for layer, count in zip(members, words, strict=True)],
        "hoverinfo": "text",
        "marker": {"color": colour},
    }


def _layer_axis(layers: Sequence[str]) -> Plot:
    names = [text(layer) for layer in layers]
    order = {"categoryorder": "array", "categoryarray": names, "autorange": "reversed", "tickmode": "array", "tickvals": names}
    return {"type": "category", **order, "automargin": True, "showgrid": False, "zeroline": False}


# -- what masks have in common -------------------------------------------------------------------------------------


def _shared(seen: Sequence[Seen], shared: Shared) -> list[Figure]:
    options = [(f"{seen[a].name} and {seen[b].name}", _overlaps(seen[a], seen[b], layers)) for (a, b), layers in shared.items()]
    drawn = [Figure("Overlap per layer", SHARED, options)]
    if len(seen) > 2:
        totals = {pair: whole(layers).iou for pair, layers in shared.items()}
        drawn.append(Figure("Overlap of every pair", PAIRS, [("", _matrix([member.name for member in seen], totals))]))
    return drawn


def _overlaps(first: Seen, second: Seen, layers: Mapping[str, Overlap]) -> Plot:
    names = [text(label(layer)) for layer in layers]
    chance = [by_chance(first.layers[name].density, second.layers[name].density) for name in layers]
    alike = [f"kept by both {o.both:,}, by either {o.either:,}<br>IoU {o.iou:.3f}" for o in layers.values()]
    differ = [f"{o.hamming:,} of {o.total:,} places differ" for o in layers.values()]
    expected = [f"IoU by chance {value:.3f}" for value in chance]
    common = {"orientation": "h", "y": names, "showlegend": False, "hoverinfo": "y+text"}
    bar = {**common, "type": "bar"}
    line = {"color": AMBER, "width": 3}
    data = [
        {**bar, "x": [o.iou for o in layers.values()], "hovertext": alike, "marker": {"color": COLOURS[0]}},
        {**common, "x": chance, "hovertext": expected, "mode": "markers", "marker": {"symbol": "line-ns", "size": 14, "line": line}},
        {
            **bar,
            "x": [100 * o.hamming / o.total for o in layers.values()],
            "hovertext": differ,
            "marker": {"color": COLOURS[1]},
            "xaxis": "x2",
        },
    ]
    layout = {
        "height": 90 + 24 * len(layers),
        "bargap": 0.3,
        "xaxis": {"title": {"text": "IoU"}, "domain": [0, 0.44], "range": [0, 1.03], "nticks": 4, "zeroline": False},
        "xaxis2": {"title": {"text": "differ, %"}, "domain": [0.56, 1], "rangemode": "tozero", "nticks": 4, "zeroline": False},
        "yaxis": _layer_axis(list(map(label, layers))),
    }
    return {"data": data, "layout": layout}


def by_chance(first: float, second: float) -> float:
    """The IoU of two independent random masks of these densities, for many places: p q / (p + q - p q).

    Example:
        >>> round(by_chance(0.5, 0.5), 4), by_chance(0.0, 0.0)
        (0.3333, 1.0)
    """
    either = first + second - first * second
    return first * second / either if either else 1.0


def _matrix(names: Sequence[str], totals: Mapping[tuple[int, int], float]) -> Plot:
    places = range(len(names))
    z = [[1.0 if a == b else totals[min(a, b), max(a, b)] for b in places] for a in places]
    heat = {
        "z": z,
        "text": [[f"{value:.3f}" for value in line] for line in z],
        "hovertemplate": "%{y} and %{x}<br>IoU %{text}<extra></extra>",
        "zmin": 0,
        "zmax": 1,
    }
    plot = heat_map(heat, columns=names, lines=names)
    plot["layout"]["height"] = 90 + 40 * len(names)
    return plot


def _pictures(seen: Sequence[Seen]) -> Figure:
    drawn = [(f"{member.name}, {percent(member.mask.sparsity)}", *tiles(member.mask)) for member in seen]
    side = max((side for _, _, side in drawn), default=0)
    return Figure("Layer by layer", PICTURES.format(side=side), [(name, plot) for name, plot, _ in drawn])
