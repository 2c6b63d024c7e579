"""HAM: after each step of the optimiser, one that multiplies: towards larger weights where the gradient asks for it, else smaller."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.errors import SettingError
from anymask.mask import local
from anymask.schedules import Schedule
from anymask.techniques.base import Attached, Context, Technique

CLIP = 5.0  # of the exponent, as in the authors' code: one step changes a weight by a factor in [0.0067, 148]


@dataclass(frozen=True)
class HAM(Technique):
    r"""After each step of the optimiser, each weight w of the mask is multiplied once more:

        w <- w * exp(clip(s * lr * (-alpha * sign(w) * g - beta), -5, 5))

    with the gradient g of that step (as the optimiser saw it: clipped, preconditioned), the learning rate lr that its group has at that
    step, and the strength s (constant 1 by default). The sign is that of the weight after the optimiser's step. Zeros stay zeros, and no
    sign changes here: signs change in the optimiser's step, which meets small weights more often. Biases, norms and weights that
    the mask leaves out are untouched. Nothing is stored.

    `alpha * lr * |g|` is what a weight grows or shrinks by, so the published alpha belongs to gradients that are small
    (ImageNet-sized networks, |g| around 1e-4). On small networks gradients are larger, and alpha = 200 is often too much: take 1 to 20.

    Args:
        alpha: how much the gradient counts, >= 0.
        beta: what every weight shrinks by, times lr, >= 0.

    Raises:
        SettingError: for a value out of its range.
        TechniqueError: on attach, when there is no mask, or the optimiser trains nothing of it.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> held = anymask.hold(anymask.Mask({"weight": torch.tensor([[True, False]])}), model, optimizer)
        >>> running = anymask.Recipe((HAM(alpha=2.0, beta=0.0),)).attach(model, optimizer, total_steps=1, loss=lambda out, _: out.sum())
        >>> running.loss(model(torch.ones(1, 2)), None).backward(); optimizer.step()
        >>> [round(w, 4) for w in model.weight[0].tolist()]  # (1 - 0.1) * exp(-0.2)
        [0.7369, 0.0]

    Reference: HAM (arXiv 2506.02630), whose alpha = 200, beta = 1e-3 and clip these are (github.com/TomJacobs05/HAM). Differs from the
    authors' code: that takes every parameter of two or more dimensions, this one those of the mask; and it bounds the norms of
    weights (1000) and gradients (20) besides, which here is left to the training.
    """

    name: ClassVar[str] = "ham"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "after each step, masked weights times exp(lr * (-alpha * sign(w) * g - beta))"
    paper: ClassVar[str] = "arXiv 2506.02630"
    depth: ClassVar[int] = 2  # its own step, which density_lr does not scale

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    alpha: float = 200.0
    beta: float = 1e-3

    def __post_init__(self) -> None:
        for name, usual in (("alpha", 200.0), ("beta", 1e-3)):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise SettingError(f"{name} came as {value}", allowed="a finite number >= 0", fix=f"{usual:g} is the paper's")
        if self.alpha == self.beta == 0:
            raise SettingError("alpha and beta came as 0", allowed="one of them > 0", fix="leave ham out of the recipe")

    def attach(self, context: Context) -> "_Ham":
        return _Ham(self, context.needs_optimizer(self.name), context.masked_weights(self.name))


class _Ham(Attached):
    def __init__(self, settings: HAM, optimizer: Optimizer, weights: dict[str, nn.Parameter]) -> None:
        self.settings, self.optimizer = settings, optimizer
        self._weights = {id(parameter) for parameter in weights.values()}
        self.found = f"{len(weights)} masked weights, alpha {settings.alpha:g}, beta {settings.beta:g}"

    @torch.no_grad()
    def after_update(self) -> None:
        if self.strength == 0:
            return
        skipped = getattr(self.optimizer, "found_inf", None)  # set by GradScaler for fused optimisers, which then make no step
        for group in self.optimizer.param_groups:
            alpha = -self.settings.alpha if group.get("maximize") else self.settings.alpha  # then the optimiser goes uphill
            for parameter in group["params"]:
                if id(parameter) in self._weights and parameter.grad is not None:
                    self._multiply(local(parameter), _dense(parameter.grad), alpha=alpha, lr=group["lr"], skipped=skipped)

    def _multiply(self, weight: Tensor, gradient: Tensor, *, alpha: float, lr: float | Tensor, skipped: Tensor | None) -> None:
        exponent = torch.sign(weight).mul_(gradient).mul_(-alpha).sub_(self.settings.beta)
        exponent = exponent.mul_(self.strength).mul_(lr).clamp_(-CLIP, CLIP)
        if skipped is not None:
            exponent = torch.where(skipped.to(exponent.device) > 0, 0.0, exponent)
        weight.mul_(exponent.exp_())


def _dense(gradient: Tensor) -> Tensor:
    return local(gradient.to_dense() if gradient.is_sparse else gradient)  # rows of an embedding with sparse=True
