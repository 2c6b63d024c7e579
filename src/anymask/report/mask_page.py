"""Masks as one interactive HTML page."""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import combinations

from anymask.overlaps import Overlap, overlap, whole
from anymask.report.mask_figures import by_chance, figures
from anymask.report.page import Page, listed, save
from anymask.report.seen import Seen
from anymask.report.table import NONE, Table
from anymask.version import __version__

UNREACHABLE_NOTE = (
    "Unreachable: kept weights on no path of kept weights from the input to the output; effective sparsity counts them as zeros."
)
OVERLAP_NOTE = (
    "IoU: kept by both / kept by either, and what two random masks of the same densities would have; Hamming: places where they differ."
)


def write_mask_page(seen: Sequence[Seen], path: str | os.PathLike[str], *, title: str) -> None:
    """Write masks to `path` as one interactive HTML page that loads nothing from anywhere.

    Args:
        seen: what was found out about each mask; their names differ.
        path: such as "masks.html"; an older file is replaced.
        title: the heading of the page.

    Raises:
        AnymaskError: when plotly is not installed.
        MaskError: when two of several masks are not of the same names and shapes.
    """
    shared = {(a, b): overlap(seen[a].mask, seen[b].mask) for a, b in combinations(range(len(seen)), 2)}
    summary = listed([f"{member.name}: {member.summary}." for member in seen])
    overlaps = [_overlap(seen[a], seen[b], layers) for (a, b), layers in shared.items()]
    tables = {"Layers": [_layers(member) for member in seen], "Overlap": overlaps}
    save(path, Page(title, summary, figures(seen, shared), tables, {"Where the masks come from": _facts(seen)}))


def _layers(member: Seen) -> Table:
    header = ["parameter", "shape", "kept", "of", "density", "outputs kept", "inputs kept", "dead filters", "unreachable"]
    lines = []
    for name, layer in member.layers.items():
        lost = f"{member.unreachable[name]:,}" if member.unreachable else NONE
        counts = [f"{layer.kept:,}", f"{layer.total:,}", f"{layer.density:.2%}"]
        channels = [f"{layer.outs_kept} / {layer.outs}", f"{layer.ins_kept} / {layer.ins}", str(layer.dead)]
        lines.append([name, " x ".join(map(str, layer.shape)), *counts, *channels, lost])
    return Table(member.name, header, lines, [UNREACHABLE_NOTE if member.unreachable else f"{member.why[:1].upper()}{member.why[1:]}."])


def _overlap(first: Seen, second: Seen, shared: Mapping[str, Overlap]) -> Table:
    densities = {name: (first.layers[name].density, second.layers[name].density) for name in shared}
    densities["all"] = (first.mask.density, second.mask.density)
    lines = [
        [name, f"{o.both:,}", f"{o.either:,}", f"{o.iou:.3f}", f"{by_chance(*densities[name]):.3f}", f"{o.hamming:,}", f"{o.alike:.2%}"]
        for name, o in {**shared, "all": whole(shared)}.items()
    ]
    header = ["parameter", "kept by both", "by either", "IoU", "IoU by chance", "Hamming", "places alike"]
    return Table(f"{first.name} and {second.name}", header, lines, [OVERLAP_NOTE])


def _facts(seen: Sequence[Seen]) -> dict[str, str]:
    made = {member.name: "; ".join(filter(None, [member.made, member.network])) or "it does not say" for member in seen}
    return {**made, "Written by": f"anymask {__version__}, torch {version('torch')}"}
