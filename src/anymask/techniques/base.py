"""What a technique is: a value with settings, and what it puts into a training while it is attached."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.errors import TechniqueError
from anymask.mask import Mask
from anymask.schedules import Schedule
from anymask.surgery import Cost

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, target) -> 0-D loss


@dataclass(frozen=True)
class Context:
    """What a technique may need to know of a training that it joins."""

    model: nn.Module
    optimizer: Optimizer | None
    loss: Loss
    mask: Mask | None = None
    example: Tensor | None = None  # a batch of inputs, (N, ...)
    data: Iterable[tuple[Tensor, Tensor]] | None = None  # batches of (input, target)
    total_steps: int = 1  # optimiser steps of the whole training
    seed: int = 0

    def needs_example(self, technique: str) -> Tensor:
        """The example; raises TechniqueError when there is none."""
        if self.example is None:
            raise TechniqueError(
                f"{technique} got no example of an input",
                allowed="a batch of inputs, to see how data flows through the model",
                fix="pass example=x to Recipe.attach",
            )
        return self.example


class Attached:
    """What a technique left in a training; this one leaves nothing. Subclasses override what their seam needs."""

    found: str = ""  # what it applies to, for people
    added: Cost = Cost()  # what it adds while it is there

    def set_strength(self, strength: float) -> None:
        """Set the strength, in [0, 1]; at 0 the network computes what the plain one does, bit for bit."""

    def loss(self, value: Tensor, output: Tensor, target: Tensor) -> Tensor:
        """The loss to train with, given the loss `value` so far."""
        return value

    def detach(self) -> None:
        """Leave: modules, hooks, parameters and optimiser are as before."""


@dataclass(frozen=True)
class Technique:
    """A training trick for sparse networks: frozen settings, and `attach`, which puts it into a training.

    Each works at one seam: "init" (changes the weights once, before the first step), "model" or "loss" (fades along
    `schedule` and is gone where it reaches 0).
    """

    name: ClassVar[str]
    seam: ClassVar[str]
    about: ClassVar[str]  # one line for `anymask list`
    paper: ClassVar[str]
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
    """A module that adds something to another while it is attached; never part of a state dict by itself."""

    strength: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # A 0-D tensor, so that a compiled graph does not change when the strength does.
        self.register_buffer("strength", torch.ones((), dtype=torch.float32, device=device), persistent=False)


class AttachedGhosts(Attached):
    """Ghosts hooked into a model, each a child of its host module under `child` while it is there."""

    def __init__(self, *, child: str, found: str, added: Cost | None = None) -> None:
        self.child, self.found, self.added = child, found, added or Cost()
        self._ghosts: list[tuple[nn.Module, Ghost, list[Any]]] = []

    def add(self, host: nn.Module, ghost: Ghost, handles: list[Any]) -> None:
        """Make `ghost` a child of `host`, to be removed with `handles` on detach."""
        host.add_module(self.child, ghost)
        self._ghosts.append((host, ghost, handles))

    def set_strength(self, strength: float) -> None:
        for _, ghost, _ in self._ghosts:
            ghost.strength.fill_(strength)

    def detach(self) -> None:
        for host, _, handles in self._ghosts:
            delattr(host, self.child)
            for handle in handles:
                handle.remove()
        self._ghosts = []


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters(), torch.empty(0)).device
