"""Study files: what is searched, on what, and on what else the winner is confirmed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anymask import toml
from anymask.errors import SettingError, naming
from anymask.sweep.plan import BLOCK, NUMBER, PLUGIN, TABLE, TEXT, WHOLE, Part, checked, parts_of
from anymask.sweep.space import Choice, read_space
from anymask.sweep.variants import variant

_TOP = {"plugins": PLUGIN, "about": TEXT, "protocol": TABLE, "tune": TABLE, "confirm": TABLE, "recipe": TABLE, "space": TABLE}
_CONFIRM = {name: kind for name, kind in BLOCK.items() if name not in ("recipes", "about")}
_OWN = {"trials": WHOLE, "share": NUMBER, "search_seed": WHOLE}  # of [tune], beside what a block of a plan has
_TUNE = {**{name: kind for name, kind in _CONFIRM.items() if name != "dense"}, **_OWN}
_RECIPE = {"base": TEXT, "baseline": TEXT}


@dataclass(frozen=True)
class Study:
    """A search over a recipe's settings, and the confirmation of what it finds.

    Args:
        tune, confirm: what is trained in each half, for every data set and network; their grids name no recipe yet.
        space: the choices of each setting, `lr` among them.
        base: the recipe that is changed.
        baseline: the recipe that it has to beat, with a learning rate chosen among the same.
        trials: how many settings are tried, >= 1.
        share: the share of images that tuning may see, in (0, 1), where both halves have the same data; None for all that the
            confirmation does not have.
        search_seed: of the lots that the search draws.
        table: the file as plain values: a folder belongs to one of these.

    Raises:
        SettingError: for numbers out of range, and for a seed that is in both halves.
    """

    tune: tuple[Part, ...]
    confirm: tuple[Part, ...]
    space: Mapping[str, Choice]
    base: str = "tost"
    baseline: str = "default"
    trials: int = 20
    share: float | None = None
    search_seed: int = 0
    about: str = ""
    table: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise SettingError(f"trials came as {self.trials}", allowed="a number >= 1", fix="20 is a small search")
        if self.share is not None and not 0 < self.share < 1:
            raise SettingError(f"share came as {self.share}", allowed="a share in (0, 1)", fix="0.5 gives each half as many images")
        both = sorted(self.seeds("tune") & self.seeds("confirm"))
        if both:
            raise SettingError(
                f"[tune] and [confirm] both have seed{'s' * (len(both) > 1)} {', '.join(map(str, both))}",
                allowed="seeds for the confirmation that tuning has not seen",
                fix="write first_seed = 100 under [tune]",
            )

    def seeds(self, half: str) -> set[int]:
        """The seeds of the half "tune" or "confirm"."""
        return {seed for part in getattr(self, half) for seed in part.seeds}

    def on(self, device: str) -> "Study":
        """The same study on another device."""
        tune, confirm = (tuple(part.on(device) for part in parts) for parts in (self.tune, self.confirm))
        return replace(self, tune=tune, confirm=confirm)


def read_study(path: str | os.PathLike[str]) -> Study:
    """Read a study: `plugins` (modules to import), `[protocol]`, `[recipe]` (base, baseline), `[space]`, `[tune]` and `[confirm]`.

    `[tune]` and `[confirm]` have what a block of a plan has, but recipes (`read_plan`); `[tune]` also trials, share and search_seed, and
    `[confirm]` also dense (false).

    Raises:
        OSError: when the file cannot be read.
        FileFormatError: when it is not TOML.
        UnknownName, SettingError: naming the table, for what no study can have.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "study.toml"
        >>> _ = file.write_text('[tune]\\nfirst_seed = 100\\n[confirm]\\nseeds = 5\\n[space]\\nlr = [0.1, 0.2]')
        >>> study = read_study(file)
        >>> sorted(study.seeds("tune")), study.space["lr"].values
        ([100, 101, 102], (0.1, 0.2))
    """
    path = Path(path)
    raw = toml.read(path)
    top = checked(raw, _TOP, where=str(path))
    for name in ("tune", "confirm", "space"):
        if name not in top:
            raise SettingError(f"{path} has no [{name}]", allowed="[tune], [confirm] and [space]", fix=f"write [{name}]")
    own = checked(top["tune"], _TUNE, where=f"[tune] of {path}")
    recipe = checked(top.get("recipe", {}), _RECIPE, where=f"[recipe] of {path}")
    checked(top["confirm"], _CONFIRM, where=f"[confirm] of {path}")
    with naming(f"[recipe] of {path}"):
        for name in recipe.values():
            variant(name)
    tune, confirm = (_parts(top, half, path) for half in ("tune", "confirm"))
    space = read_space(top["space"], recipe.get("base", Study.base), where=f"[space] of {path}")
    settings: dict[str, Any] = {name: own[name] for name in _OWN if name in own} | recipe | {"about": top.get("about", "")}
    with naming(str(path)):
        return Study(tune, confirm, space=space, **settings, table=raw)


def _parts(top: Mapping[str, Any], half: str, path: Path) -> tuple[Part, ...]:
    table = {"dense": False, **{name: value for name, value in top[half].items() if name in BLOCK}}
    return parts_of(table, top.get("protocol", {}), plugins=top.get("plugins", ()), where=f"[{half}] of {path}")
