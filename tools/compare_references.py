"""Compare every mask method with its formula written out a second time (tests/reference), on several networks and seeds.

python -m tools.compare_references        writes results/references.json, of which tools/make_docs.py makes the table of docs/masks.md
"""

import json
import platform
import warnings
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy
import torch
from tests.reference.cases import LOTTERIES, SCORED, Comparison, compare, compare_lottery, compare_random

from anymask.pruning import METHODS, CollapseWarning
from anymask.runlog import atomic

ROOT = Path(__file__).resolve().parent.parent
NETS = ("chain", "conv", "norm")
SPARSITIES = (0.5, 0.9, 0.98)
SEEDS = range(10)


def comparisons(method: str) -> Iterable[Comparison]:
    """All of a method, one by one."""
    if method in LOTTERIES:
        return (compare_lottery(method, seed, sparsity) for seed, sparsity in product(SEEDS, SPARSITIES))
    one: Callable[[str, str, int, float], Comparison] = compare if method in SCORED else compare_random
    return (one(method, net, seed, sparsity) for net, seed, sparsity in product(NETS, SEEDS, SPARSITIES))


def summary(found: list[Comparison]) -> dict[str, object]:
    """Of one method: how far scores differ at most, and how many entries of the masks (or counts of layers) are equal."""
    differences = [one.difference for one in found if one.difference is not None]
    entries, agree = (sum(getattr(one, key) for one in found) for key in ("entries", "agree"))
    return {
        "cases": len(found),
        "difference": max(differences) if differences else None,
        "entries": entries,
        "agree": agree,
        "whole masks": sum(one.rounds == one.asked for one in found),
        "until a tie": sum(0 < one.rounds < one.asked for one in found),
        "tie at once": sum(one.rounds == 0 for one in found),
    }


def main() -> None:
    warnings.simplefilter("ignore", CollapseWarning)
    torch.set_num_threads(1)
    methods = {}
    for method in METHODS:
        methods[method] = summary(list(comparisons(method)))
        print(method, methods[method], flush=True)
    made = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    settings = {"nets": NETS, "seeds": len(SEEDS), "sparsities": SPARSITIES}
    with atomic(ROOT / "results" / "references.json", "w") as file:
        file.write(json.dumps({"made with": made, "settings": settings, "methods": methods}, indent=1) + "\n")


if __name__ == "__main__":
    main()
