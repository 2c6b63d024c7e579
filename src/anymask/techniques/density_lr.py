"""Larger steps for layers that keep less."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from anymask.errors import SettingError
from anymask.holding import held
from anymask.mask import Mask, local
from anymask.schedules import Schedule
from anymask.techniques.base import LATER, Attached, Context, Technique


@dataclass(frozen=True)
class DensityLR(Technique):
    r"""The optimiser's step on each masked weight tensor, scaled by what the mask keeps of it.

    With d the density of the tensor in the mask, s the strength, and w' what the optimiser makes of w,

        w <- w' + s (c - 1) (w' - w)      with      c = max(1, min(most, d^-power, turnover / T))

    which is c times the learning rate for that tensor at s = 1, for every optimiser whose step is the learning rate times something
    (SGD, Adam and AdamW, with momentum and weight decay); schedulers of the learning rate work as they do. The last bound is for long
    trainings. Weight decay replaces the weights T = lr decay steps / (1 - momentum) times in a training of so many steps at its peak
    rate, and c T times with the larger steps; where that is often, they only keep the weights from settling (docs/lab.md). Weights outside
    of the mask take their steps as they are. A mask that moves (`anymask.rewire`) is followed. A step that the weights' own dtype rounds
    to 0 stays 0: keep them in float32, with autocast. It costs a copy of the masked weights during the step, and two passes over them.

    Args:
        power: of 1 / density, in [0, 2]; 1 is the paper's.
        most: bound of c, >= 1.
        turnover: bound of c T, where c > 1; 0 for no such bound. T is 0 without weight decay, and without its 1 - momentum where the decay
            does not go through the momentum (AdamW). The peak of lr is taken from the optimiser on attach: lr, or what a scheduler noted
            there (initial_lr, max_lr).

    Raises:
        TechniqueError: on attach, without a mask or an optimiser, when that trains none of the masked weights, or for LBFGS.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Linear(8, 4, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> held = anymask.hold(anymask.prune(model, "random", sparsity=0.75), model, optimizer)
        >>> running = anymask.Recipe((DensityLR(),)).attach(model, optimizer, total_steps=1)
        >>> running.found
        {'density_lr': 'updates of 1 tensors, times 4 to 4'}
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(1, 8)).sum().backward(); optimizer.step()
        >>> torch.allclose(model.weight - before, -0.4 * held.mask["weight"])  # 4 times the learning rate
        True

    Reference: Sparse maximal update parameterization (arXiv 2405.15743): with Adam, the learning rate of a hidden layer goes as
    1 / (width * density), and its initial variance, too (that half is `fan_in_init`). Ours: densities of each layer, relative to the
    dense network; the power and the bounds (1 / T is the timescale of arXiv 2405.13698, as a part of the training); strengths between;
    that decoupled weight decay grows along, as by a larger learning rate; and other optimisers. See docs/techniques.md for SGD, and for
    networks with batch norm.
    """

    name: ClassVar[str] = "density_lr"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "steps of each layer scaled by 1 / density"
    paper: ClassVar[str] = "arXiv 2405.15743"

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    power: float = 1.0
    most: float = 10.0
    turnover: float = field(default=30.0, metadata=LATER)

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 2:
            raise SettingError(f"power came as {self.power}", allowed="a number in [0, 2]", fix="1 is the paper's")
        if not 1 <= self.most < math.inf:
            raise SettingError(f"most came as {self.most}", allowed="a finite number >= 1", fix="10 is the default")
        if not 0 <= self.turnover < math.inf:
            raise SettingError(f"turnover came as {self.turnover}", allowed="a finite number >= 0, 0 for no bound", fix="30 is the default")

    def attach(self, context: Context) -> "_Scaling":
        weights = context.masked_weights(self.name)
        optimizer = context.needs_optimizer(self.name)
        rates = {id(p): _decay(group) for group in optimizer.param_groups for p in group["params"]}
        replaced = {name: rates[id(p)] * context.total_steps for name, p in weights.items()}
        return _Scaling(self, weights, context.needs_mask(self.name), optimizer, replaced)

    def factors(self, mask: Mask, replaced: Mapping[str, float] | None = None) -> dict[str, float]:
        """c of each tensor of `mask`, in [1, most]; 1 for one that keeps nothing.

        Args:
            mask: says what each tensor keeps.
            replaced: T of tensors, by name; 0 without weight decay.

        Example:
            >>> DensityLR(power=0.5).factors(Mask({"weight": torch.eye(4)}))
            {'weight': 2.0}
            >>> DensityLR().factors(Mask({"weight": torch.eye(4)}), {"weight": 12.0})
            {'weight': 2.5}
        """
        often = {name: times for name, times in (replaced or {}).items() if times > 0 and self.turnover > 0}
        bounds = {name: min(self.most, self.turnover / times) for name, times in often.items()}
        return {name: max(1.0, min(bounds.get(name, self.most), d**-self.power)) if d else 1.0 for name, d in mask.layer_density().items()}


def _decay(group: Mapping[str, Any]) -> float:
    """What share of its weights a group's decay replaces in a step at the peak of its rate, where schedulers have noted which that is."""
    rate = max(float(group.get(key) or 0) for key in ("lr", "initial_lr", "max_lr"))
    decay = rate * float(group.get("weight_decay") or 0)
    if "dampening" not in group:  # of AdamW, Muon and their like: beside the momentum
        return decay
    # SGD's momentum adds gradients up, and the decay with them; at the peak of OneCycleLR it is `base_momentum`.
    momentum = float(group.get("base_momentum", group.get("momentum", 0)))
    return decay * (1 - float(group["dampening"]) * bool(momentum)) / max(1 - momentum, 1e-3)


class _Scaling(Attached):
    def __init__(
        self, settings: DensityLR, parameters: Mapping[str, Tensor], mask: Mask, optimizer: Optimizer, replaced: dict[str, float]
    ) -> None:
        self._settings, self._parameters, self._mask, self._optimizer = settings, parameters, mask, optimizer
        self._replaced = replaced
        self._before: dict[str, Tensor] = {}
        self._take_factors()

    def _take_factors(self) -> None:
        self._factors = self._settings.factors(self._mask, self._replaced)
        least, most = (f(self._factors[name] for name in self._parameters) for f in (min, max))
        left = "" if len(self._parameters) == len(self._mask) else f" of the {len(self._mask)} of the mask"
        self.found = f"updates of {len(self._parameters)} tensors{left}, times {least:.3g} to {most:.3g}"
        if self._factors != self._settings.factors(self._mask):
            self.found += f", no more because weight decay replaces weights {max(self._replaced.values()):.3g} times by itself"

    @property
    def recording(self) -> Hashable:
        return self.strength

    @torch.no_grad()
    def before_update(self) -> None:
        self._follow()
        scaled = self._parameters.items() if self.strength > 0 else ()
        self._before = {n: local(p).clone() for n, p in scaled if p.grad is not None and self._factors[n] > 1}

    @torch.no_grad()
    def after_update(self) -> None:
        before, self._before = self._before, {}
        for name, old in before.items():
            here = local(self._parameters[name])
            # Sparse layers have other places for the step in which their mask moves; it is made as it is.
            if here.shape == old.shape and not (self._moved and old.shape != self._mask[name].shape):
                here.add_(torch.sub(here, old, out=old), alpha=self.strength * (self._factors[name] - 1))
        hold = held(self._optimizer)
        if before and hold is not None:  # what it set to 0 just now (loaded dense weights, a mask that moved) is there again
            hold(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {"replaced": dict(self._replaced)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._replaced = dict(state["replaced"])
        self._take_factors()

    @property
    def _moved(self) -> bool:
        hold = held(self._optimizer)
        return hold is not None and hold.mask is not self._mask

    def _follow(self) -> None:
        """Take the factors of the mask that is held now."""
        hold = held(self._optimizer)
        if hold is not None and hold.mask is not self._mask:
            self._mask = hold.mask
            self._take_factors()
