"""Recipes: techniques composed, attached to anybody's training, and gone at its end."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from anymask import toml
from anymask.errors import FileFormatError, SettingError, TechniqueError
from anymask.holding import held, innermost
from anymask.mask import Mask
from anymask.prunables import bare
from anymask.registry import lookup, same_type, unknown
from anymask.running import MARK, RunningRecipe
from anymask.techniques import TECHNIQUES, Context, Loss, Technique
from anymask.techniques.base import settings_of, shed

_KEYS = ("technique", "about", "study")  # of a recipe file; `study` says how `anymask study` chose it


@dataclass(frozen=True)
class Recipe:
    """Techniques to train a sparse network with, in the order in which they are attached.

    Args:
        techniques: at most one of each kind.
        name: what ledgers and tables call it.

    Raises:
        SettingError: when a technique is there twice.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> running = anymask.Recipe.preset("tost").only("ghost_activation").attach(model, optimizer, total_steps=2)
        >>> for _ in range(2):
        ...     running.loss(model(torch.randn(3, 4)), torch.tensor([0, 1, 1])).backward()
        ...     optimizer.step(); optimizer.zero_grad(); running.step()
        >>> running.finish() is model
        True
    """

    techniques: tuple[Technique, ...] = ()
    name: str = "custom"

    def __post_init__(self) -> None:
        names = [t.name for t in self.techniques]
        if len(set(names)) < len(names):
            raise SettingError(f"recipe {self.name!r} holds {names}", allowed="each technique once", fix="merge the two into one")

    # -- making one ------------------------------------------------------------------------------------------------
    @classmethod
    def preset(cls, name: str) -> "Recipe":
        """A recipe that comes with the package, or a TOML file of your own; whole or in part.

        Args:
            name: "default", "tost" ... (`anymask list` shows them), or a path that ends in ".toml". A colon picks
                techniques of it: "tost:lrsi,ghost_skip" has these alone, "tost:-lrsi" all but this one.

        Raises:
            UnknownName: with the nearest names.
            SettingError: when `name` is no text, or picks techniques with and without a minus.
            FileFormatError: when the file is no recipe.

        Example:
            >>> [t.name for t in Recipe.preset("tost:-lrsi,-ghost_skip").techniques]
            ['ghost_activation', 'label_smoothing']
        """
        if not isinstance(name, str):
            raise SettingError(
                f"the name of a recipe came as {name!r}",
                allowed="text: the name of a preset, or a path that ends in .toml",
                fix="`anymask list` shows the presets; Recipe.load takes a Path",
            )
        whole, _, part = name.partition(":")
        recipe = cls.load(whole) if whole.endswith(".toml") else cls.load(lookup(presets(), whole, what="recipe"))
        picked = part.split(",") if part else []
        minus = [p for p in picked if p.startswith("-")]
        if minus and len(minus) < len(picked):
            raise SettingError(
                f"recipe {name!r} names techniques to leave out and techniques to keep",
                allowed="all with a minus, or none",
                fix="give each a minus to leave them out, or name the techniques to keep alone",
            )
        if minus:
            return replace(recipe.without(*(p[1:] for p in picked)), name=name)
        return replace(recipe.only(*picked), name=name) if picked else recipe

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """The recipe in a TOML file: a list `technique` of tables, each with `name` and that technique's settings; and `about`, a text."""
        path = Path(path)
        if not path.is_file():
            raise SettingError(
                f"no recipe file at {path}", allowed="a TOML file, or the name of a preset", fix="`anymask list` shows the presets"
            )
        table = toml.read(path)
        for key in table:
            if key not in _KEYS:
                raise unknown(key, _KEYS, what=f"key in {path}")
        techniques = table.get("technique")
        if not isinstance(techniques, list) or not all(isinstance(t, dict) for t in techniques):
            raise FileFormatError(
                f"technique in {path} came as {techniques!r}",
                allowed="a list of tables",
                fix="write [[technique]] before each, or technique = [] for none",
            )
        return cls.from_settings(techniques, name=path.stem)

    @classmethod
    def from_settings(cls, techniques: Iterable[Mapping[str, Any]], *, name: str = "custom") -> "Recipe":
        """The recipe of plain values, as `settings` gives them."""
        return cls(tuple(_technique(dict(settings)) for settings in techniques), name=name)

    def settings(self) -> list[dict[str, Any]]:
        """This recipe as plain values, for a ledger or a file."""
        return settings_of(self.techniques)

    def only(self, *names: str) -> "Recipe":
        """This recipe with the named techniques alone."""
        self._known(names)
        return Recipe(tuple(t for t in self.techniques if t.name in names), name=f"{self.name}:{','.join(names)}")

    def without(self, *names: str) -> "Recipe":
        """This recipe without the named techniques."""
        self._known(names)
        return Recipe(tuple(t for t in self.techniques if t.name not in names), name=f"{self.name}:-{',-'.join(names)}")

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            lookup({t.name: t for t in self.techniques}, name, what=f"technique of recipe {self.name!r}")

    # -- using it --------------------------------------------------------------------------------------------------
    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        total_steps: int,
        example: Any = None,
        data: Iterable[tuple[Any, Any]] | None = None,
        mask: Mask | None = None,
        teacher: nn.Module | None = None,
        steps_per_epoch: int | None = None,
        loss: Loss = F.cross_entropy,
        seed: int = 0,
        start: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> "RunningRecipe":
        """Put the techniques into a training; they fade, and are gone by its end.

        Args:
            model: changed in place, and plain again after `finish`; may come within torch.compile or DistributedDataParallel,
                or cut by `fully_shard`.
            optimizer: learned ghosts join it for as long as they live; None where no technique works on its steps. It should have all
                weights that it will ever train, frozen ones too: those of a later `add_param_group` are trained without the recipe.
            total_steps: optimiser steps of the whole training, >= 1.
            example: a batch of inputs, for techniques that look at how data flows: a tensor (N, ...), a tuple of positional
                inputs or a mapping of keyword inputs.
            data: batches of (inputs, target), for techniques that look at gradients (LRsI); inputs as in `example`.
            mask: the mask that is held; found by itself when `anymask.hold` was called on `optimizer`.
            teacher: a trained network of the same inputs and outputs, on the model's device, for techniques that learn from one
                (distillation); it is put into eval mode.
            steps_per_epoch: needed when a schedule counts epochs ("90ep").
            loss: (logits, target) -> loss.
            seed: for what techniques draw at random.
            start: the step that the training is at, in [0, total_steps).
            state: `state_dict()` of an earlier RunningRecipe, to go on from there. Then load the model's and the
                optimiser's state dicts, which may hold the weights of ghosts, after this call. Save all three outside of
                `RunningRecipe.plain`: the plain weights from within would take the place of perturbed ones (SAM).

        Raises:
            TechniqueError: when techniques find nothing to apply to (naming them all, and the recipe without them; the model is
                then as before), a recipe is attached already, or the model is an nn.DataParallel.
            SettingError: when `state` is of another recipe, a number is out of range, or `model` or `optimizer` is none.
        """
        if not 0 <= start < total_steps:
            raise SettingError(
                f"total_steps came as {total_steps} and start as {start}",
                allowed="0 <= start < total_steps",
                fix="give total_steps=epochs * len(loader)",
            )
        inner = bare(model)
        if any(isinstance(module, nn.DataParallel) for module in model.modules()):
            raise TechniqueError(
                "the model is within nn.DataParallel, whose replicas would use the ghosts of the first device",
                allowed="plain models, torch.compile, DistributedDataParallel or fully_shard",
                fix="use DistributedDataParallel, or attach to the model inside and train it on one device",
            )
        if vars(inner).get(MARK):
            raise TechniqueError(
                f"{type(inner).__name__} carries the recipe {vars(inner)[MARK]!r} already",
                allowed="one recipe at a time",
                fix="call finish() on the first one, or compose both into one Recipe",
            )
        vars(inner).pop(MARK, None)  # it is the copy of one that carried a recipe
        shed(inner)
        optimizer = None if optimizer is None else innermost(optimizer)
        carried = held(optimizer)
        mask = mask if mask is not None else (carried.mask if carried is not None else None)
        steps: dict[str, Any] = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "start": start}
        context = Context(model, optimizer, loss, mask=mask, example=example, data=data, seed=seed, teacher=teacher, **steps)
        return RunningRecipe(self.techniques, context, name=self.name, remedy=self._remedy, state=state)

    def _remedy(self, refused: Iterable[str]) -> str:
        """What to write instead of this recipe, so that the refused techniques are not in it."""
        refused = set(refused)
        left = tuple(t for t in self.techniques if t.name not in refused)
        if not left:
            return "train without a recipe"
        whole = self.name.partition(":")[0]
        known = Recipe.load(presets()[whole]).techniques if whole in presets() else ()
        if tuple(t for t in known if t in left) == left:
            return f"use Recipe.preset('{whole}:{','.join(f'-{t.name}' for t in known if t not in left)}')"
        return f"use recipe.without({', '.join(repr(t.name) for t in self.techniques if t.name in refused)})"


def presets() -> dict[str, Path]:
    """The recipes that come with the package, name -> TOML file."""
    folder = Path(str(resources.files("anymask") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _technique(settings: dict[str, Any]) -> Technique:
    """A technique from plain values: `name` picks the class, the rest are its fields."""
    kind = lookup(TECHNIQUES, str(settings.pop("name", "")), what="technique")
    return _build(kind, settings, what=kind.name)


def _build(kind: Any, settings: Mapping[str, Any], *, what: str) -> Any:
    known = {f.name for f in fields(kind)}
    for key in settings:
        if key not in known:
            raise unknown(key, sorted(known), what=f"setting of {what}")
    hints, default = get_type_hints(kind), kind()
    nested = {k: _build(hints[k], v, what=f"{what}.{k}") for k, v in settings.items() if is_dataclass(hints[k]) and isinstance(v, Mapping)}
    for key in settings:
        same_type(f"{what}.{key}", settings[key], getattr(default, key)) if key not in nested else None
    # 200 and 200.0 are equal, but not in a ledger's digest of the settings.
    floats = {key: float(settings[key]) for key in settings if isinstance(getattr(default, key), float)}
    return replace(default, **{**settings, **floats, **nested})
