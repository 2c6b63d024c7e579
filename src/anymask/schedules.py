"""How strong a technique is at each step: 1 at first, 0 at the end."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from anymask.durations import Duration
from anymask.errors import SettingError
from anymask.registry import lookup

# Each maps the share of the fade that has passed, in (0, 1), to a strength in (0, 1).
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "step": lambda t: 1.0,
}


@dataclass(frozen=True)
class Schedule:
    """Strength 1 until `full`, then falling along `shape` to exactly 0 at `end`.

    Args:
        shape: "linear", "cosine", or "step" (1 until `end`, then 0).
        full: how long the strength stays at 1.
        end: when it is 0, and the technique gone. `end="100%"` with "step" is a constant that lasts the whole training.

    Example:
        >>> fade = Schedule("linear", full="20%", end="60%")
        >>> [fade.strength(step, total=100) for step in (0, 20, 40, 60, 99)]
        [1.0, 1.0, 0.5, 0.0, 0.0]
    """

    shape: str = "cosine"
    full: str = "0%"
    end: str = "60%"

    def __post_init__(self) -> None:
        lookup(SHAPES, self.shape, what="schedule shape")
        full, end = Duration.parse(self.full), Duration.parse(self.end)
        if full.unit == end.unit and full.amount > end.amount:
            raise SettingError(
                f"schedule stays full until {self.full} but ends at {self.end}",
                allowed="full <= end",
                fix="make `end` later or `full` earlier",
            )

    def span(self, *, total: int, per_epoch: int | None = None) -> tuple[int, int]:
        """The steps at which the fade begins and at which the strength is 0."""
        end = Duration.parse(self.end).steps(total=total, per_epoch=per_epoch)
        return min(end, Duration.parse(self.full).steps(total=total, per_epoch=per_epoch)), end

    def strength(self, step: int, *, total: int, per_epoch: int | None = None) -> float:
        """The strength, in [0, 1], during optimiser step number `step` (from 0)."""
        begin, end = self.span(total=total, per_epoch=per_epoch)
        if step >= end:
            return 0.0
        return 1.0 if step <= begin else SHAPES[self.shape]((step - begin) / (end - begin))
