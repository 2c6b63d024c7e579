"""A mask as it is looked at: on the screen and on a page."""

from collections.abc import Mapping
from dataclasses import dataclass

from anymask.connectivity import Layer
from anymask.mask import Mask
from anymask.report.cells import percent


@dataclass(frozen=True)
class Seen:
    """A mask with what was found out about it.

    Args:
        name: what it is called.
        mask: the mask.
        layers: what it keeps of each parameter.
        reachable: the kept weights on a path from the input to the output; None where the network is not known.
        network: the network in words; empty where it is not known.
        why: why `reachable` is not known; empty where it is.
    """

    name: str
    mask: Mask
    layers: Mapping[str, Layer]
    reachable: Mask | None = None
    network: str = ""
    why: str = ""

    @property
    def dead(self) -> int:
        """Dead filters of all parameters."""
        return sum(layer.dead for layer in self.layers.values())

    @property
    def outs(self) -> int:
        """Output channels of all parameters."""
        return sum(layer.outs for layer in self.layers.values())

    @property
    def unreachable(self) -> dict[str, int]:
        """Kept weights of each parameter that are on no path; empty where that is not known."""
        if self.reachable is None:
            return {}
        return {name: self.layers[name].kept - int(kept.sum()) for name, kept in self.reachable.items()}

    @property
    def summary(self) -> str:
        """Sparsity, effective sparsity and dead filters in a sentence or two."""
        mask, lost = self.mask, sum(self.unreachable.values())
        words = f"sparsity {percent(mask.sparsity)}, {mask.kept:,} of {mask.total:,} weights kept"
        words += f"; {self.dead:,} of {self.outs:,} filters dead"
        if self.reachable is None:
            return words
        lie = "kept weight lies" if lost == 1 else "kept weights lie"
        return f"{words}; effective sparsity {percent(self.reachable.sparsity)}, as {lost:,} {lie} on no path from input to output"

    @property
    def made(self) -> str:
        """Where the mask comes from, in words; empty where it does not say."""
        plain = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in self.mask.info.items()}
        return ", ".join(f"{key} {value}" for key, value in plain.items() if key != "collapsed" and not _is_bare(value))


def _is_bare(value: object) -> bool:
    return isinstance(value, Mapping) or value is None or value == ""
