"""What a study chose, frozen in a recipe file."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymask import toml
from anymask.errors import FileFormatError, SettingError
from anymask.recipe import Recipe
from anymask.runlog import atomic
from anymask.sweep.plan import NUMBER, TEXT, WHOLE, checked
from anymask.sweep.variants import variant

_TABLE = {"recipe": TEXT, "baseline": TEXT, "points": NUMBER, "trainings": WHOLE}


@dataclass(frozen=True)
class Winner:
    """The settings that were best in tuning.

    Args:
        recipe: as `variant` has it, with its learning rate.
        baseline: the recipe it was tuned against, with its learning rate.
        points: mean paired difference of validation accuracy in tuning, in percentage points; too good, as the best of many is.
        trainings: over how many pairs.
    """

    recipe: str
    baseline: str
    points: float
    trainings: int

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a recipe file that `Recipe.load` and `--recipe` read."""
        found = variant(self.recipe)
        lines = [
            "# Chosen by `anymask study` on validation accuracy of the tuning half; what it is worth, the confirmation says.",
            f"# A recipe file has no learning rate: this one was tuned with --lr {found.lr}, {self.baseline} is its baseline.",
            f"about = {_toml(f'the winner of a study, tuned with lr {found.lr}')}",
            *([] if found.recipe.techniques else ["technique = []"]),
            "",
            "[study]",
            *(f"{name} = {_toml(getattr(self, name))}" for name in _TABLE),
        ]
        for settings in found.recipe.settings():
            lines += ["", "[[technique]]", *(f"{name} = {_toml(value)}" for name, value in settings.items())]
        with atomic(path, "w") as file:
            file.write("\n".join(lines) + "\n")


def read_winner(path: str | os.PathLike[str]) -> Winner:
    """The winner in a file of `Winner.write`.

    Raises:
        OSError, FileFormatError: when the file cannot be read.
        SettingError: when its techniques are not those that were chosen.
    """
    path = Path(path)
    table = checked(toml.read(path).get("study", {}), _TABLE, where=f"[study] of {path}")
    if set(table) != set(_TABLE):
        raise FileFormatError(f"{path} lacks parts of [study]", allowed="a winner.toml of `anymask study`", fix="choose another --out")
    winner = Winner(**table)
    if Recipe.load(path).settings() != variant(winner.recipe).recipe.settings():
        raise SettingError(
            f"the techniques in {path} are not those that the study chose",
            allowed=f"what it chose, {winner.recipe}",
            fix="restore the file, and change a copy; or choose another --out",
        )
    return winner


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # texts, numbers, true and false are written alike in both
