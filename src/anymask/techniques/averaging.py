"""An average of the weights along the training, which is what is evaluated and what is left at its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.errors import SettingError
from anymask.holding import held
from anymask.mask import Mask, local, shard
from anymask.prunables import compact
from anymask.schedules import Schedule
from anymask.techniques.base import Attached, Context, Technique


@dataclass(frozen=True)
class Averaging(Technique):
    r"""Exponential moving average (EMA) of the weights. After step t = 1, 2 ... of the optimiser

        a <- d a + (1 - d) w,    d = min(decay, t / (t + 9))

    for each parameter and each floating-point buffer (the statistics of norms), a = w at first. Training goes on with w. What is evaluated
    inside `RunningRecipe.plain`, and what is left at the end, is (1 - s) w + s a with the strength s (constant 1 by default) of the
    last step. Pruned weights are 0 in w and so in a; where a mask moves, a becomes 0 with what is pruned, and begins at 0 with
    what is grown, as w does.

    Args:
        decay: in [0, 1): 1 / (1 - decay) steps are what it remembers. Take about a tenth of the training's steps or less: 0.99 for 1,000.

    Raises:
        SettingError: for a decay out of its range.
        TechniqueError: on attach, without an optimiser.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> _ = model.weight.data.fill_(1.0)
        >>> running = anymask.Recipe((Averaging(),)).attach(model, optimizer, total_steps=1, loss=lambda out, _: out.sum())
        >>> running.loss(model(torch.ones(1, 1)), None).backward(); optimizer.step()
        >>> model.weight.item()
        0.0
        >>> running.step(); round(running.finish().weight.item(), 6)  # 0.1 of 1.0, the first d being 1 / 10
        0.1

    Reference: Polyak averaging; for sparse networks Lottery Pools (arXiv 2208.10842) average along and over tickets. The growing d is
    that of TensorFlow's and timm's averages.
    """

    name: ClassVar[str] = "averaging"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "a moving average (EMA) of the weights is what is evaluated and left"
    paper: ClassVar[str] = "arXiv 2208.10842"
    depth: ClassVar[int] = 1  # of what all others make of the weights, but for SAM's perturbation

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay came as {self.decay}", allowed="a number in [0, 1)", fix="0.99 suits 1,000 steps, 0.999 10,000")

    def attach(self, context: Context) -> "_Average":
        return _Average(context.model, context.needs_optimizer(self.name), context.mask, decay=float(self.decay))


class _Average(Attached):
    def __init__(self, model: nn.Module, optimizer: Optimizer, mask: Mask | None, *, decay: float) -> None:
        self.model, self.optimizer, self.decay = model, optimizer, decay
        self.strength, self.steps, self._of = 1.0, 0, mask
        self.live = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if b.is_floating_point()}}
        self.averages = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self._aside: dict[str, Tensor] = {}  # what is trained, while the average is in its place
        self.found = f"{len(self.live)} parameters and buffers, decay {decay:g}"

    def set_strength(self, strength: float) -> None:
        # Where the schedule ends, 0 comes right before `detach`, which leaves what the last step had.
        self.strength, self.last = strength, strength or self.strength

    @torch.no_grad()
    def after_update(self) -> None:
        self.steps += 1
        self._follow()
        for name, tensor in self.live.items():
            average = local(self._average(name))
            average.lerp_(local(tensor), 1 - min(self.decay, self.steps / (self.steps + 9)))

    @torch.no_grad()
    def settle(self) -> None:
        self._leave(self.strength)

    @torch.no_grad()
    def unsettle(self) -> None:
        for name, value in self._aside.items():
            local(self.live[name]).copy_(local(value))
        self._aside = {}

    def detach(self) -> None:
        with torch.no_grad():
            self._leave(self.last)

    def state_dict(self) -> dict[str, Any]:
        layers = compact(self.model)  # dense, as in the checkpoints of `fit`: any machine can go on, sparse or not
        dense = {name: layers[name].scatter(value) if name in layers else value for name, value in self.averages.items()}
        return {"steps": self.steps, "averages": dense}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        layers = compact(self.model)
        self.steps = int(state["steps"])
        for name, value in state["averages"].items():
            fits = name in layers and tuple(value.shape) == layers[name].dense_shape
            self.averages[name].copy_(layers[name].collect(value) if fits else value)

    def _leave(self, strength: float) -> None:
        """Put the average into the model, and keep aside what was there."""
        self._follow()
        self._aside = {name: tensor.detach().clone() for name, tensor in self.live.items()} if strength else {}
        for name in self._aside:
            here, average = local(self.live[name]), local(self._average(name))
            here.copy_(average if strength == 1 else torch.lerp(here, average, strength))

    def _average(self, name: str) -> Tensor:
        """The average of a tensor that may have moved to another device since, or was converted to other storage (then it begins anew)."""
        average, live = self.averages[name], self.live[name].detach()
        if average.shape != live.shape:
            average = self.averages[name] = live.clone()
        elif average.device != live.device:
            average = self.averages[name] = average.to(live.device)
        return average

    def _follow(self) -> None:
        """Zero what a mask that moved has pruned."""
        hold = held(self.optimizer)
        if hold is None or hold.mask is self._of:
            return
        self._of, stored = hold.mask, hold.mask.as_stored(self.model)
        for name, parameter in hold.parameters.items():
            kept = shard(stored[name], parameter)
            average = local(self._average(next(n for n, tensor in self.live.items() if tensor is parameter)))
            average.masked_fill_(~kept.to(average.device), 0)
