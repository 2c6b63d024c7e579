"""Sharpness-aware minimisation at no extra pass: the gradient is taken where the previous one points."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.errors import SettingError, TechniqueError
from anymask.holding import held
from anymask.mask import local
from anymask.prunables import trained
from anymask.schedules import Schedule
from anymask.techniques.base import Attached, Context, Technique

_SLOT = "before_perturbation"  # among the optimiser's slots of a weight that is perturbed now


@dataclass(frozen=True)
class SAM(Technique):
    r"""Single-step SAM (S2-SAM): each gradient is taken at weights moved uphill by the gradient of the step before.

    With weights w_t, the optimiser's own rule U (momentum, weight decay, Adam ...), strength s and g_0 = 0,

        e_t = s * rho * g_{t-1} / ||g_{t-1}||        the norm over all parameters together; e_t = 0 where it is 0 or not finite
        g_t = the gradient of the loss at w_t + e_t
        w_{t+1} = U(w_t, g_t)

    Between steps the model holds w_t + e_t, so a loop needs no further line; right before each step of the optimiser w_t comes back, bit
    for bit, and inside `RunningRecipe.plain` and after `finish` the model holds it, too. g is the gradient as the optimiser gets it:
    accumulated, reduced over ranks, clipped, preconditioned, and 0 where the mask says so, so pruned weights stay 0. It costs no forward
    or backward pass, one over the weights in memory at each step, and a second copy of them: that is a slot of the optimiser, and saved,
    moved and masked as one.
    What is saved in the middle of a training, outside of `plain`, are the weights w_t + e_t, and w_t with the optimiser. Where all is saved
    inside of `plain`, the weights w_t that are loaded after `Recipe.attach` have lost e_t: the next gradient is taken at w_t.

    Other techniques that work on steps see w_t, wherever they stand in the recipe. `anymask.rewire` that is called before `Recipe.attach`
    ranks |w_t|; called after it (as in `fit`), |w_t + e_t|.

    Args:
        rho: the length of e_t at strength 1, in units of the weights, > 0.

    Raises:
        TechniqueError: on attach, without an optimiser that trains a parameter of the model, or for a mask that is not held.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> _ = model.weight.data.fill_(1.0)
        >>> recipe = anymask.Recipe((SAM(rho=0.25),))
        >>> running = recipe.attach(model, optimizer, total_steps=9, loss=lambda out, target: (out - target).sum())
        >>> running.loss(model(torch.ones(1, 1)), torch.zeros(1, 1)).backward(); optimizer.step(); running.step()
        >>> model.weight.item()  # 1 - 0.5, and 0.25 uphill
        0.75
        >>> with running.plain():
        ...     model.weight.item()
        0.5

    Reference: S2-SAM, Ji et al., "A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse
    Training" (NeurIPS 2024, OpenReview MJgMMqMDu4), after SAM (arXiv 2010.01412). The paper's text could not be had here; the equations are
    those of the authors' code (jjsrf/SSAM-NEURIPS2024, sam.py, v2 without `adaptive`), with its rho. Differs from it: there the
    perturbation is of the unmasked gradient, so pruned weights take part in the forward pass, and it is subtracted again, which rounds.
    Its scripts turn `adaptive` on, which scales by the squared gradient in the place of ASAM's squared weight; that is not here.
    """

    name: ClassVar[str] = "sam"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "flatter minima: gradients taken uphill of the weights, by the previous gradient (S2-SAM)"
    paper: ClassVar[str] = "OpenReview MJgMMqMDu4"
    depth: ClassVar[int] = 0  # everybody else sees w_t

    schedule: Schedule = field(default_factory=lambda: Schedule("step", end="100%"))
    rho: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.rho < float("inf"):
            raise SettingError(f"rho came as {self.rho}", allowed="a number > 0", fix="0.05 is the paper's")

    def attach(self, context: Context) -> Attached:
        optimizer = context.needs_optimizer(self.name)
        if context.mask is not None and held(optimizer) is None:
            raise TechniqueError(
                f"{self.name} got a mask that nobody holds: gradients at pruned weights would bring them back",
                allowed="a mask that is held, whose gradients are 0 where it prunes",
                fix="call anymask.hold(mask, model, optimizer) before Recipe.attach",
            )
        here = trained(optimizer)
        parameters = {name: p for name, p in context.model.named_parameters() if id(p) in here}
        if not parameters:
            raise self.nothing("parameters that the optimiser trains", context.model, fix="make the optimiser from this model's parameters")
        return _Perturbing(parameters, optimizer, rho=float(self.rho))


class _Perturbing(Attached):
    """Weights are perturbed exactly where the optimiser has a slot with what they were."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, *, rho: float) -> None:
        self.found = f"{len(parameters)} parameters"
        self._parameters, self._optimizer, self._rho, self._strength = parameters, optimizer, rho, 1.0
        self._aside: dict[str, Tensor] = {}  # the perturbed weights, while the plain ones are evaluated

    def set_strength(self, strength: float) -> None:
        self._strength = strength
        if strength == 0:
            self._come_back()

    def before_update(self) -> None:
        self._come_back()

    @torch.no_grad()
    def after_update(self) -> None:
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        gradients = {name: g.to_dense() if g.is_sparse else g for name, g in gradients.items()}
        if self._strength == 0 or not gradients:
            return
        norm: Any = nn.utils.get_total_norm(gradients.values())
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model: over all ranks
        # A fused optimiser is called for steps that GradScaler skips, with infinite gradients. Tensors, so that nothing waits for a GPU.
        usable, scale = norm.isfinite() & (norm > 0), self._rho * self._strength / norm
        uphill = {id(p) for group in self._optimizer.param_groups if group.get("maximize") for p in group["params"]}
        for name, gradient in gradients.items():
            parameter = self._parameters[name]
            self._optimizer.state[parameter][_SLOT] = parameter.detach().clone()
            here = local(parameter)
            towards = -scale if id(parameter) in uphill else scale  # against the optimiser, where it goes uphill itself
            moved = here + local(gradient) * towards.to(here.device)
            here.copy_(torch.where(usable.to(here.device), moved, here))

    @torch.no_grad()
    def settle(self) -> None:
        self._aside = {name: p.detach().clone() for name, p in self._parameters.items() if _SLOT in self._optimizer.state.get(p, {})}
        for name in self._aside:
            parameter = self._parameters[name]
            parameter.copy_(self._optimizer.state[parameter][_SLOT])

    def unsettle(self) -> None:
        self._write(self._aside)
        self._aside = {}

    def state_dict(self) -> dict[str, Any]:
        return {"perturbed": dict(self._aside)} if self._aside else {}  # else they are the model's own state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._write(state["perturbed"])

    def detach(self) -> None:
        self._come_back()

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            self._parameters[name].copy_(value)

    @torch.no_grad()
    def _come_back(self) -> None:
        """The weights as they were before they were perturbed, where they are; the optimiser never meets the slot in its own step."""
        self._aside = {}
        for parameter in self._parameters.values():
            slots = self._optimizer.state.get(parameter, {})
            if _SLOT in slots:
                parameter.copy_(slots.pop(_SLOT))
                if not slots:
                    del self._optimizer.state[parameter]
