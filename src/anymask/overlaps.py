"""How much two masks have in common."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from anymask.errors import MaskError
from anymask.mask import Mask
from anymask.registry import nearest


@dataclass(frozen=True)
class Overlap:
    """What two masks of the same places share.

    Args:
        both: places that both keep.
        either: places that at least one keeps.
        total: all places.
    """

    both: int
    either: int
    total: int

    @property
    def iou(self) -> float:
        """Intersection over union of the kept places, in [0, 1]; 1 where neither keeps any."""
        return self.both / self.either if self.either else 1.0

    @property
    def hamming(self) -> int:
        """Hamming distance: places where the two differ, in 0 ... total."""
        return self.either - self.both

    @property
    def alike(self) -> float:
        """Share of places, in [0, 1], where the two agree: 1 - hamming / total."""
        return 1.0 - self.hamming / self.total

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.both + other.both, self.either + other.either, self.total + other.total)


def overlap(first: Mask, second: Mask) -> dict[str, Overlap]:
    """The overlap of two masks in each parameter.

    Raises:
        MaskError: when they are not of the same names and shapes.

    Example:
        >>> import torch
        >>> one = Mask({"weight": torch.tensor([1, 1, 0, 0])})
        >>> shared = overlap(one, Mask({"weight": torch.tensor([1, 0, 1, 0])}))["weight"]
        >>> round(shared.iou, 3), shared.hamming, shared.alike
        (0.333, 2, 0.5)
    """
    shapes = [{name: tuple(mask[name].shape) for name in mask} for mask in (first, second)]
    other = sorted(name for name in {*first, *second} if shapes[0].get(name) != shapes[1].get(name))
    if other:
        near = nearest(other[0], [name for name in {*first, *second} if name != other[0]], most=1)
        raise MaskError(
            f"two masks of other networks; not the same in both: {', '.join(other[:8])}",
            allowed="masks with the same names and shapes",
            fix="make both on the same model" + (f" (nearest to {other[0]}: {near[0]})" if near else ""),
        )
    return {name: _overlap(mask, second[name]) for name, mask in first.items()}


def _overlap(first: Tensor, second: Tensor) -> Overlap:
    return Overlap(int((first & second).sum()), int((first | second).sum()), first.numel())


def whole(layers: Mapping[str, Overlap]) -> Overlap:
    """The overlap of all parameters together."""
    return sum(layers.values(), Overlap(0, 0, 0))
