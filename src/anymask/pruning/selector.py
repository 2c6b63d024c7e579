"""Where criterion, scope and pattern meet: scores in, kept weights out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from anymask.errors import MaskError
from anymask.prunables import rows_of, transposed_groups
from anymask.pruning.distribution import DISTRIBUTIONS, densities, in_steps
from anymask.pruning.patterns import Pattern, check_fits
from anymask.pruning.select import keep_best, keep_in_windows, keep_units, wide
from anymask.registry import unknown

SCOPES = ("global", *DISTRIBUTIONS)


@dataclass(frozen=True)
class Selector:
    """Chooses which weights of a model's layers are kept.

    Args:
        shapes: of each layer's weight.
        rows: of each layer, as `rows_of` gives them; empty for the unstructured pattern, which needs none.
        scope: "global", or a distribution of the budget over layers.
        pattern: how kept weights may lie.
        floor: the least number of weights a layer keeps (in whole steps of the pattern).
        generator: of the CPU; decides between equal scores.

    Raises:
        MaskError: for layers that the pattern does not fit.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rows: Mapping[str, Tensor]
    scope: str
    pattern: Pattern
    floor: int
    generator: torch.Generator
    step: Mapping[str, int] = field(init=False)
    size: Mapping[str, int] = field(init=False)
    least: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise unknown(self.scope, SCOPES, what="scope")
        check_fits(self.pattern, self.rows)
        size = {name: math.prod(shape) for name, shape in self.shapes.items()}
        step = {name: self.pattern.step(self.rows[name]) if self.rows else 1 for name in size}
        whole = {name: -(-min(self.floor, n) // step[name]) * step[name] for name, n in size.items()}
        for name, value in {"size": size, "step": step, "least": {n: min(whole[n], size[n]) for n in size}}.items():
            object.__setattr__(self, name, value)

    @property
    def total(self) -> int:
        """Number of weights of all layers."""
        return sum(self.size.values())

    def check(self, count: int) -> None:
        """Refuse a `count` that cannot give every layer its floor.

        Raises:
            MaskError: with what is needed.
        """
        need = sum(self.least.values())
        if count < need:
            raise MaskError(
                f"a budget of {count} weights came for {len(self.shapes)} layers",
                allowed=f"{need} or more: at least {self.floor} in each layer"
                + ("" if self.pattern.unstructured else f", in whole steps of pattern {self.pattern.name}"),
                fix="lower the sparsity or the floor, or exclude layers",
            )

    def keep(self, scores: Mapping[str, Tensor], count: int, *, alive: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Bool tensors in the shapes of `scores`: True for what is kept.

        Unstructured: exactly `count`. Units and windows: never more than that, and less by less than one more step would
        take. N:M: N of every M, whatever `count` is in the end.

        Args:
            scores: for each layer, in its weight's shape; higher = keep. Finite.
            count: weights to keep in all.
            alive: only these may be kept; None for all.
        """
        alive = alive or {name: torch.ones(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        scores = {name: wide(score).masked_fill(~alive[name], -torch.inf) for name, score in scores.items()}
        if self.pattern.windows is not None:
            kept = self._in_windows(scores, self._counts(scores, count, alive))
        elif self.scope == "global":
            kept = self._best(scores, count)
        else:
            kept, left = {}, 0
            for name, most in self._counts(scores, count, alive).items():
                kept |= self._best({name: scores[name]}, most + left)
                left += most - int(kept[name].sum())  # what a layer's units cannot use goes to the next layer
        return {name: keep & alive[name] for name, keep in kept.items()}

    def _counts(self, scores: Mapping[str, Tensor], count: int, alive: Mapping[str, Tensor]) -> dict[str, int]:
        """How many weights each layer may keep; for windows in whole steps."""
        if self.pattern.each is not None:
            kept, of = self.pattern.each
            part = max(kept, round(of * count / self.total))  # on the way there in rounds: more of each window
            return {name: n // of * part for name, n in self.size.items()}
        if self.scope == "global":
            won = keep_best(scores, count, generator=self.generator, floor=self.floor)
            wanted = {name: float(keep.sum()) for name, keep in won.items()}
        else:
            wanted = {name: d * self.size[name] for name, d in densities(self.shapes, count, distribution=self.scope).items()}
        step = self.step if self.pattern.windows is not None else dict.fromkeys(self.size, 1)
        most = {name: int(keep.sum()) // step[name] * step[name] for name, keep in alive.items()}
        return in_steps(wanted, count, step=step, most=most, least=self.least)

    def _best(self, scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """The best `count` of `scores` together, weights or units."""
        if self.pattern.units is None:
            return keep_best(scores, count, generator=self.generator, floor=self.floor)
        units = {name: self._unit_of(name) for name in scores}
        sizes = {name: torch.bincount(unit) for name, unit in units.items()}
        means = {name: torch.bincount(units[name], score.reshape(-1)) / sizes[name] for name, score in scores.items()}
        if self.floor:
            means = {name: self._first(mean, sizes[name], self.least[name]) for name, mean in means.items()}
        kept = keep_units(torch.cat([*means.values()]), torch.cat([*sizes.values()]), count, generator=self.generator)
        parts = kept.split([len(mean) for mean in means.values()])
        return {name: part[units[name]].reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}

    def _first(self, mean: Tensor, sizes: Tensor, least: int) -> Tensor:
        return mean.masked_fill(keep_units(mean, sizes, least, generator=self.generator), torch.inf)

    def _unit_of(self, name: str) -> Tensor:
        """The number of the unit of each weight, `(weights,)`."""
        assert self.pattern.units is not None
        rows = self.rows[name]
        unit = torch.empty(rows.numel(), dtype=torch.int64)
        unit[rows.reshape(-1)] = self.pattern.units(rows).reshape(-1)
        return unit

    def _in_windows(self, scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
        assert self.pattern.windows is not None
        kept = {}
        for name, score in scores.items():
            windows = self.pattern.windows(self.rows[name])
            best = keep_in_windows(score.reshape(-1)[windows], counts[name] // len(windows), generator=self.generator)
            kept[name] = (
                torch.zeros(score.numel(), dtype=torch.bool).scatter_(0, windows.reshape(-1), best.reshape(-1)).reshape(score.shape)
            )
        return kept


def selector(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, scope: str, pattern: Pattern, floor: int, generator: torch.Generator
) -> Selector:
    """The Selector for these layers of `model`."""
    groups = {} if pattern.unstructured else transposed_groups(model)
    rows = {} if pattern.unstructured else {name: rows_of(shape, transposed=groups.get(name, 0)) for name, shape in shapes.items()}
    return Selector(shapes, rows, scope=scope, pattern=pattern, floor=floor, generator=generator)
