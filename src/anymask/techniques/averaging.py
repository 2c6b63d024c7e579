"""An average of the weights along the training, which is what is evaluated and what is left at its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from anymask.durations import Duration
from anymask.errors import SettingError, TechniqueError
from anymask.holding import held
from anymask.mask import Mask, local, shard
from anymask.prunables import compact
from anymask.registry import lookup
from anymask.schedules import Schedule
from anymask.techniques.base import LATER, Attached, Context, Technique

KINDS = ("ema", "swa")


@dataclass(frozen=True)
class Averaging(Technique):
    r"""Average of the weights: an exponential moving one (EMA), or the mean of the last part of training (SWA). After each step

        ema:    a <- d a + (1 - d) w,    d = min(decay, t / (t + 9)) after step t = 1, 2 ...
        swa:    a <- w up to `start`, then d = n / (n + 1) after n = 1, 2 ... more steps: the mean of all w since then

    for each parameter and each floating-point buffer (the statistics of norms), a = w at first. Training goes on with w. What is evaluated
    inside `RunningRecipe.plain`, and what is left at the end, is (1 - s) w + s a with the strength s (constant 1 by default) of the
    last step. Pruned weights are 0 in w and so in a; where a mask moves, a becomes 0 with what is pruned, and begins at 0 with
    what is grown, as w does. Averages of narrower numbers than float32 are kept in float32.

    Args:
        decay: of the EMA, in [0, 1): 1 / (1 - decay) steps are what it remembers. Take about a tenth of the training's steps or less:
            0.99 for 1,000.
        kind: "ema" or "swa".
        start: where the mean of SWA begins, such as "75%" or "12ep".

    Raises:
        SettingError: for a decay out of its range, another kind, or a start that is no length of training.
        TechniqueError: on attach, without an optimiser, and for a start at the end of the training.

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

    Reference: Polyak averaging; stochastic weight averaging (arXiv 1803.05407); for sparse networks Lottery Pools (arXiv 2208.10842)
    average along and over tickets. The growing d is that of TensorFlow's and timm's averages. Ours: SWA takes every step, not the end
    of every epoch, leaves the learning rate as it is, and averages the statistics of norms instead of measuring them anew.
    """

    name: ClassVar[str] = "averaging"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "an average of the weights (EMA, SWA) is what is evaluated and left"
    paper: ClassVar[str] = "arXiv 2208.10842"
    depth: ClassVar[int] = 1  # of what all others make of the weights, but for SAM's perturbation

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    decay: float = 0.99
    kind: str = field(default="ema", metadata=LATER)
    start: str = field(default="75%", metadata=LATER)

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(KINDS), self.kind, what="kind of average")
        Duration.parse(self.start)
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay came as {self.decay}", allowed="a number in [0, 1)", fix="0.99 suits 1,000 steps, 0.999 10,000")

    def attach(self, context: Context) -> "_Average":
        start = Duration.parse(self.start).steps(total=context.total_steps, per_epoch=context.steps_per_epoch)
        if self.kind == "ema":
            return _Average(self, context, start=None)
        if start >= context.total_steps:
            raise TechniqueError(
                f"{self.name} came with start {self.start}, which is the end of this training",
                allowed="a start before it",
                fix='give start="75%", or leave averaging out of the recipe',
            )
        return _Average(self, context, start=start)


class _Average(Attached):
    def __init__(self, settings: Averaging, context: Context, *, start: int | None) -> None:
        model = self.model = context.model
        self.optimizer, self.decay, self.start = context.needs_optimizer(settings.name), settings.decay, start
        self.strength, self.steps, self.since = 1.0, 0, context.start  # steps of the training before and since it was attached first
        self._of: Mask | None = None  # the mask that the averages have: none yet, because it may be held after this
        self._parameters = dict(model.named_parameters())
        floats = [name.rpartition(".") for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        self._buffers = {f"{place}{dot}{key}": (model.get_submodule(place), key) for place, dot, key in floats}
        self.averages = {name: _begun(self._live(name)) for name in (*self._parameters, *self._buffers)}
        self._aside: dict[str, Tensor] = {}  # what is trained, while the average is in its place
        how = f"decay {self.decay:g}" if start is None else f"the mean from step {max(start, context.start)} on"
        self.found = f"{len(self.averages)} parameters and buffers, {how}"

    def _live(self, name: str) -> Tensor:
        """What is averaged under this name. A model that is moved gets other buffers."""
        if name in self._parameters:
            return self._parameters[name]
        module, key = self._buffers[name]
        return module.get_buffer(key)

    def set_strength(self, strength: float) -> None:
        # Where the schedule ends, 0 comes right before `detach`, which leaves what the last step had.
        self.strength, self.last = strength, strength or self.strength

    @torch.no_grad()
    def after_update(self) -> None:
        self.steps += 1
        self._follow()
        for name in self.averages:
            average = local(self._average(name))
            average.lerp_(local(self._live(name)).to(average.dtype), 1 - self._share())

    def _share(self) -> float:
        """How much of the average stays."""
        if self.start is None:
            return min(self.decay, self.steps / (self.steps + 9))
        after = max(0, self.since + self.steps - self.start)
        return after / (after + 1)

    @torch.no_grad()
    def settle(self) -> None:
        self._leave(self.strength)

    @torch.no_grad()
    def unsettle(self) -> None:
        for name, value in self._aside.items():
            local(self._live(name)).copy_(local(value))
        self._aside = {}

    def detach(self) -> None:
        with torch.no_grad():
            self._leave(self.last)

    def state_dict(self) -> dict[str, Any]:
        layers = compact(self.model)  # dense, as in the checkpoints of `fit`: any machine can go on, sparse or not
        dense = {name: layers[name].dense(value) if name in layers else value for name, value in self.averages.items()}
        return {"steps": self.steps, "since": self.since, "averages": dense}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        layers = compact(self.model)
        self.steps, self.since = int(state["steps"]), int(state["since"])
        for name, value in state["averages"].items():
            self.averages[name].copy_(layers[name].stored(value) if name in layers else value)

    def _leave(self, strength: float) -> None:
        """Put the average into the model, and keep aside what was there."""
        self._follow()
        self._aside = {name: self._live(name).detach().clone() for name in self.averages} if strength else {}
        for name in self._aside:
            here, average = local(self._live(name)), local(self._average(name))
            here.copy_(average if strength == 1 else torch.lerp(here.to(average.dtype), average, strength))

    def _average(self, name: str) -> Tensor:
        """The average of a tensor that may have moved to another device since, or was converted to other storage (then it begins anew)."""
        average, live = self.averages[name], self._live(name).detach()
        if average.shape != live.shape:
            average = self.averages[name] = _begun(live)
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
            average = local(self._average(next(n for n, tensor in self._parameters.items() if tensor is parameter)))
            average.masked_fill_(~kept.to(average.device), 0)


def _begun(live: Tensor) -> Tensor:
    """What an average is at first: at least float32, because bfloat16 loses steps of less than 1 / 512 of a number."""
    return live.detach().to(torch.promote_types(live.dtype, torch.float32), copy=True)
