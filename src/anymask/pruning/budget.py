"""How many weights are kept, and what happens to a layer that would keep none."""

import math
import operator
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from anymask.errors import MaskError, SettingError
from anymask.mask import Mask
from anymask.pruning.distribution import Shapes
from anymask.pruning.patterns import Pattern
from anymask.registry import unknown

ON_COLLAPSE = ("warn", "raise", "avoid")


class CollapseWarning(UserWarning):
    """A layer keeps no weight at all: nothing passes through it."""


class TieWarning(UserWarning):
    """A part of a mask was drawn by lot, because scores are equal: another seed gives another mask."""


class OutputWarning(UserWarning):
    """An output of the network keeps no weight: a classifier never tells that class by its input."""


def keep_count(shapes: Shapes, sparsity: float | None, *, pattern: Pattern) -> int:
    """round((1 - sparsity) * total): how many weights of all `shapes` are kept.

    Raises:
        SettingError: as `density_of`.
    """
    return round(density_of(sparsity, pattern=pattern) * sum(math.prod(shape) for shape in shapes.values()))


def density_of(sparsity: float | None, *, pattern: Pattern) -> float:
    """1 - sparsity, the share kept, in (0, 1].

    Raises:
        SettingError: for a sparsity outside [0, 1), none where the pattern does not decide it, or another one than it decides.
    """
    if pattern.density is not None and sparsity is None:
        return pattern.density
    if sparsity is None or isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise SettingError(f"sparsity came as {sparsity!r}", allowed="a number in [0, 1)", fix="give 0.98 for 98% zeros")
    if pattern.density is not None and abs(1 - sparsity - pattern.density) > 1e-9:
        decided = 1 - pattern.density
        raise SettingError(
            f"sparsity came as {sparsity} with pattern {pattern.name}",
            allowed=f"{decided:g}, which is what this pattern means",
            fix=f"give {decided:g}, or another pattern",
        )
    return 1 - sparsity if pattern.density is None else pattern.density


def least_kept(floor: int, *, on_collapse: str) -> int:
    """How many weights each layer keeps in any case.

    Raises:
        UnknownName: for an `on_collapse` that is not there.
        SettingError: for a floor that is no whole number >= 0.
    """
    if on_collapse not in ON_COLLAPSE:
        raise unknown(on_collapse, ON_COLLAPSE, what="on_collapse")
    return max(at_least("floor", floor, 0), int(on_collapse == "avoid"))


def at_least(name: str, value: Any, least: int) -> int:
    """`value`, a whole number of at least `least`.

    Raises:
        SettingError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"{name} came as {value!r}", allowed=f"a whole number >= {least}", fix=f"give {name}={least} or more")
    return value


def seed_of(seed: Any, *, least: int = -(2**63)) -> int:
    """`seed`, a whole number that generators take.

    Raises:
        SettingError: otherwise, and for one below `least`.
    """
    try:
        number = operator.index(seed)  # of NumPy, too
    except TypeError:
        number = least - 1
    if isinstance(seed, bool) or not least <= number < 2**64:
        raise SettingError(f"seed came as {seed!r}", allowed=f"a whole number from {least} to {2**64 - 1}", fix="give seed=0, for example")
    return number


def report_collapse(mask: Mask, *, on_collapse: str) -> Mask:
    """`mask`, with the names of the layers that keep nothing in `mask.info["collapsed"]`, and said aloud.

    Raises:
        MaskError: when there are any and `on_collapse` is "raise".
    """
    gone = mask.info["collapsed"] = mask.collapsed()
    if not gone:
        return mask
    came = f"{len(gone)} of {len(mask)} layers keep no weight at sparsity {mask.sparsity:.4f}: {', '.join(gone)}"
    if on_collapse == "raise":
        raise MaskError(came, allowed="at least one weight in each", fix="give on_collapse='avoid', a lower sparsity or scope='erk'")
    warnings.warn(f"{came}. on_collapse='avoid' keeps one in each", CollapseWarning, stacklevel=3)
    return mask


def report_ties(method: str, scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], *, apart: bool) -> None:
    """Say aloud when more than half of what is kept scored no more than something that is not: a lot has chosen it.

    Args:
        method: that gave the scores.
        scores: on the CPU, in the shapes of `kept`.
        apart: whether each layer's weights competed with each other only.
    """
    groups = [(name,) for name in scores] if apart else [tuple(scores)]
    drawn: dict[str, int] = {}
    for names in groups:
        best = max((float(scores[name][~kept[name]].max()) for name in names if not kept[name].all()), default=-math.inf)
        drawn |= {name: int((scores[name][kept[name]] == best).sum()) for name in names}
    count, total = sum(drawn.values()), sum(int(keep.sum()) for keep in kept.values())
    if count > total / 2:  # dead units have scores of 0, too, and a mask of low sparsity keeps some of them
        where = ", ".join(name for name in drawn if drawn[name])
        warnings.warn(
            f"{method} scored {count} of the {total} weights that it keeps no higher than some that it prunes: a lot by `seed` chose them "
            f"(in {where}). Look for scores that are all 0, or take another method",
            TieWarning,
            stacklevel=3,
        )


def report_recurrent(covered: Mapping[str, Tensor], dense: Iterable[Tensor]) -> None:
    """Say aloud when recurrent weights, which stay dense unless somebody names them, are more than all that the mask is to cover."""
    mine, theirs = (sum(weight.numel() for weight in weights) for weights in (covered.values(), dense))
    if theirs > mine:
        fix = "kinds=['conv', 'linear', 'recurrent'] prunes them, too"
        warnings.warn(f"the mask covers {mine:,} weights, and {theirs:,} of recurrent layers stay dense: {fix}", stacklevel=3)


def report_outputs(name: str, kept: Tensor) -> None:
    """Say aloud when outputs of the last layer, `kept` (..., outputs, inputs), keep nothing, though others do."""
    alive = kept.any(-1).reshape(-1)
    if 0 < int(alive.sum()) < len(alive):
        came = f"{int((~alive).sum())} of {len(alive)} outputs of the last layer ({name}) keep no weight"
        fix = f"exclude=[{name!r}] leaves the layer dense"
        warnings.warn(f"{came}: they give the same number for every input. {fix}", OutputWarning, stacklevel=3)
