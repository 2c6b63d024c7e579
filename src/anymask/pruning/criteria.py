"""Criteria: each gives every weight a score, higher = keep.

`criterion(model, weights, batches) -> scores`, name -> tensor in the weight's shape. `model` is a copy that the criterion
may change at will and that holds the weights as masked so far; `weights` are the ones to score, as they are in the
caller's model. Scores are compared with each other only, so factors that all of them share are left out.
"""

import math
import sys
from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from anymask.errors import MaskError
from anymask.pruning.batches import Batches, device_of
from anymask.pruning.select import wide

Weights = Mapping[str, Tensor]
Criterion = Callable[[nn.Module, Weights, Batches], dict[str, Tensor]]

GRASP_TEMPERATURE = 200.0  # of the authors' code, github.com/alecwangcq/GraSP; the paper does not give it


def random(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """score ~ U(0, 1), drawn on the CPU, hence the same on every device."""
    return {name: torch.rand(weight.shape, generator=batches.generator, dtype=torch.float64) for name, weight in weights.items()}


def magnitude(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """score = |w| (Han et al. 2015, arXiv 1506.02626)."""
    return {name: wide(weight).abs() for name, weight in weights.items()}


def snip(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """score = |w * g| with g = dL/dw: how much the loss changes as the weight goes (Lee et al. 2019, arXiv 1810.02340).

    L is the mean of the batches' losses, in train mode (batch norm uses the batch), as in the authors' code.

    Differs from the paper: not divided by the sum of all scores, which changes no ranking.
    """
    model.train()
    wanted = _wanted(model, weights)
    total = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    for x, y in batches.pairs:
        for name, g in zip(wanted, _gradients(batches.loss(model(x), y), wanted), strict=True):
            total[name] += wide(g)
    return {name: (wide(weight) * total[name]).abs() for name, weight in weights.items()}


def grasp(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """score = w * (H g), g and H the gradient and Hessian of the loss (Wang et al. 2020, arXiv 2002.07376).

    The paper's S(-w) = -w * (H g) is, up to a factor, the change of the gradient flow g'g when the weight is removed; it
    removes the weights with the *highest* S, which hurt the flow least. Higher = keep, hence the sign turned.

    H g is the gradient of (stopped g)' g(w), one batch at a time, so that one batch's graph is in memory. As in the
    authors' code: train mode (batch norm uses the batch), the outputs divided by a temperature of 200, only the scored
    weights are variables.

    Differs from the paper: any bounded number of batches instead of 10 images of each class; not divided by the sum.
    """
    model.train()
    wanted = _wanted(model, weights)

    def gradients(x: Tensor, y: Tensor, *, graph: bool) -> tuple[Tensor, ...]:
        return _gradients(batches.loss(model(x) / GRASP_TEMPERATURE, y), wanted, graph=graph)

    stopped = [torch.zeros_like(weight) for weight in wanted.values()]
    for x, y in batches.pairs:
        stopped = [s + g for s, g in zip(stopped, gradients(x, y, graph=False), strict=True)]
    product = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    for x, y in batches.pairs:
        flow = sum(((s * g).sum() for s, g in zip(stopped, gradients(x, y, graph=True), strict=True)), start=torch.zeros(()))
        for name, hg in zip(wanted, _gradients(flow, wanted), strict=True):
            product[name] += wide(hg)
    return {name: wide(weight) * product[name] for name, weight in weights.items()}


def synflow(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """score = |w| * dR/d|w| / R with R = 1' f(1; |theta|): the share of all flow that runs through the weight, in [0, 1].

    f(1; |theta|) is the network on an input of ones, with every parameter and buffer in absolute value, in eval mode and
    float64 (Tanaka et al. 2020, arXiv 2006.05467). Divided by R as the gradient starts (at 1/R instead of 1), the scores
    are at most 1 however deep the network; the ranking is the same. R itself grows to about 1e130 for a ResNet-104,
    which float64 (1e308) holds and float32 (1e38) does not; should R leave that range, the scores are refused.

    Differs from the paper: the statistics of batch norm are set to mean 0, variance 1, which is what they are before
    training, where the two agree; the paper's code takes |mean| off, so that a trained network's flow may turn negative.
    Group and layer norm are run as they are: with them the flow is no sum over paths.
    """
    model.double().eval()
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.zero_()
            var.fill_(1)
    wanted = _wanted(model, weights)
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    flow = model(torch.ones(1, *(batches.shape or ()), dtype=torch.float64, device=device_of(model))).sum()
    if flow.item() == 0:  # every path is cut: no weight matters
        return {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    if not math.isfinite(flow.item()):
        raise MaskError(
            f"the flow of synflow came as {flow.item()}",
            allowed=f"a number that float64 holds, below {sys.float_info.max:.0e}",
            fix="look for NaN, inf or very large numbers in the model; scale its weights down",
        )
    grads = _gradients(flow / flow.detach(), wanted)
    return {name: wide(weights[name]).abs() * wide(g) for name, g in zip(wanted, grads, strict=True)}


def _wanted(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """The model's own parameters of these names, in this order, and only they ask for gradients."""
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    return {name: parameters[name].requires_grad_() for name in weights}


def _gradients(value: Tensor, wanted: Mapping[str, Tensor], *, graph: bool = False) -> tuple[Tensor, ...]:
    """d value / d wanted, 0 where `value` does not depend on it."""
    inputs = list(wanted.values())
    if not value.requires_grad:  # such as H g of a loss that is linear in the weights
        return tuple(torch.zeros_like(w) for w in inputs)
    return torch.autograd.grad(value, inputs, create_graph=graph, allow_unused=True, materialize_grads=True)
