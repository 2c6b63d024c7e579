"""What every kind of file is read as: named tensors, each read when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from anymask.formats.refusal import refusal

LONGEST_NAME = 1000  # characters; also keeps the time linear that names are looked at


@dataclass(frozen=True)
class Leaf:
    """One tensor of a file.

    Args:
        shape: of what `read` gives.
        floating: whether it holds floating-point numbers.
        read: reads the tensor; it is not kept.
    """

    shape: tuple[int, ...]
    floating: bool
    read: Callable[[], Tensor]

    def changed(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> "Leaf":
        """This tensor with `change` applied whenever it is read."""
        return replace(self, shape=shape, read=lambda: change(self.read()))


Leaves = dict[tuple[str, ...], Leaf]  # the keys that lead to a tensor, from the outermost; most files have one level


@dataclass(frozen=True)
class Contents:
    """The tensors of a file, and the kind of file it is."""

    kind: str  # "safetensors", "torch", "npz" or "msgpack"
    leaves: Leaves

    def checked(self, path: Path) -> "Contents":
        """These contents, when there are any and their names are names.

        Raises:
            FileFormatError: otherwise.
        """
        if not self.leaves:
            raise refusal(path, "it holds no tensor under a name", fix="save a dict of name -> tensor")
        longest = max(sum(map(len, keys)) + len(keys) for keys in self.leaves)
        if longest > LONGEST_NAME:
            raise refusal(path, f"a name of {longest} characters, of at most {LONGEST_NAME}")
        return self
