"""Larger steps for layers that keep less."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from anymask.errors import SettingError, TechniqueError
from anymask.holding import held
from anymask.mask import Mask, local
from anymask.schedules import Schedule
from anymask.techniques.base import LATER, Attached, Context, Technique


@dataclass(frozen=True)
class DensityLR(Technique):
    r"""The optimiser's step on each masked weight tensor, scaled by what the mask keeps of it.

    With d the density of the tensor in the mask, s the strength, and w' what the optimiser makes of w,

        w <- w' + s (c - 1) (w' - w)      with      c = min(most, max(1, d^-power))

    which is c times the learning rate for that tensor at s = 1, for every optimiser whose step is the learning rate times something
    (SGD, Adam and AdamW, with momentum and weight decay); schedulers of the learning rate work as they do. With decay = "kept" it is
    c times the learning rate and 1 / c times the weight decay, so that their product stays what it was: under batch norm that alone says
    how fast neurons turn in the end, and c-fold it keeps long trainings from settling (docs/lab.md). Weights outside of the
    mask take their steps as they are. A mask that moves (`anymask.rewire`) is followed. It costs a copy of the masked weights during
    the step, and two passes over them.

    Args:
        power: of 1 / density, in [0, 2]; 1 is the paper's.
        most: bound of c, >= 1.
        decay: of the weights, "scaled" along by c, or "kept".

    Raises:
        TechniqueError: on attach, without a mask or an optimiser, when that trains none of the masked weights, or for LBFGS; with
            decay = "kept" for an optimiser that decays weights and is not of torch.optim.

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
    dense network; the power and the bound; strengths between; that decoupled weight decay grows along, as by a larger learning rate,
    or is kept; and other optimisers. See docs/techniques.md for SGD, and for networks with batch norm.
    """

    name: ClassVar[str] = "density_lr"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "steps of each layer scaled by 1 / density"
    paper: ClassVar[str] = "arXiv 2405.15743"
    depth: ClassVar[int] = 5  # what it does to gradients for decay = "kept" is of the step, not for `preconditioning` to turn

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    power: float = 1.0
    most: float = 10.0
    decay: str = field(default="scaled", metadata=LATER)

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 2:
            raise SettingError(f"power came as {self.power}", allowed="a number in [0, 2]", fix="1 is the paper's")
        if not 1 <= self.most < math.inf:
            raise SettingError(f"most came as {self.most}", allowed="a finite number >= 1", fix="10 is the default")
        if self.decay not in {"scaled", "kept"}:
            raise SettingError(f"decay came as {self.decay!r}", allowed="'scaled' or 'kept'", fix="'scaled' is the default")

    def attach(self, context: Context) -> "_Scaling":
        weights = context.masked_weights(self.name)
        if self.decay == "kept":
            _check_decay(context.needs_optimizer(self.name))
        return _Scaling(self, weights, context.needs_mask(self.name), context.needs_optimizer(self.name))

    def factors(self, mask: Mask) -> dict[str, float]:
        """c of each tensor of `mask`, in [1, most]; 1 for one that keeps nothing.

        Example:
            >>> DensityLR(power=0.5).factors(Mask({"weight": torch.eye(4)}))
            {'weight': 2.0}
        """
        return {name: min(self.most, d**-self.power) if d else 1.0 for name, d in mask.layer_density().items()}


_DECOUPLED = torch.optim.Adafactor, torch.optim.Muon  # beside those whose groups say so


def _check_decay(optimizer: Optimizer) -> None:
    decays = any(group.get("weight_decay", 0) for group in optimizer.param_groups)
    if decays and not type(optimizer).__module__.startswith("torch.optim"):
        raise TechniqueError(
            f"{DensityLR.name} with decay = 'kept' on {type(optimizer).__name__}, whose weight decay it does not know",
            allowed="optimisers of torch.optim, or one without weight decay",
            fix="leave decay at 'scaled'",
        )


class _Scaling(Attached):
    def __init__(self, settings: DensityLR, parameters: Mapping[str, Tensor], mask: Mask, optimizer: Optimizer) -> None:
        self._settings, self._parameters, self._mask, self._optimizer = settings, parameters, mask, optimizer
        self._factors = settings.factors(mask)
        self._before: dict[str, Tensor] = {}
        self._added: dict[str, Tensor] = {}  # to the gradients, for decay = "kept"
        self._strength = 1.0
        least, most = (f(self._factors[name] for name in parameters) for f in (min, max))
        self.found = f"updates of {len(parameters)} tensors, times {least:.3g} to {most:.3g}"

    @property
    def recording(self) -> Hashable:
        return self._strength

    def set_strength(self, strength: float) -> None:
        self._strength = strength

    @torch.no_grad()
    def before_update(self) -> None:
        self._follow()
        scaled = self._parameters.items() if self._strength > 0 else ()
        self._before = {n: local(p).clone() for n, p in scaled if p.grad is not None and self._factors[n] > 1}
        scale = getattr(self._optimizer, "grad_scale", None)  # set by GradScaler for fused optimisers, which divide by it
        for name, decay in self._decays(decoupled=False).items():
            added = self._before[name] * (decay * (1 / (1 + self._more(name)) - 1))
            self._added[name] = added
            self._gradient(name).add_(added if scale is None else added * scale.to(added.device))

    @torch.no_grad()
    def after_update(self) -> None:
        decays = self._decays(decoupled=True)
        added, self._added = self._added, {}
        for name, term in added.items() if not self._moved else ():  # others look at the gradients after the step, too
            self._gradient(name).sub_(term)
        before, self._before = self._before, {}
        for name, old in before.items():
            here = local(self._parameters[name])
            # Sparse layers have other places for the step in which their mask moves; it is made as it is.
            if here.shape == old.shape and not (self._moved and old.shape != self._mask[name].shape):
                made = here - (1 - decays[name]) * old if name in decays else torch.sub(here, old, out=old)
                here.add_(made, alpha=self._more(name))
        hold = held(self._optimizer)
        if self._moved and hold is not None:  # before this hook: what went was 0, and has been brought back
            hold(self._optimizer)

    def _gradient(self, name: str) -> Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None
        return local(gradient)

    def _more(self, name: str) -> float:
        """What c is more than 1 by, at this strength."""
        return self._strength * (self._factors[name] - 1)

    def _decays(self, *, decoupled: bool) -> dict[str, Any]:
        """With decay = "kept", of the tensors that are scaled: the weight decay that their gradients get; or the share that they lose."""
        if self._settings.decay == "scaled":
            return {}
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        skipped = getattr(self._optimizer, "found_inf", None)  # set by GradScaler for fused optimisers, which then make no step
        made = 1.0 if skipped is None else 1 - skipped
        found: dict[str, Any] = {}
        for name in self._before:
            group = groups[id(self._parameters[name])]
            if group.get("decoupled_weight_decay", isinstance(self._optimizer, _DECOUPLED)) != decoupled:
                continue
            if (decay := group.get("weight_decay", 0)) != 0:
                found[name] = group["lr"] * decay * made if decoupled else -decay if group.get("maximize") else decay
        return found

    @property
    def _moved(self) -> bool:
        hold = held(self._optimizer)
        return hold is not None and hold.mask is not self._mask

    def _follow(self) -> None:
        """Take the factors of the mask that is held now."""
        hold = held(self._optimizer)
        if hold is not None and hold.mask is not self._mask:
            self._mask, self._factors = hold.mask, self._settings.factors(hold.mask)
