"""Sign-In: the optimiser trains each weight as a product of two factors, which are shared out anew now and then."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.durations import Duration
from anymask.errors import SettingError
from anymask.holding import held
from anymask.mask import Mask, local
from anymask.prunables import compact
from anymask.schedules import Schedule
from anymask.techniques.base import Attached, Context, Technique


@dataclass(frozen=True)
class SignIn(Technique):
    r"""Each weight theta of the mask is trained as theta = m * w, elementwise, with m^2 - w^2 = beta to begin with:

        m = sqrt((beta + sqrt(beta^2 + 4 theta^2)) / 2),    w = theta / m

    which is how theta is shared out anew every `every` of the training, whatever the factors were. Under gradient flow theta then
    moves by -sqrt(beta^2 + 4 theta^2) times its gradient: small weights keep their speed where m^2 - w^2 is kept at beta, and slow down,
    before they could change their sign, where noise and weight decay have made it small. Hence the sharing out.

    The optimiser steps on both factors, with the settings of the weight's group (weight decay too) and slots of their own. For
    the time of its step, and no longer, the parameter holds w and its gradient is g * m, and m is a guest of the group with the gradient
    g * w; then the parameter is m * w again, and its gradient g. So it is one plain tensor of the user's model to everybody else, and
    between steps the optimiser holds nothing new. At strength s the product is (1 + s * (m - 1)) * w, which is the plain step at 0.

    Memory: one more tensor for each weight (two during the step), and the slots that the optimiser keeps for it.

    Args:
        beta: m^2 - w^2 after sharing out, > 0.
        every: how often that is done, "5%" of the training, "500it", or "5ep" where steps_per_epoch is given.

    Raises:
        SettingError: for a beta out of its range, or an `every` that is no length or counts epochs without steps_per_epoch.
        TechniqueError: on attach, when there is no mask, or the optimiser trains nothing of it.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.6, 0.0]]))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> held = anymask.hold(anymask.Mask({"weight": torch.tensor([[True, False]])}), model, optimizer)
        >>> running = anymask.Recipe((SignIn(),)).attach(model, optimizer, total_steps=1, loss=lambda out, _: out.sum())
        >>> running.loss(model(torch.ones(1, 2)), None).backward(); optimizer.step()
        >>> m = ((1 + (1 + 4 * 0.36) ** 0.5) / 2) ** 0.5  # by hand: g = 1, so m falls by 0.1 w and w by 0.1 m
        >>> bool(abs(model.weight[0, 0] - (m - 0.1 * 0.6 / m) * (0.6 / m - 0.1 * m)) < 1e-6), model.weight[0, 1].item()
        (True, 0.0)

    Reference: Sign-In (arXiv 2504.12801): the product, m^2 - w^2 = beta with beta = 1, the sharing out every p epochs. Ours, because
    its code was not to be had: p = 5% of the training; that momenta are left as they are when factors are shared out; that the
    weights of the mask alone are factored; the strength; and that a single entry is shared out early where theta is 0 (so a
    newly grown weight begins well) or m has fallen below half of sqrt(beta), because w is found as theta / m.
    """

    name: ClassVar[str] = "sign_in"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "masked weights are stepped on as products m * w, shared out anew now and then, so that signs can change"
    paper: ClassVar[str] = "arXiv 2504.12801"
    depth: ClassVar[int] = 5  # while the parameters hold w, nobody else may look at them or at their gradients

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    beta: float = 1.0
    every: str = "5%"

    def __post_init__(self) -> None:
        Duration.parse(self.every)
        if not 0 < self.beta < float("inf"):
            raise SettingError(f"beta came as {self.beta}", allowed="a finite number > 0", fix="1.0 is the paper's")

    def attach(self, context: Context) -> "_SignIn":
        optimizer = context.needs_optimizer(self.name)
        every = max(1, Duration.parse(self.every).steps(total=context.total_steps, per_epoch=context.steps_per_epoch))
        return _SignIn(context.model, optimizer, context.masked_weights(self.name), beta=self.beta, every=every)


class _SignIn(Attached):
    def __init__(self, model: nn.Module, optimizer: Optimizer, weights: dict[str, nn.Parameter], *, beta: float, every: int) -> None:
        self.model, self.optimizer, self.beta, self.every = model, optimizer, beta, every
        self.weights, self.steps = weights, 0
        self.factors: dict[str, nn.Parameter] = {}  # m, by the name of the weight
        self.slots: dict[str, dict[str, Any]] = {}  # what the optimiser stores for m, between its steps
        self._guests: list[tuple[dict[str, Any], str]] = []  # during a step: group and name of those that are in the optimiser
        self._entered: dict[str, Tensor] = {}  # during a step: what the gradients of those were multiplied by
        self._of: Mask | None = None  # whose zeros the slots of m have
        self._handle = optimizer.register_step_post_hook(self._leave)
        # Before all others: a mask that moves, and averages of weights, must find m * w again.
        optimizer._optimizer_step_post_hooks.move_to_end(self._handle.id, last=False)  # type: ignore[attr-defined]
        self.found = f"{len(weights)} masked weights, shared out every {every} steps"

    @torch.no_grad()
    def before_update(self) -> None:
        self._leave()  # what an optimiser left that failed in its step
        if self.strength == 0:
            return
        self._follow()
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self._enter(name, weight, group=groups[id(weight)])
        self.steps += 1

    def _enter(self, name: str, weight: nn.Parameter, *, group: dict[str, Any]) -> None:
        """Let the parameter hold w and m join the optimiser, each with its gradient."""
        assert weight.grad is not None
        factor, theta, gradient = self._shared_out(name, weight), local(weight), local(weight.grad)
        m = self._entered[name] = self._strong(factor).clone()
        theta.div_(m)  # w from here on
        factor.grad = torch.empty_like(factor)
        torch.mul(gradient, theta, out=local(factor.grad)).mul_(self.strength)
        gradient.mul_(m)
        if "momentum_buffer" in self.optimizer.state.get(weight, {}) and not self.slots.get(name):
            self.slots[name] = {"momentum_buffer": torch.zeros_like(factor)}  # a fused SGD wants momentum of all in a group, or of none
        group["params"].append(factor)
        if "param_names" in group:
            group["param_names"].append(f"{name} (sign_in)")
        self.optimizer.state[factor] = self.slots.pop(name, {})
        self._guests.append((group, name))

    @torch.no_grad()
    def _leave(self, *stepped: Any) -> None:
        """Let the parameters be m * w, their gradients g (after a step), and the optimiser as it was."""
        for group, name in reversed(self._guests):
            factor, weight = self.factors[name], self.weights[name]
            local(weight).mul_(self._strong(factor))
            if stepped and weight.grad is not None:  # else the step failed, and the gradient there now is of another one
                local(weight.grad).div_(self._entered[name])
            factor.grad = None
            self.slots[name] = self.optimizer.state.pop(factor, {})
            for key in {"params", "param_names"} & group.keys():
                group[key].pop()
        self._guests, self._entered = [], {}

    def _shared_out(self, name: str, weight: nn.Parameter) -> nn.Parameter:
        """m of a weight: new where it is due, or where theta / m would not be sound."""
        factor = self.factors.get(name)
        if factor is None or factor.shape != weight.shape or factor.device != weight.device:  # first, or converted or moved since
            factor = self.factors[name] = nn.Parameter(torch.zeros_like(weight))
            self.slots.pop(name, None)
        m, theta = local(factor), local(weight)
        anew = torch.addcmul(theta.new_tensor(self.beta**2), theta, theta, value=4).sqrt_().add_(self.beta).div_(2).sqrt_()
        if self.steps % self.every == 0:
            m.copy_(anew)
        else:
            stale = (theta == 0).logical_or_(m < 0.5 * self.beta**0.5)
            m.copy_(torch.where(stale, anew, m))
        return factor

    def _follow(self) -> None:
        """Zero the slots of m where a mask that moved has pruned or grown, as those of the weight are."""
        hold = held(self.optimizer)
        if hold is None or hold.mask is self._of:
            return
        self._of = hold.mask
        for name, slots in self.slots.items():
            weight = self.weights[name]
            for slot in slots.values():
                if isinstance(slot, Tensor) and slot.shape == weight.shape:
                    local(slot).masked_fill_(local(weight) == 0, 0)

    def _strong(self, factor: nn.Parameter) -> Tensor:
        m = local(factor)
        return m if self.strength == 1 else 1 + self.strength * (m - 1)

    def state_dict(self) -> dict[str, Any]:
        layers = compact(self.model)

        def dense(name: str, value: Any) -> Any:  # as in the checkpoints of `fit`: any machine can go on, sparse or not
            return layers[name].dense(value) if name in layers else value

        factors = {name: dense(name, factor.detach()) for name, factor in self.factors.items()}
        slots = {name: {key: dense(name, slot) for key, slot in kept.items()} for name, kept in self.slots.items()}
        return {"steps": self.steps, "factors": factors, "slots": slots}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        layers = compact(self.model)

        def stored(name: str, value: Any) -> Any:
            return layers[name].stored(value) if name in layers else value

        self.steps = int(state["steps"])
        for name, value in state["factors"].items():
            factor = self.factors[name] = nn.Parameter(torch.empty_like(self.weights[name]))
            factor.detach().copy_(stored(name, value))
        self.slots = {
            name: {key: self._placed(stored(name, slot), self.weights[name]) for key, slot in kept.items()}
            for name, kept in state["slots"].items()
        }

    def _placed(self, slot: Any, weight: nn.Parameter) -> Any:
        """A copy on the weight's device; counts of steps stay where they are, unless the optimiser wants them there, too."""
        if not isinstance(slot, Tensor):
            return slot
        there = slot.ndim > 0 or self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
        return slot.to(weight.device if there else slot.device, copy=True)

    def detach(self) -> None:
        self._leave()
        self._handle.remove()
