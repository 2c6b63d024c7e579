"""Criteria: each gives every weight a score, higher = keep.

`criterion(model, weights, batches) -> scores`, name -> tensor in the weight's shape. `model` is a copy that the criterion
may change at will and that holds the weights as masked so far; `weights` are the ones to score, as they are in the
caller's model. Scores are compared with each other only, so factors that all of them share are left out.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from anymask.errors import MaskError, TechniqueError
from anymask.pruning.batches import Batches
from anymask.pruning.select import wide
from anymask.surgery import check_targets, device_of, logits_of, run, twice_differentiable, uncapped

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

    L is the mean of the batches' losses, in train mode (batch norm uses the batch); the authors' code scores in eval mode.

    Iterative SNIP and FORCE (de Jorge et al. 2021, arXiv 2006.09081) are this score in rounds: g is the gradient of the network as
    masked so far; in FORCE w is the dense weight, so that a pruned one may return. Under batch norm 60 rounds make much of little: in
    float32 another device, memory layout or version of PyTorch may give a largely different mask of the same seed. Carry the mask as a
    file.

    Differs from the paper: not divided by the sum of all scores, which changes no ranking. In rounds: the same batches each time,
    where the authors' code draws new ones.
    """
    total = _zeros(weights)
    for gradients in _batch_gradients(model, weights, batches):
        for name, g in gradients.items():
            total[name] += wide(g)
    return {name: (wide(weight) * total[name]).abs_() for name, weight in weights.items()}


def taylor(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """score = sum over batches b of (w * g_b)^2, g_b = dL_b/dw: the squared change of each batch's loss to first order.

    Molchanov et al. 2019, arXiv 1906.10771, eq. 8. SNIP is |w * mean of g_b|: with one batch the two rank alike; with more, a
    weight whose gradient changes sign from batch to batch counts here and cancels there. In train mode, as snip.

    Differs from the paper: of a unit (pattern "channel" or a block) the scores are averaged, as in the authors' code
    (NVlabs/Taylor_pruning, method 0) up to the unit's size; not averaged over the epochs of a training.
    """
    total = _zeros(weights)
    for gradients in _batch_gradients(model, weights, batches):
        for name, g in gradients.items():
            total[name] += (wide(g) * wide(weights[name])).square_()
    return total


def wanda(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """score = |w_ij| * ||x_j||_2, x_j the j-th input over all samples (and tokens) (Sun et al. 2023, arXiv 2306.11695).

    A convolution is taken as the linear layer on patches that it is: x_j are the values that meet the weight. ||x_j||^2 is the
    gradient of sum(f(x^2)) to the weight of the layer f, whatever its stride, padding or groups. Eval mode.

    Differs from the paper: all layers see the activations of the network as masked so far (in one round: the dense one), where the
    paper prunes block after block and passes on the activations of the pruned ones.

    Raises:
        MaskError: for a weight that a hook computes, or whose module is never called, as a projection that an attention uses by itself.
    """
    model.eval()
    wanted = _wanted(model, weights)
    name_of = {id(parameter): name for name, parameter in wanted.items()}
    squares, seen = _zeros(weights), set()
    calls: list[tuple[str, nn.Module, Tensor]] = []
    for module in model.modules():
        if (name := name_of.get(id(getattr(module, "weight", None)))) is not None:
            note = partial(_note_input, calls, name)
            module.register_forward_pre_hook(note, with_kwargs=True)
    for x, _ in batches.pairs:
        with torch.no_grad():
            run(model, x)
        inputs = list(calls)
        for name, module, value in inputs:
            squares[name] += _squared_inputs(module, value)
            seen.add(name)
        calls.clear()  # those of _squared_inputs, too
    if unseen := [name for name in weights if name not in seen]:
        raise MaskError(
            f"wanda saw no input of {', '.join(unseen)}",
            allowed="weights of modules that the model calls, and not those that a hook computes (torch.nn.utils.prune, weight_norm)",
            fix=f"leave them dense: exclude={unseen}",
        )
    return {name: wide(weight).abs().mul_(squares[name].sqrt_()) for name, weight in weights.items()}


def grasp(model: nn.Module, weights: Weights, batches: Batches) -> dict[str, Tensor]:
    """score = w * (H g), g and H the gradient and Hessian of the loss (Wang et al. 2020, arXiv 2002.07376).

    The paper's S(-w) = -w * (H g) is, up to a factor, the change of the gradient flow g'g when the weight is removed; it
    removes the weights with the *highest* S, which hurt the flow least. Higher = keep, hence the sign turned.

    H g is the gradient of (stopped g)' g(w), one batch at a time, so that one batch's graph is in memory. As in the
    authors' code: train mode (batch norm uses the batch), the outputs divided by a temperature of 200, only the scored
    weights are variables. A model of narrower numbers is scored in float32: float16 does not hold such products.

    Differs from the paper: any bounded number of batches instead of 10 images of each class; not divided by the sum.

    Raises:
        TechniqueError: for a model that cannot be differentiated twice.
    """
    model.train()
    pairs = batches.pairs
    if any(p.is_floating_point() and p.itemsize < 4 for p in model.parameters()):
        model.float()
        pairs = [tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, pair) for pair in pairs]
    wanted = _wanted(model, weights)

    def gradients(x: Tensor, y: Tensor, *, graph: bool) -> tuple[Tensor, ...]:
        return _gradients(_loss(model, batches, x, y, temperature=GRASP_TEMPERATURE), wanted, graph=graph)

    stopped = [torch.zeros_like(weight) for weight in wanted.values()]
    product = _zeros(weights)
    with twice_differentiable(model, fix="take another method, such as snip"):
        for x, y in pairs:
            stopped = [s + g for s, g in zip(stopped, gradients(x, y, graph=False), strict=True)]
        for x, y in pairs:
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
    Group and layer norm are run as they are: with them the flow is no sum over paths. ReLU6 is run as ReLU: inputs of ones through
    absolute weights end above 6 in every layer, where it passes nothing on. Other activations that saturate (sigmoid, tanh) are run as they
    are.

    Raises:
        TechniqueError: for a model that cannot compute such an input.
        MaskError: for a flow that is not finite.
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
    ones = torch.ones(1, *(batches.shape or ()), dtype=torch.float64, device=device_of(model))
    try:
        with uncapped():
            given = model(ones)
    except (RuntimeError, TypeError, IndexError) as error:  # such as an embedding's, which wants token ids
        raise TechniqueError(
            f"{type(model).__name__} fails on the input of synflow, {tuple(ones.shape)} of ones in float64 ({str(error).splitlines()[0]})",
            allowed="a model of numbers of any type, in a batch of one",
            fix="take another method, such as snip or magnitude",
        ) from error
    flow = logits_of(given).sum()
    if flow.item() == 0:  # every path is cut: no weight matters
        return _zeros(weights)
    if not math.isfinite(flow.item()):
        raise MaskError(
            f"the flow of synflow came as {flow.item()}",
            allowed=f"a number that float64 holds, below {sys.float_info.max:.0e}",
            fix="look for NaN, inf or very large numbers in the model; scale its weights down",
        )
    grads = _gradients(flow / flow.detach(), wanted)
    return {name: wide(weights[name]).abs() * wide(g) for name, g in zip(wanted, grads, strict=True)}


def _note_input(calls: list[tuple[str, nn.Module, Tensor]], name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    value = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(value, Tensor) and value.is_floating_point():  # the numbers of words are nothing to weigh
        calls.append((name, module, value.detach()))


def _squared_inputs(module: nn.Module, value: Tensor) -> Tensor:
    """For each weight of `module` the sum of the squares of all that it is multiplied with, in the weight's shape."""
    dtype = torch.promote_types(value.dtype, torch.float32)  # squares leave the range of float16 at 256
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters(recurse=False)}
    flow = functional_call(module, parameters, (value.to(dtype).square(),)).sum()
    return wide(torch.autograd.grad(flow, parameters["weight"])[0])


def _zeros(weights: Weights) -> dict[str, Tensor]:
    return {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}


def _batch_gradients(model: nn.Module, weights: Weights, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """For each batch the gradients of its loss in train mode."""
    model.train()
    wanted = _wanted(model, weights)
    for x, y in batches.pairs:
        yield dict(zip(wanted, _gradients(_loss(model, batches, x, y), wanted), strict=True))


def _loss(model: nn.Module, batches: Batches, x: Any, y: Any, *, temperature: float = 1) -> Tensor:
    logits = logits_of(run(model, x)) / temperature
    check_targets(batches.loss, logits, y)
    return batches.loss(logits, y)


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
