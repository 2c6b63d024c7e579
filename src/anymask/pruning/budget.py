"""How many weights are kept, and what happens to a layer that would keep none."""

import math
import warnings
from typing import Any

from anymask.errors import MaskError, SettingError
from anymask.mask import Mask
from anymask.pruning.distribution import Shapes
from anymask.registry import unknown

ON_COLLAPSE = ("warn", "raise", "avoid")


class CollapseWarning(UserWarning):
    """A layer keeps no weight at all: nothing passes through it."""


def keep_count(shapes: Shapes, sparsity: float, *, on_collapse: str) -> int:
    """round((1 - sparsity) * total): how many weights of all `shapes` are kept.

    Raises:
        SettingError: for a sparsity outside [0, 1) and an `on_collapse` that is not there.
        MaskError: when every layer shall keep a weight and there are fewer weights than layers.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise SettingError(f"sparsity came as {sparsity!r}", allowed="a number in [0, 1)", fix="give 0.98 for 98% zeros")
    if on_collapse not in ON_COLLAPSE:
        raise unknown(on_collapse, ON_COLLAPSE, what="on_collapse")
    count = round((1 - sparsity) * sum(math.prod(shape) for shape in shapes.values()))
    if on_collapse == "avoid" and count < len(shapes):
        raise MaskError(
            f"sparsity {sparsity} keeps {count} weights in {len(shapes)} layers",
            allowed="at least one weight a layer with on_collapse='avoid'",
            fix="lower the sparsity, or exclude layers",
        )
    return count


def at_least(name: str, value: Any, least: int) -> int:
    """`value`, a whole number of at least `least`.

    Raises:
        SettingError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"{name} came as {value!r}", allowed=f"a whole number >= {least}", fix=f"give {name}={least} or more")
    return value


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
