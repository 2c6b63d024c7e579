"""Ledger rows sorted into cells: runs that share every setting but the recipe and the seed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from anymask.errors import FileFormatError
from anymask.report.contents import told_apart
from anymask.runlog import settings_id

Row = Mapping[str, Any]
TABLES = ("settings", "accuracy", "versions", "machine", "density", "curves", "time")  # of a row, where they are there
NEEDED = ("data", "model", "mask", "sparsity", "recipe", "seed")


@dataclass(frozen=True)
class Cell:
    """Runs with equal settings except recipe and seed.

    Args:
        settings: what the runs share.
        runs: the row of each (recipe, seed).
    """

    settings: Mapping[str, Any]
    runs: Mapping[tuple[str, Any], Row]

    @property
    def recipes(self) -> list[str]:
        """The recipes that were run here, by name."""
        return sorted({recipe for recipe, _ in self.runs})

    def accuracies(self, recipe: str) -> dict[Any, float]:
        """Test accuracy in % of each seed of `recipe`, in the order of the seeds."""
        found = {seed: 100.0 * row["accuracy"]["test"] for (name, seed), row in self.runs.items() if name == recipe}
        return dict(sorted(found.items()))

    def rows(self, recipe: str) -> list[Row]:
        """The rows of `recipe`, in the order of the seeds."""
        return [self.runs[recipe, seed] for seed in self.accuracies(recipe)]


@dataclass(frozen=True)
class Group:
    """The cells of one table: the same data, model and number of epochs."""

    settings: Mapping[str, Any]
    cells: Sequence[Cell]

    @property
    def recipes(self) -> list[str]:
        """The recipes of all cells, by name."""
        return sorted({recipe for cell in self.cells for recipe in cell.recipes})

    def at(self, sparsity: float) -> list[Cell]:
        """The cells of one sparsity."""
        return [cell for cell in self.cells if cell.settings["sparsity"] == sparsity]

    @property
    def title(self) -> str:
        """What the cells share, in words."""
        seeds = count(len({seed for cell in self.cells for _, seed in cell.runs}), "seed")
        epochs = self.settings["epochs"]
        begun = " from given weights" * all(cell.settings.get("weights") for cell in self.cells)
        words = [self.settings["data"], self.settings["model"], *([] if epochs is None else [count(epochs, "epoch") + begun])]
        return ", ".join([*map(str, words), seeds])


def cells(rows: Iterable[Row]) -> list[Cell]:
    """The cells of `rows`, by data, model, epochs, sparsity and mask; dense references after the masks.

    Of two rows with the same id, or with the same settings, the later one counts.

    Raises:
        FileFormatError: naming what a row lacks.
    """
    shared: dict[str, dict[str, Any]] = {}
    runs: dict[str, dict[tuple[str, Any], Row]] = {}
    for row in latest(rows):
        settings = {key: value for key, value in row["settings"].items() if key not in of_a_run(row["settings"])}
        key = settings_id(settings)
        shared[key] = settings
        runs.setdefault(key, {})[row["settings"]["recipe"], row["settings"]["seed"]] = row
    return [Cell(shared[key], runs[key]) for key in sorted(shared, key=lambda key: (*_place(shared[key]), key))]


def of_a_run(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What runs of one cell may differ in: their seeds may have checkpoints of their own to begin with."""
    return ("recipe", "seed", "weights_hash") if "{seed}" in str(settings.get("weights")) else ("recipe", "seed")


def groups(rows: Iterable[Row]) -> list[Group]:
    """The cells of `rows`, one group for each data, model and number of epochs."""
    shared: dict[str, dict[str, Any]] = {}
    members: dict[str, list[Cell]] = {}
    for cell in cells(rows):
        settings = {name: cell.settings.get(name) for name in ("data", "model", "epochs")}
        key = settings_id(settings)
        shared[key] = settings
        members.setdefault(key, []).append(cell)
    return [Group(shared[key], members[key]) for key in shared]


def latest(rows: Iterable[Row]) -> list[Row]:
    """`rows` without those that a later row of the same id replaces; recipes of one name and several contents told apart.

    Raises:
        FileFormatError: naming what a row lacks.
    """
    kept: dict[Any, Row] = {}
    for number, row in enumerate(rows, 1):
        _check(number, row)
        kept.pop(row["id"], None)
        kept[row["id"]] = row
    return told_apart(list(kept.values()))


def newest(rows: Sequence[Row], recipe: str) -> str:
    """What `latest` calls the last of these recipes that has this name, the one that is being run.

    Raises:
        FileFormatError: naming what a row lacks.
    """
    latest(rows)  # checks them
    named = zip(rows, told_apart(rows), strict=True)
    return next((told["settings"]["recipe"] for row, told in reversed([*named]) if row["settings"]["recipe"] == recipe), recipe)


def percent(share: float) -> str:
    """A share as a percentage with no trailing zeros: 0.98 -> "98%".

    Example:
        >>> percent(0.98), percent(0.995)
        ('98%', '99.5%')
    """
    return f"{100 * share:.6g}%"


def count(number: Any, thing: str) -> str:
    """A number of things.

    Example:
        >>> count(1, "seed"), count(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


def names(members: Sequence[Cell]) -> list[str]:
    """The mask of each cell; cells of one mask and sparsity also say in which settings they differ.

    Example:
        >>> names([Cell({"mask": "snip", "sparsity": 0.9, "lr": 0.1}, {}), Cell({"mask": "snip", "sparsity": 0.9, "lr": 0.2}, {})])
        ['snip (lr=0.1)', 'snip (lr=0.2)']
    """
    every = [cell.settings for cell in members]
    return [f"{one['mask']}{differing(one, every, alike=('mask', 'sparsity'))}" for one in every]


def all_masks(members: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Of cells of one sparsity those together that differ in the mask alone, where they are several; with the name of their line."""
    found: dict[str, list[Cell]] = {}
    for cell in members:
        found.setdefault(settings_id(but_the_mask(cell.settings)), []).append(cell)
    every = [but_the_mask(cells[0].settings) for cells in found.values()]
    lines = [(f"all masks{differing(one, every)}", cells) for one, cells in zip(every, found.values(), strict=True) if len(cells) > 1]
    return sorted(lines, key=lambda line: line[0])


def but_the_mask(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is equal in cells that differ in the mask alone."""
    return {name: value for name, value in settings.items() if name not in ("mask", "mask_hash")}


def differing(one: Mapping[str, Any], several: Sequence[Mapping[str, Any]], *, alike: Sequence[str] = ()) -> str:
    """The settings of `one` that are not the same in all of `several` that have equal settings `alike`, to stand behind a name.

    Example:
        >>> differing({"lr": 0.1}, [{"lr": 0.1}, {"lr": 0.2}]), differing({"lr": 0.1}, [{"lr": 0.1}])
        (' (lr=0.1)', '')
    """
    twins = [other for other in several if all(other.get(name) == one.get(name) for name in alike)]
    keys = sorted({key for twin in twins for key in twin})
    words = [f"{key}={one.get(key)}" for key in keys if len({repr(twin.get(key)) for twin in twins}) > 1]
    return f" ({', '.join(words)})" if words else ""


def _place(settings: Mapping[str, Any]) -> tuple[tuple[int, float, str], ...]:
    """Dense references come last in their group."""
    first, then = ("data", "model", "epochs"), ("sparsity", "mask")
    dense = (int(settings["mask"] == "dense"), 0.0, "")
    return (*(_order(settings.get(name)) for name in first), dense, *(_order(settings[name]) for name in then))


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then the rest by their text."""
    return (0, float(value), "") if isinstance(value, Real) else (1, 0.0, str(value))


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "id": lambda value: isinstance(value, (str, int)),
    "settings.recipe": lambda value: isinstance(value, str),
    "settings.sparsity": lambda value: isinstance(value, Real) and 0 <= float(value) <= 1,
    "settings.seed": lambda value: isinstance(value, Integral),
    "techniques": lambda value: isinstance(value, Sequence) and all(isinstance(each, Mapping) and "name" in each for each in value),
}


def _check(number: int, row: Row) -> None:
    """Refuse a row that this package did not write, as ledgers have that were made or merged by hand."""
    _refuse(number, {name: row.get(name) for name in TABLES if not isinstance(row.get(name) or {}, Mapping)})
    settings: Mapping[str, Any] = row.get("settings") or {}
    test: Any = (row.get("accuracy") or {}).get("test")
    lacks = [f"settings.{name}" for name in NEEDED if name not in settings]
    lacks += [] if "id" in row else ["id"]
    lacks += [] if isinstance(test, Real) else ["accuracy.test"]
    if lacks:
        raise FileFormatError(
            f"row {number} lacks {', '.join(lacks)}",
            allowed="rows that the trainer of anymask wrote",
            fix="remove that row, or give another ledger: of a study the confirmation's, since its tuning has no test accuracies",
        )
    values = {**row, **{f"settings.{name}": value for name, value in settings.items()}, "techniques": row.get("techniques") or []}
    _refuse(number, {name: values[name] for name, fits in _FITS.items() if not fits(values[name])})
    if not 0 <= test <= 1:  # NaN is not, either
        raise FileFormatError(
            f"row {number} has accuracy.test {test}", allowed="a share in [0, 1]", fix="remove that row; the same sweep trains it again"
        )


def _refuse(number: int, odd: Mapping[str, Any]) -> None:
    if odd:
        allowed = "tables, a text for a recipe, a share of zeros, and a whole number for a seed, as the trainer of anymask writes them"
        came = ", ".join(f"{name} {value!r:.60}" for name, value in odd.items())
        raise FileFormatError(f"row {number} has {came}", allowed=allowed, fix="mend that row")
