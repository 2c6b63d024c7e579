"""Patterns: which weights can only be kept or pruned together, and which sets of them keep equally many."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anymask.errors import MaskError, SettingError
from anymask.registry import unknown

PATTERNS = ("unstructured", "N:M", "RxC", "channel", "fan-in")
_N_OF_M, _BLOCK = re.compile(r"(\d+):(\d+)"), re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Pattern:
    """How the kept weights of a layer may lie.

    A layer is seen as `rows`: `(outputs, places, inputs)`, the flat index of each weight, where places are the positions of the
    kernel (1 for a linear layer) and inputs are those of one group.

    Args:
        name: as `prune` takes it.
        units: for patterns of units, the number (from 0) of the unit of each entry of `rows`; a unit is kept or pruned whole.
        windows: for patterns of windows, `rows` as `(windows, width)`; each window of a layer keeps equally many.
        each: (N, M) where N of the M of each window are kept, whatever the sparsity asked for.
    """

    name: str
    units: Callable[[Tensor], Tensor] | None = None
    windows: Callable[[Tensor], Tensor] | None = None
    each: tuple[int, int] | None = None

    @property
    def density(self) -> float | None:
        """The share kept, in (0, 1], where the pattern decides it."""
        return None if self.each is None else self.each[0] / self.each[1]

    @property
    def unstructured(self) -> bool:
        """Whether every weight stands for itself."""
        return self.units is None and self.windows is None

    def step(self, rows: Tensor) -> int:
        """By how many weights a layer's count can change: 1, the size of its largest unit, or its number of windows."""
        if self.units is not None:
            return int(torch.bincount(self.units(rows).reshape(-1)).max())
        return len(self.windows(rows)) if self.windows is not None else 1


def pattern(name: str) -> Pattern:
    """The pattern called `name`.

    Args:
        name: "unstructured"; "2:4" and the like, N kept of every M consecutive inputs at the same place of the kernel; "4x1" and the
            like, blocks of outputs x inputs at the same place, smaller at the edges; "channel", all weights of an output;
            "fan-in", equally many weights for each output of a layer.

    Raises:
        UnknownName: for a name of none of these forms.
        SettingError: for N:M without 1 <= N <= M, or a block without an extent.

    Example:
        >>> pattern("2:4").density, pattern("channel").density
        (0.5, None)
    """
    if found := _N_OF_M.fullmatch(name):
        return _n_of_m(int(found[1]), int(found[2]))
    if found := _BLOCK.fullmatch(name):
        return _blocks(int(found[1]), int(found[2]))
    if name not in _NAMED:
        raise unknown(name, PATTERNS, what="pattern")
    return _NAMED[name]


def check_fits(pattern: Pattern, rows: Mapping[str, Tensor]) -> None:
    """Refuse layers whose inputs N:M cannot divide.

    Raises:
        MaskError: naming them.
    """
    if pattern.each is None:
        return
    width = pattern.each[1]
    odd = {name: index.shape[2] for name, index in rows.items() if index.shape[2] % width}
    if odd:
        raise MaskError(
            f"pattern {pattern.name} does not fit {', '.join(f'{name} ({inputs} inputs)' for name, inputs in odd.items())}",
            allowed=f"layers whose number of inputs (of one group) is a multiple of {width}",
            fix=f"leave these dense: exclude={list(odd)}",
        )


def _n_of_m(kept: int, of: int) -> Pattern:
    if not 1 <= kept <= of:
        raise SettingError(f"pattern came as {kept}:{of}", allowed="N:M with 1 <= N <= M", fix="2:4 keeps two of every four")
    return Pattern(f"{kept}:{of}", windows=lambda rows: rows.reshape(-1, of), each=(kept, of))


def _blocks(outputs: int, inputs: int) -> Pattern:
    if not outputs * inputs:
        raise SettingError(f"pattern came as {outputs}x{inputs}", allowed="RxC with R and C from 1", fix="4x1 is four outputs of one input")

    def units(rows: Tensor) -> Tensor:
        out, places, ins = rows.shape
        across, along = -(-ins // inputs), torch.arange(places)[None, :, None]
        row, column = torch.arange(out)[:, None, None] // outputs, torch.arange(ins)[None, None, :] // inputs
        return (row * places + along) * across + column

    return Pattern(f"{outputs}x{inputs}", units=units)


_NAMED = {
    "unstructured": Pattern("unstructured"),
    "channel": Pattern("channel", units=lambda rows: torch.arange(len(rows))[:, None, None].expand(rows.shape)),
    "fan-in": Pattern("fan-in", windows=lambda rows: rows.reshape(len(rows), -1)),
}
