"""Recipes with settings of their own, as one name: `tost@label_smoothing.eps=0.1,lr=0.05`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anymask import toml
from anymask.errors import SettingError
from anymask.recipe import Recipe
from anymask.registry import lookup
from anymask.techniques import TECHNIQUES

LR = "lr"


@dataclass(frozen=True)
class Variant:
    """A recipe, and the learning rate that it wants in place of the protocol's; None for the protocol's."""

    recipe: Recipe
    lr: float | None = None


def variant(name: str) -> Variant:
    """What `name` stands for: a recipe as `Recipe.preset` has it and, after an @, changes of it between commas.

    A change is `lr=0.05`, for the trainings of this recipe alone; `technique.setting=value`; or `technique=true`, which adds it as it
    is by default, and `technique=false`, which leaves it out. Texts need no quotes.

    Raises:
        UnknownName: for recipes, techniques and settings that there are not.
        SettingError: for values that they cannot have, and settings of a technique that is not in the recipe.

    Example:
        >>> found = variant("tost:ghost_skip,label_smoothing@lr=0.05,label_smoothing.eps=0.1,ghost_skip=false")
        >>> found.lr, [(t.name, t.eps) for t in found.recipe.techniques]
        (0.05, [('label_smoothing', 0.1)])
    """
    base, changes = _split(name)
    if not changes:
        return Variant(Recipe.preset(base))
    lr = changes.pop(LR, None)
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf):
        raise SettingError(f"lr came as {lr!r} in {name}", allowed="a number > 0", fix=f"write {base}@lr=0.1")
    return Variant(_changed(Recipe.preset(base), changes, name=name), None if lr is None else float(lr))


def variant_name(base: str, changes: Mapping[str, Any]) -> str:
    """The name of `base` with `changes` over those that it has, in the order of their names: equal changes give equal names.

    Example:
        >>> variant_name("tost", {"lr": 0.05, "ghost_skip": False})
        'tost@ghost_skip=false,lr=0.05'
    """
    base, before = _split(base)
    changes = before | dict(changes)
    parts = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in sorted(changes.items())]
    return f"{base}@{','.join(parts)}" if parts else base


def _split(name: str) -> tuple[str, dict[str, Any]]:
    base, at, text = name.rpartition("@")
    if not at or "=" not in text:  # a path may hold an @
        return name, {}
    parts = [_change(part, name) for part in text.split(",")]
    changes = dict(parts)
    if len(changes) < len(parts):
        raise SettingError(f"{name} changes a setting twice", allowed="each change once", fix="leave one of the two out")
    return base, changes


def _change(part: str, name: str) -> tuple[str, Any]:
    key, equals, text = part.partition("=")
    if not key or not equals:
        raise SettingError(f"{part!r} came as a change in {name}", allowed="technique.setting=value", fix="write label_smoothing.eps=0.1")
    try:
        return key, toml.loads(f"value = {text}")["value"]
    except toml.TOMLDecodeError:
        return key, text  # a text, such as mish or 30%


def _changed(recipe: Recipe, changes: Mapping[str, Any], *, name: str) -> Recipe:
    tables = {settings["name"]: settings for settings in recipe.settings()}
    for key, value in sorted(changes.items()):  # a technique comes before its settings
        technique, *path = key.split(".")
        lookup(TECHNIQUES, technique, what="technique")
        if not path:
            _switch(tables, technique, value)
            continue
        if technique not in tables:
            raise SettingError(
                f"{key} came in {name}, whose recipe has no {technique}",
                allowed="settings of techniques that are in it",
                fix=f"add it by {technique}=true, or leave {key} out",
            )
        table = tables[technique]
        for step in path[:-1]:
            inner = table.get(step)
            table[step] = table = dict(inner) if isinstance(inner, Mapping) else {}
        table[path[-1]] = value
    return Recipe.from_settings(tables.values(), name=name)


def _switch(tables: dict[str, dict[str, Any]], technique: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise SettingError(f"{technique} came as {value!r}", allowed="true or false", fix=f"{technique}=false leaves it out")
    if not value:
        tables.pop(technique, None)
    elif technique not in tables:
        tables[technique] = Recipe.from_settings([{"name": technique}]).settings()[0]
