"""Looking at masks: in the network they are of, where that is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anymask.connectivity import reachable, structure
from anymask.errors import AnymaskError, SettingError
from anymask.formats import load_mask
from anymask.mask import Mask
from anymask.models import find, is_own
from anymask.report.seen import Seen

MOST_VALUES = 2**20  # of an input: what a file says is only believed up to here
HOW_TO_SAY = "unreachable weights need the network, which this file does not name: give --model NAME --input C H W"


@dataclass(frozen=True)
class Network:
    """A network of `anymask.models` and the shape of its input, (C, H, W).

    Raises:
        SettingError: for a size that no input has.
    """

    model: str
    classes: int
    input: tuple[int, int, int]

    def __post_init__(self) -> None:
        c, h, w = self.input
        if min(self.input) < 1 or c * h * w > MOST_VALUES:
            raise SettingError(
                f"the input came as {c} {h} {w}",
                allowed=f"channels, height and width from 1, at most {MOST_VALUES:,} values",
                fix="give the size of one image, such as 3 32 32",
            )

    def __str__(self) -> str:
        return f"{self.model}, {self.classes} classes, input {' x '.join(map(str, self.input))}"

    def shapes(self) -> nn.Module:
        """The network without memory for its weights, but one of the user's, which may look at values as it is made.

        Raises:
            UnknownName, SettingError: for a name that is none of `anymask.models`.
        """
        make = find(self.model)
        with torch.device("cpu" if is_own(self.model) else "meta"):
            return make(channels=self.input[0], classes=self.classes)

    def make(self, mask: Mask) -> nn.Module:
        """The network, its weights not set, once `mask` is known to fit: a name in a file costs no memory before that.

        Raises:
            MaskError: when the mask is of another network.
        """
        network = self.shapes()
        mask.check(network)
        return network if is_own(self.model) else network.to_empty(device="cpu")


def look_at(path: Path, *, name: str, model: str | None = None, shape: Sequence[int] | None = None) -> Seen:
    """What there is to see in the mask in a file; with `model`, of `anymask.models`, and its input's `shape` (C, H, W) in that network.

    The network has as many classes as the last linear layer in the mask has outputs, else 10.

    Raises:
        FileNotFoundError, FileFormatError: as `load_mask` does.
        UnknownName, SettingError, MaskError: for a model that is not there, or that the mask does not fit.
    """
    mask = load_mask(path)
    if model is None or shape is None:
        return look(mask, name=name)
    classes = next((kept.shape[0] for kept in reversed(list(mask.values())) if kept.ndim == 2), 10)
    network = Network(model, classes, (shape[0], shape[1], shape[2]))
    return look(load_mask(path, model=network.shapes()), name=name, network=network)


def recorded(mask: Mask) -> Network | None:
    """The network that `mask` says it was made on; None where it says none, or nothing that can be understood."""
    said = mask.info.get("network")
    if not isinstance(said, Mapping) or not isinstance(said.get("model"), str):
        return None
    shape: Any = said.get("input")
    numbers = [said.get("classes"), *(shape if isinstance(shape, list) else [])]
    if len(numbers) != 4 or not all(type(number) is int and number > 0 for number in numbers):
        return None
    return Network(said["model"], numbers[0], (numbers[1], numbers[2], numbers[3]))


def look(mask: Mask, *, name: str, network: Network | None = None, trusted: bool = False) -> Seen:
    """What there is to see in `mask`: in `network`, or else in the one that it was made on, or else in itself alone.

    A network of the user's that a mask names is code: it is run for a `trusted` mask only, not for a file from anywhere.

    Raises:
        AnymaskError: when `network` is not there or the mask does not fit it; what a file says of itself is only not used then.

    Example:
        >>> seen = look(Mask({"weight": torch.eye(2)}, info={"method": "mine"}), name="a")
        >>> seen.layers["weight"].outs_kept, seen.reachable, seen.made
        (2, None, 'method mine')
    """
    if network is not None:
        return _in_network(mask, name, network)
    why = HOW_TO_SAY
    try:
        said = recorded(mask)
        if said is not None and is_own(said.model) and not trusted:
            why = f"unreachable weights need the network, whose code runs when you name it: give --model {said.model} --input C H W"
        elif said is not None:
            return _in_network(mask, name, said)
    except AnymaskError as error:
        why = f"unreachable weights are not known, because the network that this file names cannot be used ({error.came})"
    return Seen(name, mask, structure(mask), why=why)


def _in_network(mask: Mask, name: str, network: Network) -> Seen:
    model = network.make(mask)
    found = reachable(mask, model, torch.empty(1, *network.input))
    return Seen(name, mask, structure(mask, model), reachable=found, network=str(network))
