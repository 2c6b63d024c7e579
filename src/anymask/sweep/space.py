"""What a study may choose among: a recipe's settings, and the learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anymask.errors import SettingError, naming
from anymask.sweep.plan import NUMBER
from anymask.sweep.variants import LR, variant, variant_name

_DIGITS = 3  # of a number from a range: finer differences are not seen, and short names are


@dataclass(frozen=True)
class Choice:
    """What one setting may be: one of `values`, or, where there are none, a number from `low` to `high`.

    Raises:
        SettingError: for neither, and for a range that is none.
    """

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def __post_init__(self) -> None:
        if not self.values and not (self.low < self.high and (self.low > 0 or not self.log)):
            raise SettingError(
                f"low came as {self.low}, high as {self.high}, log as {str(self.log).lower()}",
                allowed="low < high, and with log = true low > 0",
                fix="write { low = 0.01, high = 1.0, log = true }",
            )

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of these."""
        if self.values:  # in which True is not 1, as Python has it
            return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values)
        return NUMBER.fits(value) and self.low <= value <= self.high

    def samples(self) -> tuple[Any, ...]:
        """All of `values`, or two numbers right within the ends, which may be of an open range as that of label smoothing is."""
        inside = 1e-6 * (self.high - self.low)
        return self.values or (self.low + inside, self.high - inside)


def read_space(table: Mapping[str, Any], base: str, *, where: str) -> dict[str, Choice]:
    """The choices of a study's table `[space]`, in the order of their names.

    Args:
        table: `lr`, techniques (true and false) and settings (`technique.setting`), each with a list of choices; with two numbers, one
            of them with a point, for a range; or with `{low, high, log}` or `{choices}`.
        base: the recipe that is changed.

    Raises:
        AnymaskError: naming the entry, for what no recipe can have.

    Example:
        >>> found = read_space({"lr": [0.1, 0.2], "label_smoothing.eps": [0.0, 0.2]}, "tost", where="[space]")
        >>> found["label_smoothing.eps"].high, found["lr"].values
        (0.2, (0.1, 0.2))
    """
    rates = table.get(LR)
    if not isinstance(rates, list) or not rates:
        raise SettingError(
            f"{where}: lr came as {rates!r}",
            allowed="a list of learning rates, among which the baseline's is chosen as well as the recipe's",
            fix="write lr = [0.05, 0.1, 0.2]",
        )
    found = {}
    for name, entry in sorted(table.items()):
        with naming(f"{where}: {name}"):
            found[name] = _choice(entry, ranges=name != LR)
    switched = {name: True for name, choice in found.items() if choice.holds(True)}
    for name, choice in found.items():
        for value in choice.samples():
            with naming(f"{where}: {name}"):
                variant(variant_name(base, switched | {name: value}))
    return found


def _choice(entry: Any, *, ranges: bool) -> Choice:
    if isinstance(entry, Mapping) and set(entry) == {"choices"}:
        entry, ranges = entry["choices"], False
    if isinstance(entry, Mapping) and {"low", "high"} <= set(entry) <= {"low", "high", "log"}:
        low, high, log = entry["low"], entry["high"], entry.get("log", False)
        if NUMBER.fits(low) and NUMBER.fits(high) and isinstance(log, bool):
            return Choice(low=float(low), high=float(high), log=log)
    if isinstance(entry, list) and entry and all(isinstance(value, (bool, int, float, str)) for value in entry):
        if ranges and len(entry) == 2 and all(map(NUMBER.fits, entry)) and any(isinstance(value, float) for value in entry):
            return Choice(low=float(entry[0]), high=float(entry[1]))
        if len({repr(value) for value in entry}) == len(entry):
            return Choice(tuple(entry))
    raise SettingError(
        f"it came as {entry!r}",
        allowed="a list of different choices, two numbers with a point for a range, { low, high, log }, or { choices }",
        fix="write [0.0, 0.2] or [true, false]",
    )


def rounded(value: float) -> float:
    """A number from a range with as many digits as count.

    Example:
        >>> rounded(0.123456), rounded(1234.0)
        (0.123, 1230.0)
    """
    return float(f"{value:.{_DIGITS}g}")


def switched_off(name: str, changes: Mapping[str, Any]) -> bool:
    """Whether the setting `name` is of a technique that `changes` leaves out, so that it decides nothing."""
    return "." in name and changes.get(name.partition(".")[0]) is False


def base_changes(base: str, space: Mapping[str, Choice], *, lr: float) -> dict[str, Any] | None:
    """What `base` itself has for all of `space`, with `lr`; None where the space does not hold that."""
    tables = {settings["name"]: settings for settings in variant(base).recipe.settings()}
    found: dict[str, Any] = {}
    for name, choice in space.items():
        technique, *path = name.split(".")
        value: Any = tables.get(technique) if path else technique in tables
        for step in path:
            value = value.get(step) if isinstance(value, Mapping) else None
        value = lr if name == LR else value
        if switched_off(name, found):
            continue
        if not choice.holds(value):
            return None
        found[name] = value
    return found
