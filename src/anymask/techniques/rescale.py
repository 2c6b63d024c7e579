"""LRsI: before training, learn one scale for each parameter tensor of the masked network.

Of the two batches of an iteration, B1 is one of those given; B2, as large, has the first half of it (`overlap`) and the
first half of the batch that follows. A lone batch is cut in halves, which are then two batches. Batches of one size
(`drop_last=True`) keep B2 large.

While the scales are learned, batch and instance norms use the statistics of the batch and track nothing; every other
module is in eval mode, so there is no dropout. Buffers, modes, `.grad` and torch's global generators (CPU, CUDA) are as
before at the end; so are the parameters, the same objects, until the one multiplication in place.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from anymask.errors import SettingError, TechniqueError
from anymask.mask import Mask
from anymask.pauses import pause
from anymask.prunables import bare
from anymask.ranks import from_rank
from anymask.sparse import as_dense
from anymask.surgery import check_targets, logits_of, needs_whole, twice_differentiable
from anymask.techniques.batches import Batch, pairs

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RescaleSettings:
    """How the scales are learned; the defaults are those of the ToST authors' code.

    Args:
        iterations: steps of the rescaler, >= 1.
        eta: length of the look-ahead step, > 0. That step is SGD's, the one algorithm there is here.
        gamma: bound of the gradient norm, > 0; `float("inf")` for none.
        lr: learning rate of the rescaler (Adam), > 0.
        min_weight_scale: least scale of a weight, in [0, 1].
        min_bias_scale: least scale of a bias, in [0, 1].
        clip: bound of the absolute gradient of each scale, > 0.
        overlap: share of the look-ahead images that the gradient has seen too, in [0, 1].

    Raises:
        SettingError: for a value out of its range.

    Example:
        >>> RescaleSettings(iterations=90).eta
        0.1
    """

    iterations: int = 180
    eta: float = 0.1
    gamma: float = 1.0
    lr: float = 1e-2
    min_weight_scale: float = 0.01
    min_bias_scale: float = 0.0
    clip: float = 1.0
    overlap: float = 0.5

    def __post_init__(self) -> None:
        self._require("iterations", lambda v: isinstance(v, int) and v >= 1, "an integer >= 1")
        for name in ("eta", "lr", "clip"):
            self._require(name, lambda v: 0 < v < float("inf"), "a finite number > 0")
        self._require("gamma", lambda v: v > 0, "a number > 0, or inf for no bound")
        for name in ("min_weight_scale", "min_bias_scale", "overlap"):
            self._require(name, lambda v: 0 <= v <= 1, "a number in [0, 1]")

    def _require(self, name: str, right: Callable[[float], bool], allowed: str) -> None:
        value = getattr(self, name)
        if not (isinstance(value, (int, float)) and right(value)):
            usual = type(self).__dataclass_fields__[name].default
            raise SettingError(f"{name} came as {value!r}", allowed=allowed, fix=f"leave it at the authors' {usual}, or give such a number")


@dataclass(frozen=True)
class Rescaled:
    """What `rescale` did.

    Args:
        scales: the factor of each parameter tensor, by parameter name.
        norms: norm of the masked gradient at each iteration, before its step.
    """

    scales: dict[str, float]
    norms: tuple[float, ...]


_DEFAULTS = RescaleSettings()


def rescale(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    mask: Mask | None = None,
    loss: Loss = F.cross_entropy,
    settings: RescaleSettings = _DEFAULTS,
) -> Rescaled:
    """Multiply each parameter tensor of `model` by a scale, learned so that the first step of training helps most.

    With theta_s the masked parameters, each times its scale, and g the masked gradient of the loss at theta_s on batch B1:

        minimise over s >= s_min   L(B2; theta_s - eta * g / ||g||) / eta    subject to   ||g|| <= gamma

    where the step (eta * g / ||g||) counts as a constant. An iteration steps ||g|| itself while it is over gamma, else
    the objective; Adam keeps separate moments for the two. s_min is `min_bias_scale` for a parameter with "bias" in the
    last part of its name and `min_weight_scale` for any other; every parameter that requires a gradient has one scale,
    tied weights one together. A parameter that is all zeros (biases of a fresh batch norm) moves in the look-ahead
    step, but its scale stays at 1. Pruned weights are 0 afterwards.

    Args:
        model: gives the output that `loss` takes (or one with `logits`, or a tuple that begins with them) from the inputs
            alone; twice differentiable where the norm is over gamma.
        batches: (inputs, targets) pairs on any device, in a list or a loader; gone round again as often as `iterations`
            needs. Inputs are a tensor, a tuple of positional inputs or a mapping of keyword inputs. The first dimension is
            the sample; tensors of another length and values of other types are passed on as they are.
        mask: the pruned network to fit the scales to; None = nothing is pruned.
        loss: `loss(output, targets)`, a scalar, a mean over the batch.
        settings: see `RescaleSettings`.

    On several ranks of torch.distributed each has to call this, and the scales of rank 0 are used.

    Raises:
        MaskError: when the mask does not fit the model.
        TechniqueError: when no parameter requires a gradient, batches run out or cannot be joined, a loss, norm or scale
            is not finite, or no scale moved. The model is then as before.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(4)]
        >>> done = rescale(net, batches, settings=RescaleSettings(iterations=5))
        >>> len(done.norms), list(done.scales)
        (5, ['0.weight', '0.bias', '2.weight', '2.bias'])

    Paper: Training Your Sparse Neural Network Better with Any Mask (arXiv 2206.12755); GradInit (arXiv 2102.08098).

    Differs from the paper: ToST's code learns the scales on the dense network; here pruned weights are 0 in the network,
    in the step and in the norm. GradInit's batches are two loader batches joined, B1 = b1 + b2, B2 = b1 + b3; here they
    are half as large. Its code never moves a bias again that has reached 0.
    """
    model = bare(model)
    fix = "call anymask.techniques.rescale.rescale(model, batches, mask=mask) before fully_shard, and leave lrsi out of the recipe"
    needs_whole(model.parameters(), f"rescale on {type(model).__name__}", fix=fix)
    with as_dense(model):  # sparse layers have no second derivatives
        done = from_rank(_learn(_Network(model, loss, mask), batches, settings))  # each rank has other batches; all need the same scales
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, scale in done.scales.items():
            parameters[name].mul_(scale)
    if mask is not None:
        mask.apply(model)
    return done


class _Network:
    """The masked network as a function of its scales; nothing in `model` changes."""

    def __init__(self, model: nn.Module, loss: Loss, mask: Mask | None) -> None:
        self.model, self.loss = model, loss
        kept = {} if mask is None else mask.by_parameter(model)
        pruned = {id(p): ~kept[id(p)].to(p.device) for p in model.parameters() if id(p) in kept}
        start = {n: p.detach().masked_fill(pruned[id(p)], 0) if id(p) in pruned else p.detach() for n, p in model.named_parameters()}
        free = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not free:
            raise TechniqueError(
                f"{type(model).__name__} has no parameter that requires a gradient",
                allowed="a model with parameters to scale",
                fix="leave rescaling out, or set requires_grad",
            )
        self.start = {n: value for n, value in start.items() if n in free}
        self.frozen = {n: value for n, value in start.items() if n not in free}
        self.pruned = {n: pruned[id(p)] for n, p in free.items() if id(p) in pruned}

    @property
    def device(self) -> torch.device:
        return next(iter(self.start.values())).device

    def first_scales(self) -> Tensor:
        """Ones, (number of tensors,), at least float32: steps of 0.01 around 1 are below bfloat16."""
        dtype = torch.promote_types(next(iter(self.start.values())).dtype, torch.float32)
        return torch.ones(len(self.start), dtype=dtype, device=self.device, requires_grad=True)

    def lower(self, scales: Tensor, settings: RescaleSettings) -> Tensor:
        """The least scale of each tensor."""
        bias = ["bias" in name.rpartition(".")[2] for name in self.start]
        return scales.new_tensor([settings.min_bias_scale if b else settings.min_weight_scale for b in bias])

    def at(self, scales: Tensor) -> dict[str, Tensor]:
        """Each tensor times its scale; differentiable in `scales`."""
        return {name: scale * value for (name, value), scale in zip(self.start.items(), scales.unbind(), strict=True)}

    def loss_at(self, weights: dict[str, Tensor], batch: Batch) -> Tensor:
        """Loss of `batch` with `weights` for the parameters."""
        inputs, targets = (tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, part) for part in batch)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}  # batch norm writes into these, in place
        logits = logits_of(functional_call(self.model, {**self.frozen, **buffers, **weights}, args, kwargs))
        check_targets(self.loss, logits, targets)
        return self.loss(logits, targets)

    def gradient(self, weights: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss of `batch`, its masked gradient, and that gradient's norm; all differentiable."""
        loss = self.loss_at(weights, batch)
        dense = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
        found = {n: g.masked_fill(self.pruned[n], 0) if n in self.pruned else g for n, g in zip(weights, dense, strict=True)}
        return loss, found, torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()


def _learn(network: _Network, batches: Iterable[Batch], settings: RescaleSettings) -> Rescaled:
    scales = network.first_scales()
    lower = network.lower(scales, settings)
    adam = {over: torch.optim.Adam([scales], lr=settings.lr) for over in (False, True)}  # as in GradInit, apart
    norms = []
    with _measuring(network.model, network.device):
        for now, ahead in islice(pairs(batches, settings.overlap), settings.iterations):
            # Not around `pause`: it switches fused attention off for the whole process.
            with twice_differentiable(network.model, fix="leave lrsi out of the recipe"):
                norm, scales.grad = _direction(network, scales, now, ahead, settings)
            norms.append(norm)
            adam[norm > settings.gamma].step()
            with torch.no_grad():
                scales.clamp_(min=lower)
            pause()  # an iteration costs as much as 2 to 7 steps that are not recorded
    _check(scales)
    return Rescaled(dict(zip(network.start, scales.tolist(), strict=True)), tuple(norms))


def _direction(network: _Network, scales: Tensor, now: Batch, ahead: Batch, settings: RescaleSettings) -> tuple[float, Tensor]:
    """The gradient norm on `now`, and the clipped gradient of what to step: the norm if over gamma, else the objective."""
    weights = network.at(scales)
    loss, gradient, norm = network.gradient(weights, now)
    seen, size = torch.stack([loss, norm]).tolist()  # one wait for the device
    if not (isfinite(seen) and isfinite(size)):
        raise _not_finite(f"loss {seen} with gradient norm {size}")
    goal = norm
    if size <= settings.gamma:
        unit = norm.detach().clamp_min(torch.finfo(norm.dtype).tiny)
        goal = network.loss_at({n: w - settings.eta * (gradient[n].detach() / unit) for n, w in weights.items()}, ahead) / settings.eta
    (slope,) = torch.autograd.grad(goal, scales)
    return size, slope.clamp(-settings.clip, settings.clip)


@contextmanager
def _measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Norms on batch statistics, all else in eval mode, gradients on, the global generators given back as they were."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:  # not .eval(): a model may override it
            module.training = isinstance(module, _NormBase)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check(scales: Tensor) -> None:
    if not bool(scales.isfinite().all()):
        raise _not_finite("a scale that is not finite")
    if bool((scales == 1).all()):
        raise TechniqueError(
            "no scale moved: the loss does not depend on any parameter's size",
            allowed="a network whose loss has a gradient",
            fix="check that the mask leaves a path from input to output (mask.collapsed())",
        )


def _not_finite(what: str) -> TechniqueError:
    return TechniqueError(
        f"rescaling came to {what}",
        allowed="finite values throughout",
        fix="check the inputs for NaN, and lower lr or eta of RescaleSettings",
    )
