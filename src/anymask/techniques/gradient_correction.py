"""Gradient correction: what batch norm makes larger in sparse neurons is made smaller again before the optimiser's step."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from anymask.dataflow import before_norms
from anymask.holding import held
from anymask.mask import Mask, local, shard
from anymask.prunables import compact, transposed_groups
from anymask.registry import lookup
from anymask.schedules import Schedule
from anymask.techniques.base import Attached, Context, Technique

WHERE = ("norm", "all")


@dataclass(frozen=True)
class GradientCorrection(Technique):
    r"""Before each step of the optimiser, the gradient of the incoming weights of each neuron i of a masked layer is multiplied by

        (sqrt(1 - s_i) / sqrt(1 - s_avg)) ** strength

    with s_i the sparsity of that neuron (a row of a linear layer, a filter of a convolution) and s_avg the mean of the s_i of
    its layer. Behind a batch norm a neuron of sparsity s_i gets gradients (1 - s_i) ** -0.5 times as large as a dense one; this
    takes it back, and the second root keeps the size of the layer's gradient. A layer whose neurons all keep equally many weights
    (N:M, constant fan-in) is not changed. A mask that moves is noticed at the next step.

    A neuron that keeps no weight has no gradient, and is left out of s_avg: it has no share in the size of the gradient.

    The gradients are changed in place, so whoever looks at `.grad` after the step sees corrected ones. `rewire` does not: it
    ranks by what backward gave.

    Args:
        where: "norm", the masked layers whose output goes to a batch or instance norm and nowhere else; or "all" masked weights.
            Layer, group and RMS norms divide the neurons of a sample by one number, so no neuron gains on another there.
            Weights of one dimension are never corrected.

    Raises:
        TechniqueError: on attach, when there is no mask, no example for "norm", or nothing that is followed by such a norm.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.BatchNorm1d(2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mask = anymask.Mask({"0.weight": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])})
        >>> held, recipe = anymask.hold(mask, model, optimizer), anymask.Recipe((GradientCorrection(),))
        >>> recipe.attach(model, optimizer, total_steps=1, example=torch.ones(2, 4)).found["gradient_correction"]
        '1 of 1 masked weights, gradients times 0.632 to 1.26'

    Reference: SparseOpt (arXiv 2605.27541). Ours: what is done with neurons without weights, the strength, and to leave
    other norms than batch and instance norm alone (the paper is about batch norm).
    """

    name: ClassVar[str] = "gradient_correction"
    seam: ClassVar[str] = "step"
    about: ClassVar[str] = "gradients of each neuron times sqrt(1 - s_i) / sqrt(1 - s_avg), against batch norm's skew"
    paper: ClassVar[str] = "arXiv 2605.27541"

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    where: str = "norm"

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(WHERE), self.where, what="place of gradient correction")

    def attach(self, context: Context) -> "_Correction":
        mask = context.needs_mask(self.name)
        weights = {name: p for name, p in context.masked_weights(self.name).items() if mask[name].ndim > 1}
        total = len(weights)
        if self.where == "norm":
            pairs = before_norms(context.model, context.needs_example(self.name))
            normed = {id(layer.weight) for layer, norm in pairs if isinstance(norm, _NormBase)}
            weights = {name: p for name, p in weights.items() if id(p) in normed}
        if not weights:
            raise self.nothing("a masked layer whose output goes to a batch norm", context.model, fix='try where="all"')
        return _Correction(context, weights, total=total)


class _Correction(Attached):
    def __init__(self, context: Context, weights: dict[str, nn.Parameter], *, total: int) -> None:
        self.context, self.weights = context, weights
        self._of: Mask | None = None  # the mask that the factors are made of
        self._made: dict[str, tuple[Any, Tensor]] = {}
        factors = [self._factor(name, parameter) for name, parameter in weights.items()]
        least, most = min(float(f.min()) for f in factors), max(float(f.max()) for f in factors)
        self.found = f"{len(weights)} of {total} masked weights, gradients times {least:.3g} to {most:.3g}"

    @torch.no_grad()
    def before_update(self) -> None:
        if self.strength == 0:
            return
        for name, parameter in self.weights.items():
            if parameter.grad is not None:
                factor = self._factor(name, parameter)
                local(parameter.grad).mul_(factor if self.strength == 1 else factor**self.strength)

    def _factor(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The factors of a weight, new where the mask has moved or the weight was converted or moved to another device since."""
        mask = self._mask()
        if self._of is not mask:
            self._of, self._made = mask, {}
        key = (parameter.shape, parameter.device)
        if name not in self._made or self._made[name][0] != key:
            self._made[name] = key, self._make(mask[name], name, parameter)
        return self._made[name][1]

    def _mask(self) -> Mask:
        optimizer = self.context.needs_optimizer(GradientCorrection.name)
        hold = held(optimizer)
        return self.context.needs_mask(GradientCorrection.name) if hold is None else hold.mask

    def _make(self, kept: Tensor, name: str, parameter: nn.Parameter) -> Tensor:
        factor = neuron_factors(kept, groups=transposed_groups(self.context.model).get(name, 0))
        if (layer := compact(self.context.model).get(name)) is not None:
            factor = layer.collect(factor.expand(layer.dense_shape))
        elif hasattr(parameter, "to_local"):
            factor = shard(factor.expand(parameter.shape), parameter)
        return factor.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))


def neuron_factors(kept: Tensor, *, groups: int = 0) -> Tensor:
    """sqrt(1 - s_i) / sqrt(1 - s_avg) of the neurons of one weight, float64, in a shape that broadcasts to the weight's.

    Args:
        kept: True = kept, (outputs, inputs, *kernel); or (inputs, outputs / groups, *kernel) where `groups` is not 0.
        groups: of a transposed convolution (see `anymask.prunables.transposed_groups`); 0 for any other weight.

    Example:
        >>> neuron_factors(torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])).flatten().tolist()  # 1 and 1/4 of 5/8; none
        [1.2649110640673518, 0.6324555320336759, 1.0]
    """
    if groups:
        inputs = kept.unflatten(0, (groups, -1)).double()
        density = inputs.mean([d for d in range(inputs.ndim) if d not in {0, 2}], keepdim=True)
        density = density.expand(-1, inputs.shape[1], *density.shape[2:]).flatten(0, 1)
    else:
        density = kept.double().mean(list(range(1, kept.ndim)), keepdim=True)
    live = density > 0
    return torch.where(live, density / density[live].mean(), 1.0).sqrt()
