"""How many weights each layer keeps: uniform, ER, ERK and balanced."""

import math
from collections.abc import Callable, Mapping, Sequence

from anymask.registry import lookup

Shapes = Mapping[str, Sequence[int]]

# The density of a layer up to a factor that all layers share. A shape is (out, in, *kernel), or (in, out, *kernel).
DISTRIBUTIONS: dict[str, Callable[[Sequence[int]], float]] = {
    "uniform": lambda shape: 1.0,
    "er": lambda shape: (shape[0] + shape[1]) / (shape[0] * shape[1]),  # SET, arXiv 1707.04780
    "erk": lambda shape: sum(shape) / math.prod(shape),  # RigL, arXiv 1911.11134
    "balanced": lambda shape: 1 / math.prod(shape),  # equally many in each layer, arXiv 2210.02412
}


def densities(shapes: Shapes, count: int, *, distribution: str) -> dict[str, float]:
    """The share of kept weights of each layer, in [0, 1], such that `count` weights are kept in all.

    density_l = min(1, eps * r_l) with r_l = 1 (uniform), (n_in + n_out) / (n_in * n_out) (ER),
    (n_in + n_out + k_1 + ...) / (n_in * n_out * k_1 * ...) (ERK) or 1 / size_l (balanced); eps is the same for all layers and is
    found such that sum_l density_l * size_l = count: what a full layer cannot take goes to the others.

    Args:
        shapes: for each layer (n_out, n_in, *kernel), in either order of the first two.
        count: weights to keep in all layers together.
        distribution: "uniform", "er", "erk" or "balanced".

    Differs from the paper: RigL's uniform keeps the first layer dense; here name it in `exclude` for that.

    Example:
        >>> {n: round(d, 3) for n, d in densities({"conv": (8, 4, 3, 3), "fc": (10, 8)}, 184, distribution="erk").items()}
        {'conv': 0.361, 'fc': 1.0}
    """
    raw = {name: lookup(DISTRIBUTIONS, distribution, what="distribution")(shape) for name, shape in shapes.items()}
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    free, full = list(shapes), set[str]()
    while free:
        budget = count - sum(size[name] for name in full)
        eps = budget / sum(raw[name] * size[name] for name in free)
        over = {name for name in free if eps * raw[name] > 1}
        if not over:
            break
        full |= over  # eps only grows from here, so what is full stays full
        free = [name for name in free if name not in over]
    return {name: 1.0 if name in full else eps * raw[name] for name in shapes}


def layer_counts(shapes: Shapes, count: int, *, distribution: str, floor: int = 0) -> dict[str, int]:
    """How many weights each layer keeps: `densities` times sizes in whole numbers whose sum is exactly `count`.

    Args:
        floor: each layer keeps as many in any case (or all it has); the caller sees to it that `count` allows that.

    Example:
        >>> layer_counts({"a": (3, 1), "b": (3, 1), "c": (3, 1)}, 4, distribution="uniform")
        {'a': 2, 'b': 1, 'c': 1}
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted = {name: d * size[name] for name, d in densities(shapes, count, distribution=distribution).items()}
    return in_steps(wanted, count, step=dict.fromkeys(size, 1), most=size, least={name: min(floor, n) for name, n in size.items()})


def in_steps(
    wanted: Mapping[str, float], total: int, *, step: Mapping[str, int], most: Mapping[str, int], least: Mapping[str, int]
) -> dict[str, int]:
    """`wanted` weights of each layer as multiples of its step, in all as near to `total` as fits, never above.

    Rounded by largest remainder (equal remainders: the earlier layer). What the floors take goes off the largest layers.

    Args:
        wanted: weights of each layer, whose sum is `total`.
        step, most, least: of each layer, in weights; `most` and `least` are multiples of `step`, and all `least` fit into `total`.

    Example:
        >>> in_steps({"a": 9.0, "b": 3.0}, 12, step={"a": 4, "b": 2}, most={"a": 16, "b": 8}, least={"a": 0, "b": 0})
        {'a': 8, 'b': 4}
    """
    counts = {name: min(most[name], max(least[name], math.floor(value / step[name]) * step[name])) for name, value in wanted.items()}
    while sum(counts.values()) > total:
        counts_above = {name: count for name, count in counts.items() if count > least[name]}
        largest = max(counts_above, key=counts_above.__getitem__)
        counts[largest] -= step[largest]
    rest = total - sum(counts.values())
    # rounded: where all remainders are equal, as balanced ones are, the noise of float64 would decide
    by_remainder = sorted(wanted, key=lambda name: round((counts[name] - wanted[name]) / step[name], 9))
    while fitting := [name for name in by_remainder if step[name] <= rest and counts[name] < most[name]]:
        for name in fitting:
            if step[name] <= rest:
                counts[name] += step[name]
                rest -= step[name]
    return counts
