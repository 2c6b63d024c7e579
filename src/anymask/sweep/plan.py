"""Plan files: many trainings in their order of priority, checked as a whole before any of them runs."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anymask import models, toml
from anymask.config import Experiment
from anymask.data import DATASETS
from anymask.errors import SettingError, naming
from anymask.registry import imported, lookup, unknown
from anymask.sweep.compare import Grid
from anymask.train import Protocol
from anymask.train.presets import protocol_of


@dataclass(frozen=True)
class Part:
    """The trainings of one block on one data set with one network."""

    block: str  # what errors call it
    experiment: Experiment
    protocol: Protocol
    grid: Grid  # of one seed
    seeds: tuple[int, ...]

    def on(self, device: str) -> "Part":
        """The same trainings on another device; their ids do not depend on it."""
        return replace(self, experiment=replace(self.experiment, device=device))


@dataclass(frozen=True)
class Plan:
    """Blocks in their order of priority, each with a part for every data set and network; failed trainings are tried `retries` times more.

    Raises:
        SettingError: for `retries` below 0.
    """

    blocks: tuple[tuple[Part, ...], ...]
    retries: int = 1
    about: str = ""

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise SettingError(f"retries came as {self.retries}", allowed="a number >= 0", fix="1 tries a failed training once more")

    def on(self, device: str) -> "Plan":
        """The same trainings on another device."""
        return replace(self, blocks=tuple(tuple(part.on(device) for part in parts) for parts in self.blocks))


@dataclass(frozen=True)
class Kind:
    """What a setting of a plan may be: `words` and an `example` for people, whether a value `fits`, and what it is made."""

    words: str
    example: str
    fits: Callable[[Any], bool]
    make: Callable[[Any], Any] = lambda value: value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _differ(values: list[Any]) -> bool:
    return 0 < len(values) == len(set(values))


TEXT = Kind("a text in quotes", '"..."', lambda value: isinstance(value, str))
NUMBER = Kind("a number", "0.5", _is_number, float)  # as the command line has it: 1 and 1.0 are one training
WHOLE = Kind("a whole number", "3", lambda value: isinstance(value, int) and not isinstance(value, bool))
_SEEDS = Kind(
    "how many, or a list of different whole numbers >= 0",
    "3",
    lambda value: WHOLE.fits(value) or (isinstance(value, list) and all(WHOLE.fits(v) and v >= 0 for v in value) and _differ(value)),
    lambda value: tuple(value) if isinstance(value, list) else value,
)
_SWITCH = Kind("true or false", "true", lambda value: isinstance(value, bool))
TABLE = Kind("a table of settings", "{...}", lambda value: isinstance(value, dict))
_FOLDER = Kind("a path in quotes", '"..."', TEXT.fits, lambda value: Path(value).expanduser())
_BLOCKS = Kind(
    "[[block]] tables", "as [[block]]", lambda value: isinstance(value, list) and all(isinstance(block, dict) for block in value)
)

# Imported now: blocks may name what it adds.
PLUGIN = Kind("the name of a module in quotes", '"..."', TEXT.fits, lambda value: imported(value).__name__)

_TOP = {"plugins": PLUGIN, "about": TEXT, "retries": WHOLE, "protocol": TABLE, "block": _BLOCKS}
_LISTS = {"data": TEXT, "model": TEXT, "masks": TEXT, "sparsity": NUMBER, "recipes": TEXT}
_PLACE = {"data_dir": _FOLDER, "weights": _FOLDER, "validation": NUMBER}  # of an `Experiment`
_SINGLES = {"about": TEXT, "seeds": _SEEDS, "first_seed": WHOLE, "dense": _SWITCH, **_PLACE}
BLOCK = {**_LISTS, **_SINGLES, "protocol": TABLE}
_MANY = {*_LISTS, "plugins"}


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan: `about`, `retries` (1), `plugins` (modules to import), `[protocol]`, and `[[block]]` tables, the most urgent first.

    A block has data, model, masks, sparsity and recipes, each one value or a list; seeds (how many from first_seed on, or a list of
    them), dense, data_dir, weights, validation; and [block.protocol], whose settings go over those of [protocol], or instead of them
    where it names a preset. What is left out is as `anymask compare` has it.

    Raises:
        OSError: when the file cannot be read.
        FileFormatError: when it is not TOML.
        UnknownName, SettingError: naming the block, for what no training can have.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "plan.toml"
        >>> _ = file.write_text('[[block]]\\nmodel = ["resnet20", "vgg16"]\\nmasks = "snip"\\n[block.protocol]\\nepochs = 3')
        >>> [(part.experiment.model, part.grid.masks, part.protocol.epochs) for part in read_plan(file).blocks[0]]
        [('resnet20', ('snip',), 3), ('vgg16', ('snip',), 3)]
    """
    path = Path(path)
    top = checked(toml.read(path), _TOP, where=str(path))
    if not top.get("block"):
        raise SettingError(f"{path} has no block", allowed="at least one [[block]]", fix='write [[block]] and, under it, masks = ["snip"]')
    shared, plugins = top.get("protocol", {}), top.get("plugins", ())
    blocks = [parts_of(block, shared, plugins=plugins, where=f"block {number} of {path}") for number, block in enumerate(top["block"], 1)]
    with naming(str(path)):
        return Plan(tuple(blocks), retries=top.get("retries", 1), about=top.get("about", ""))


def parts_of(table: Mapping[str, Any], shared: Mapping[str, Any], *, plugins: tuple[str, ...], where: str) -> tuple[Part, ...]:
    block = checked(table, BLOCK, where=where)
    with naming(where):
        own = block.get("protocol", {})
        protocol = protocol_of(own if "preset" in own else {**shared, **own})
        grid, seeds = _grid(block), _seeds(block)
        place: dict[str, Any] = {name: block[name] for name in _PLACE if name in block}
        sets, networks = block.get("data", (Experiment.data,)), block.get("model", (Experiment.model,))
        for name in sets:
            lookup(DATASETS, name, what="data set")
        for name in networks:
            models.find(name)
        experiments = [Experiment(data=data, model=model, plugins=plugins, **place) for data in sets for model in networks]
        return tuple(Part(where, experiment, protocol, grid, seeds) for experiment in experiments)


def _seeds(block: Mapping[str, Any]) -> tuple[int, ...]:
    seeds, first = block.get("seeds", Grid.seeds), block.get("first_seed")
    if isinstance(seeds, int):
        Grid(seeds=seeds, first_seed=first or 0)  # checks them
        return tuple(range(first or 0, (first or 0) + seeds))
    if first is not None:
        raise SettingError(f"first_seed came as {first} with a list of seeds", allowed="one of the two", fix="leave first_seed out")
    return seeds


def _grid(block: Mapping[str, Any]) -> Grid:
    grid = Grid(**{name: block[name] for name in ("masks", "sparsity", "recipes", "dense") if name in block}, seeds=1)
    if not grid.masks and not grid.dense:
        raise SettingError("masks came empty, and dense is false", allowed="something to train", fix='write masks = ["snip"]')
    return grid


def checked(table: Mapping[str, Any], kinds: Mapping[str, Kind], *, where: str) -> dict[str, Any]:
    """`table` with every value as its kind has it, and one value of a list as a list of one."""
    made = {}
    for name, value in table.items():
        if name not in kinds:
            raise unknown(name, kinds, what=f"setting in {where}:")
        kind, many = kinds[name], name in _MANY
        values = value if many and isinstance(value, list) else [value]
        if not all(map(kind.fits, values)) or (not values and name != "masks"):
            allowed = kind.words + (", or a list of at least one of these" if many else "")
            raise SettingError(f"{where}: {name} came as {value!r}", allowed=allowed, fix=f"write {name} = {kind.example}")
        made[name] = tuple(map(kind.make, values)) if many else kind.make(value)
    return made
