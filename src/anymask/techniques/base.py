"""What a technique is: a value with settings, and what it puts into a training while it is attached."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.errors import TechniqueError
from anymask.mask import Mask
from anymask.prunables import trained
from anymask.schedules import Schedule
from anymask.surgery import Cost

LATER = {"later": True}  # of a field that is younger than the first ledgers: at its default it is no part of what names a training
Loss = Callable[[Tensor, Tensor], Tensor]  # (output, target) -> 0-D loss
T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What a technique may need to know of a training that it joins."""

    model: nn.Module
    optimizer: Optimizer | None
    loss: Loss
    mask: Mask | None = None
    example: Any = None  # a batch of inputs, as `surgery.run` takes them
    data: Iterable[tuple[Any, Tensor]] | None = None  # batches of (inputs, target)
    total_steps: int = 1  # optimiser steps of the whole training
    steps_per_epoch: int | None = None
    start: int = 0  # the step of them at which this training began
    seed: int = 0
    teacher: nn.Module | None = None  # a trained network, on the device of the model

    def needs_optimizer(self, technique: str) -> Optimizer:
        """The optimiser; raises TechniqueError when there is none."""
        allowed = "the optimiser that trains the model, whose steps it works on"
        return _given(self.optimizer, f"{technique} got no optimiser", allowed=allowed, fix="pass it to Recipe.attach")

    def needs_mask(self, technique: str) -> Mask:
        """The mask; raises TechniqueError when there is none."""
        fix = f"call anymask.hold(mask, model, optimizer) before Recipe.attach, or leave {technique} out of the recipe"
        return _given(self.mask, f"{technique} got no mask", allowed="a mask that is held, whose weights it works on", fix=fix)

    def masked_weights(self, technique: str) -> dict[str, nn.Parameter]:
        """The weights of the mask that the optimiser trains, by name, tied ones once; raises TechniqueError when there are none."""
        optimizer = self.needs_optimizer(technique)
        here = trained(optimizer)
        weights = self.needs_mask(technique).check(self.model)
        first = {id(p): name for name, p in reversed(weights.items())}
        found = {name: p for name, p in weights.items() if id(p) in here and first[id(p)] == name}
        if not found:
            raise TechniqueError(
                f"{technique} got an optimiser that trains none of the masked weights",
                allowed="the optimiser that trains this very model",
                fix="pass that one to Recipe.attach",
            )
        return found

    def needs_real(self, technique: "Technique") -> None:
        """Raises TechniqueError where a technique that works on weights would work on complex ones: on those of the mask in each step,
        on any at the beginning.
        """
        if technique.seam not in ("init", "step"):
            return
        masked = self.mask if technique.seam == "step" else None
        weights = dict(self.model.named_parameters()) if masked is None else masked.check(self.model)
        if names := [name for name, weight in weights.items() if weight.is_complex()]:
            raise TechniqueError(
                f"{technique.name} on {type(self.model).__name__}, whose weights are complex: {', '.join(names)}",
                allowed="weights that are real numbers",
                fix=f"leave {technique.name} out of the recipe",
            )

    def needs_example(self, technique: str) -> Any:
        """The example; raises TechniqueError when there is none."""
        allowed = "a batch of inputs, to see how data flows through the model"
        return _given(self.example, f"{technique} got no example of an input", allowed=allowed, fix="pass example=x to Recipe.attach")


def _given(value: T | None, came: str, *, allowed: str, fix: str) -> T:
    if value is None:
        raise TechniqueError(came, allowed=allowed, fix=fix)
    return value


class Attached:
    """What a technique left in a training; this one leaves nothing. Subclasses override what their seam needs."""

    found: str = ""  # what it applies to, for people
    added: Cost = Cost()  # what it adds while it is there
    strength: float = 1.0

    @property
    def looks(self) -> bool:
        """Whether its hooks have to see the next forward pass, which therefore must not be a compiled one (`RunningRecipe.watched`)."""
        return False

    @property
    def recording(self) -> Hashable | None:
        """What it does in a step, beside numbers in tensors that stay where they are: a recorded step is good while this stays the same.

        None where its steps cannot be recorded: it counts them, or decides by numbers. `replayed` tells of those that were.
        """
        return None

    def replayed(self) -> None:
        """A step was made by a recording: count it where steps are counted."""

    def set_strength(self, strength: float) -> None:
        """Set the strength, in [0, 1]; at 0 the network computes what the plain one does, bit for bit."""
        self.strength = strength

    def loss(self, value: Tensor, output: Tensor, target: Tensor) -> Tensor:
        """The loss to train with, given the loss `value` so far."""
        return value

    def before_update(self) -> None:
        """The optimiser is about to make its step: gradients are accumulated, clipped, and 0 where the mask says so. In
        `step(closure)` the closure has been called.
        """

    def after_update(self) -> None:
        """The optimiser has made its step: the weights are new, and 0 where the mask says so; they must stay 0 there.

        Techniques are told by their depth, those of equal depth in the order of the recipe; in the reverse after a step.
        """

    def settle(self) -> None:
        """The network is about to be evaluated: give it what training would leave if it ended here. `unsettle` is due after it."""
        self.set_strength(0.0)

    def unsettle(self) -> None:
        """Training goes on, with what it had before `settle`; `set_strength` follows."""

    def state_dict(self) -> dict[str, Any]:
        """What this knows beside the model and the optimiser, as tensors and plain values, so that training can be resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; the model's own state is loaded after this."""

    def detach(self) -> None:
        """Leave: modules, hooks, parameters and optimiser are as before."""


@dataclass(frozen=True)
class Technique:
    """A training trick for sparse networks: frozen settings, and `attach`, which puts it into a training.

    Each works at one seam: "init" (changes the weights once, before the first step), "model", "loss" or "step" (what is around the
    optimiser's step), which fade along `schedule` and are gone where it reaches 0.
    """

    name: ClassVar[str]
    seam: ClassVar[str]
    about: ClassVar[str]  # one line for `anymask list`
    paper: ClassVar[str]
    taught: ClassVar[bool] = False  # whether it needs a teacher
    depth: ClassVar[int] = 3  # at the seam "step": the smaller, the earlier before a step, and the later after it
    schedule: Schedule = field(default_factory=Schedule)

    def attach(self, context: Context) -> Attached:
        """Join the training, at strength 1.

        Raises:
            TechniqueError: when there is nothing here that the technique applies to.
        """
        raise NotImplementedError

    def nothing(self, what: str, model: nn.Module, *, fix: str) -> TechniqueError:
        """The error for a technique that would do nothing in silence."""
        return TechniqueError(
            f"{self.name} found nothing to apply to in {type(model).__name__}",
            allowed=f"a model with {what}",
            fix=f"{fix}, or leave {self.name} out of the recipe",
        )


class Ghost(nn.Module):
    """A module that adds something to another while it is attached; never part of a state dict by itself.

    Whoever copies or pickles the model (an average of its weights, the best one so far, an export) wants the plain network, and no
    recipe would ever fade what is in the copy: there a ghost is `gone`, and its hooks have nothing to do.
    """

    strength: Tensor
    gone = False

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # A 0-D tensor, so that a compiled graph does not change when the strength does.
        self.register_buffer("strength", torch.ones((), dtype=torch.float32, device=device), persistent=False)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return _gone, (type(self),)


def _gone(kind: type[Ghost]) -> Ghost:
    ghost = kind.__new__(kind)
    nn.Module.__init__(ghost)
    ghost.gone = True
    return ghost


class Haunted(nn.Module):
    """The ghosts of one technique, as one child of a model that shows neither their parameters nor their buffers.

    Whoever pairs `model.parameters()` or `buffers()` with those of a copy (torch.optim.swa_utils.AveragedModel, in
    order, chained and counted) would else pair the wrong ones as ghosts come and go. They still move with the model,
    follow its mode, and are in its state dict. A copy of the model has an empty one, which takes in a state dict with ghosts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ghosts: list[Ghost] = []  # a list, not a ModuleList: not registered

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training":  # train() writes it, and so do `evaluating` and Lightning to each module, without train()
            for ghost in self.ghosts:
                ghost.train(value)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return Haunted, ()

    def share_strength(self) -> None:
        """One tensor is the strength of all ghosts."""
        for ghost in self.ghosts[1:]:
            ghost.strength = self.ghosts[0].strength

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Haunted":
        for ghost in self.ghosts:
            ghost._apply(fn, recurse)
        self.share_strength()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for i, ghost in enumerate(self.ghosts):
            ghost.state_dict(destination=destination, prefix=f"{prefix}{i}.", keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, _metadata: Any, *rest: Any) -> None:
        for i, ghost in enumerate(self.ghosts):
            for name, module in ghost.named_modules():
                at = f"{prefix}{i}.{name}." if name else f"{prefix}{i}."
                module._load_from_state_dict(state_dict, at, {"version": module._version}, *rest)


class AttachedGhosts(Attached):
    """Ghosts hooked into `model`, together under the name `child` while they are there."""

    def __init__(self, model: nn.Module, *, child: str, found: str, added: Cost | None = None) -> None:
        self.child, self.found, self.added = child, found, added or Cost()
        self._host: nn.Module | None = _host(model)
        self._haunted = Haunted()
        self._handles: list[Any] = []
        self._haunted.training = model.training
        self._host.add_module(child, self._haunted)

    def add(self, ghost: Ghost, handles: list[Any]) -> None:
        """Take in `ghost`, to be removed with `handles` on detach."""
        ghost.train(self._haunted.training)
        self._haunted.ghosts.append(ghost)
        self._haunted.share_strength()
        self._handles += handles

    @property
    def recording(self) -> Hashable:
        return ()  # strengths are tensors

    def set_strength(self, strength: float) -> None:
        if self._haunted.ghosts:
            self._haunted.ghosts[0].strength.fill_(strength)

    def detach(self) -> None:
        if self._host is not None:
            delattr(self._host, self.child)
        for handle in self._handles:
            handle.remove()
        self._host, self._haunted, self._handles = None, Haunted(), []


def shed(model: nn.Module) -> None:
    """Take away what a copy of a model with ghosts still has of them: hooks without work, and empty places."""
    for module in list(model.modules()):
        for name in [name for name, child in module._modules.items() if isinstance(child, Haunted) and not child.ghosts]:
            del module._modules[name]
        tables = [table for name, table in vars(module).items() if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]
        gone = [key for table in tables for key, hook in table.items() if getattr(getattr(hook, "__self__", None), "gone", False) is True]
        for table in tables:  # the hooks, and how they are called
            for key in gone:
                table.pop(key, None)


def _host(model: nn.Module) -> nn.Module:
    """Where ghosts can live: the model, unless it is one that runs each of its children."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if not isinstance(model, lists):
        return model
    return [m for m in model.modules() if not isinstance(m, (*lists, Haunted))][-1]  # other ghosts may leave before these do


def settings_of(techniques: Iterable[Technique]) -> list[dict[str, Any]]:
    """Techniques as plain values, for a ledger or a file."""
    young = [{f.name for f in fields(t) if "later" in f.metadata and getattr(t, f.name) == f.default} for t in techniques]
    return [
        {"name": t.name, **{key: value for key, value in asdict(t).items() if key not in absent}}
        for t, absent in zip(techniques, young, strict=True)
    ]


def refusal(refused: Mapping[str, TechniqueError], *, of: int, remedy: str) -> TechniqueError:
    """One error for all techniques of a recipe that refused, with what to write instead."""
    first = next(iter(refused.values()))
    if of == 1:
        return first
    if len(refused) == 1:  # what it says itself, and the whole remedy
        return TechniqueError(first.came, allowed=first.allowed, fix=f"{first.fix}; or {remedy}")
    said = "; ".join(f"{e.came} (allowed: {e.allowed}; to do: {e.fix})" for e in refused.values())
    return TechniqueError(
        f"{len(refused)} of the {of} techniques cannot be attached: {said}",
        allowed="a recipe whose techniques all find something to do",
        fix=remedy,
    )
