"""The table of masks that move while a network trains: what is dropped, what grows, when, and how much."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anymask.durations import Duration
from anymask.errors import SettingError
from anymask.mask import Mask
from anymask.prunables import prunable
from anymask.pruning.distribution import DISTRIBUTIONS
from anymask.pruning.select import keep_best
from anymask.registry import lookup, unknown

# (weight, dense gradient or None, generator of the CPU) -> scores of the weight's shape
Scores = Callable[[Tensor, Tensor | None, torch.Generator], Tensor]

GROW: dict[str, Scores] = {  # the highest of what is not kept come, in place of the smallest weights
    "random": lambda weight, _, generator: torch.rand(weight.shape, generator=generator, dtype=torch.float64),
    "gradient": lambda _, gradient, __: _magnitude(gradient),
}
SHRINKING = ("global", *DISTRIBUTIONS)  # scopes of what only drops


@dataclass(frozen=True)
class Dynamic:
    """One way to move a mask during training.

    Args:
        name: what `anymask.rewire` takes.
        about: one line for `anymask list`.
        paper: arXiv id.
        start: the static method whose mask it begins with, or "dense".
        grow: by what others come in place of the smallest weights: "random", "gradient" (its magnitude, at all weights), or None: the
            mask only shrinks.
        scope: "layer" (each layer keeps as many as it has); where it only shrinks, what the final budget is spread over: "global",
            or layers with densities "uniform", "er", "erk" or "balanced".
        fraction: share of each layer's kept weights that go at the first update, in (0, 1), falling along a cosine to 0 at `end`.
        every: how long from one update to the next.
        begin: when that starts; the first update comes `every` later.
        end: where it ends. A mask that shrinks is at its final sparsity there.

    Example:
        >>> from dataclasses import replace
        >>> replace(DYNAMIC["rigl"], every="1ep").grow
        'gradient'
    """

    name: str
    about: str
    paper: str
    start: str = "random-erk"
    grow: str | None = None
    scope: str = "layer"
    fraction: float = 0.3
    every: str = "100it"
    begin: str = "0%"
    end: str = "75%"

    def __post_init__(self) -> None:
        if self.grow is not None:
            lookup(GROW, self.grow, what="grow criterion")
        scopes = SHRINKING if self.shrinks else ("layer",)
        if self.scope not in scopes:
            raise unknown(self.scope, scopes, what=f"scope of {self.name}")
        if not 0 < self.fraction < 1:
            raise SettingError(f"fraction came as {self.fraction}", allowed="a number in (0, 1)", fix="0.3 is the papers' value")
        for length in (self.every, self.begin, self.end):
            Duration.parse(length)
        if not Duration.parse(self.every).amount:
            raise SettingError(f"every came as {self.every!r}", allowed="more than nothing, such as '100it'", fix="'100it' is the default")

    @property
    def shrinks(self) -> bool:
        """Whether the mask only drops weights, on its way to a sparsity."""
        return self.grow is None


DYNAMIC: dict[str, Dynamic] = {
    row.name: row
    for row in (
        Dynamic("set", "drop the smallest weights, grow random ones", "1707.04780", grow="random"),
        Dynamic("rigl", "drop the smallest weights, grow where the gradient is largest", "1911.11134", grow="gradient"),
        Dynamic("gmp", "begin dense, drop the smallest weights bit by bit", "1710.01878", start="dense", scope="uniform"),
    )
}


def dynamic_of(method: str | Dynamic, settings: Mapping[str, Any]) -> Dynamic:
    """The row of that name (or the one given), with `settings` instead of its own.

    Raises:
        UnknownName: for a method or setting that is not there.
        SettingError: for a setting out of range.

    Example:
        >>> dynamic_of("set", {"fraction": 0.5}).fraction
        0.5
    """
    row = method if isinstance(method, Dynamic) else lookup(DYNAMIC, method, what="dynamic method")
    known = [f.name for f in fields(Dynamic)]
    for key in settings:
        if key not in known:
            raise unknown(key, known, what=f"setting of {row.name}")
    return replace(row, **settings)


@dataclass(frozen=True)
class Times:
    """The optimiser steps, counted from 1, after which a mask moves."""

    every: int
    begin: int
    end: int
    closing: bool  # whether one update comes at `end` itself; the others come before

    @classmethod
    def of(cls, row: Dynamic, *, total: int, per_epoch: int | None = None, start: int = 0) -> "Times":
        """Those of `row` in a training of `total` optimiser steps that is at step `start`.

        Raises:
            SettingError: where `every` is not even a step, or no update is to come.

        Example:
            >>> times = Times.of(DYNAMIC["rigl"], total=1000)
            >>> [step for step in range(1001) if times.due(step)]
            [100, 200, 300, 400, 500, 600, 700]
        """
        every, begin, end = (Duration.parse(d).steps(total=total, per_epoch=per_epoch) for d in (row.every, row.begin, row.end))
        times = cls(every, begin, end, closing=row.shrinks)
        if every < 1 or begin >= end or not any(times.due(step) for step in range(start + 1, end + 1)):
            raise SettingError(
                f"{row.name} with every={row.every!r}, begin={row.begin!r}, end={row.end!r} makes no update in steps {start} to {total}",
                allowed="at least one update between begin and end",
                fix="give a shorter `every`, such as '2%'",
            )
        return times

    def due(self, step: int) -> bool:
        """Whether the mask moves after optimiser step `step`."""
        since = step - self.begin
        return (self.closing and step == self.end) or (since > 0 and step < self.end and since % self.every == 0)

    def passed(self, step: int) -> float:
        """The share of the way from `begin` to `end`, in [0, 1]."""
        return min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))


def cosine(fraction: float, passed: float) -> float:
    """fraction / 2 * (1 + cos(pi * passed)): all of it at first, 0 at the end.

    Example:
        >>> cosine(0.3, 0.0), cosine(0.3, 1.0)
        (0.3, 0.0)
    """
    return fraction / 2 * (1 + math.cos(math.pi * passed))


def cubic(first: int, last: int, passed: float) -> int:
    """How many weights are left: s = s_f + (s_i - s_f) (1 - passed)^3, in weights, rounded; `first` at first, `last` at the end.

    Example:
        >>> [cubic(1000, 100, passed) for passed in (0.0, 0.5, 1.0)]
        [1000, 212, 100]
    """
    return round(last + (first - last) * (1 - passed) ** 3)


def lots(seed: int, step: int) -> torch.Generator:
    """What decides between equal scores at optimiser step `step`: of the CPU, equal on all devices, with no state to be saved."""
    # torch's CPU generator keeps 32 bits of a seed: both numbers are mixed into those
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


def exchange(row: Dynamic, weight: Tensor, kept: Tensor, *, count: int, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
    """`kept` with `count` weights dropped and as many grown, a new bool tensor.

    The smallest weights go; then the highest by the grow criterion come, among all that are not kept then, those that
    just went included.

    Args:
        weight: of any shape and device; `kept`: bool, of its shape, on the CPU; `gradient`: of its shape, all places.
        count: at most the number kept.

    Example:
        >>> weight, gradient = torch.tensor([5.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 9.0, 2.0])
        >>> kept = weight != 0
        >>> exchange(DYNAMIC["rigl"], weight, kept, count=1, gradient=gradient, generator=lots(0, 1)).tolist()
        [True, False, True, False]
    """
    assert row.grow is not None
    survivors = _best(weight.abs(), int(kept.sum()) - count, among=kept, generator=generator)
    grow = GROW[row.grow](weight, gradient, generator)
    return survivors | _best(grow, count, among=~survivors, generator=generator)


def thin(weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], *, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`kept` without all but the `count` largest weights of it, in all layers together, one of each in any case.

    Args:
        weights: on any device; `kept`: bool, of their shapes, on the CPU, True at least once in each.

    Example:
        >>> weights = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([1.0, 2.0])}
        >>> thin(weights, {n: w != 0 for n, w in weights.items()}, count=2, generator=lots(0, 1))["b"].tolist()
        [False, True]
    """
    scores = {name: weight.abs().cpu()[kept[name]] for name, weight in weights.items()}
    chosen = keep_best(scores, count, generator=generator, floor=1)
    return {name: torch.zeros_like(kept[name]).masked_scatter_(kept[name], chosen[name]) for name in weights}


def _best(scores: Tensor, count: int, *, among: Tensor, generator: torch.Generator) -> Tensor:
    """True at the `count` highest of `scores` where `among` is True, equal ones by lot; bool, on the CPU, as `among` is."""
    chosen = torch.zeros_like(among)
    if count == 0:
        return chosen
    values = scores[among.to(scores.device)] if scores.is_cuda else scores.cpu()[among]
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    near = values >= values.kthvalue(len(values) - count + 1).values  # found where they are: these alone go to the CPU
    best = keep_best({"near": values[near]}, count, generator=generator)["near"]
    places = among.reshape(-1).nonzero().reshape(-1)[near.cpu()]
    chosen.view(-1)[places[best]] = True
    return chosen


def dense_mask(model: nn.Module) -> Mask:
    """The mask that keeps every prunable weight of `model`: what gradual pruning begins with.

    Example:
        >>> dense_mask(nn.Linear(2, 3)).density
        1.0
    """
    kept = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in prunable(model).items()}
    return Mask(kept, info={"method": "dense", "sparsity": 0.0})


def _magnitude(gradient: Tensor | None) -> Tensor:
    assert gradient is not None  # the caller leaves layers without one alone
    return gradient.abs()
