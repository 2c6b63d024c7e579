"""Why a training goes as it goes: a few numbers an epoch, of any loop; and how sharp the minimum is, when asked."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from anymask.errors import SettingError
from anymask.holding import evaluated, held
from anymask.interrupts import Mode
from anymask.mask import Mask
from anymask.prunables import bare, compact, prunable
from anymask.sparse.converting import as_dense
from anymask.surgery import evaluating, logits_of, run, twice_differentiable
from anymask.techniques.ghost_activation import relu_call


class Diagnostics:
    """Watches a training, and says once an epoch what became of its gradients, units, features and weights.

    The training is the same, bit for bit, with it and without: it draws no random number, and changes no weight, buffer or gradient.
    Its weights are those of the mask that `anymask.hold` keeps on `optimizer`, or all prunable ones where there is no hold. In the
    loop it costs a norm of each gradient at every step; the device is not waited for before `epoch`.

    Args:
        model: the one that is trained; its weights now are the start that distances and signs are measured from. May come within
            torch.compile or DistributedDataParallel, and may become sparse (`anymask.to_sparse`) or dense later.
        optimizer: the one that trains it, after `hold`.
        example: the probe batch, the same in every epoch: inputs (N, ...), a tuple of positional or a mapping of keyword inputs.

    Raises:
        SettingError: for a model cut by `fully_shard`, of whose weights each rank sees a part.

    Example:
        >>> import torch, anymask
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> hold = anymask.hold(anymask.prune(net, "magnitude", sparsity=0.5), net, optimizer)
        >>> watch = anymask.Diagnostics(net, optimizer, torch.randn(16, 4))
        >>> net(torch.randn(16, 4)).square().sum().backward(); optimizer.step()
        >>> found = watch.epoch()
        >>> list(found["gradient_norm"]), 1 <= found["effective_rank"] <= 8
        (['0.weight', '2.weight'], True)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, example: Any) -> None:
        self.model, self.example = bare(model), example
        self._hold = held(optimizer)
        self.weights = self._hold.parameters if self._hold is not None else prunable(self.model)
        if any(hasattr(weight, "to_local") for weight in self.weights.values()):
            raise SettingError(
                f"{type(self.model).__name__} is cut by fully_shard, and each rank has a part of its weights",
                allowed="a model that is whole on each rank, such as one within DistributedDataParallel",
                fix="watch the same training without fully_shard",
            )
        self._device = next(iter(self.weights.values())).device
        self._squares = torch.zeros(len(self.weights), device=self._device)  # both stay where they are, for steps that were recorded
        self._steps = torch.zeros(len(self.weights), device=self._device, dtype=torch.int32)
        self._start = {name: weight.clone() for name, weight in self._dense().items()}
        self._before = _signs(self._start)
        self._handle = optimizer.register_step_pre_hook(self._hear)

    def epoch(self) -> dict[str, Any]:
        """What there is to say at the end of an epoch, as plain values; None where there is nothing to measure, or it is not finite.

        Call it where the network is the plain one: inside `with recipe.plain():` while a recipe is attached.

        Returns:
            gradient_norm: of each layer, the root of the mean over the steps since the last call of ||g||^2, g being the gradient of its
                kept weights as the optimiser got it: accumulated, unscaled and clipped. Steps that overflowed are left out. Of LBFGS, which
                asks for several gradients in a step, it is the one that was there before.
            dead_relus: share of ReLU channels, of all ReLU calls of one pass, that are 0 for every input of the probe batch, at every
                place, in eval mode. Channels are dimension 1; the last one of (N, T, C) unless a Conv1d came before.
            effective_rank: `effective_rank` of what the last nn.Linear takes for the probe batch, in eval mode.
            sign_flips, sign_flips_from_start: share of kept weights whose sign is not that of the last call, or of the start. What is or
                was 0 has no sign, so a weight that a moving mask brought has flipped only when it changes sign afterwards.
            distance: of each layer, ||w - w0|| / ||w0||, with w0 at the start; distance_overall: the same of all of them together.
                What a moving mask took away counts as moved to 0.
        """
        dead, rank = self._probe()
        now = self._dense()
        signs, kept = _signs(now), self._kept()
        moved = {name: float(_norm(now[name] - start)) for name, start in self._start.items()}
        size = {name: float(_norm(start)) for name, start in self._start.items()}
        gradients = (self._squares / self._steps).sqrt().tolist()
        found = {
            "gradient_norm": dict(zip(self.weights, map(_finite, gradients), strict=True)),
            "dead_relus": dead,
            "effective_rank": rank,
            "sign_flips": _ratio(_flips(signs, self._before), kept),
            "sign_flips_from_start": _ratio(_flips(signs, _signs(self._start)), kept),
            "distance": {name: _ratio(moved[name], size[name]) for name in moved},
            "distance_overall": _ratio(math.hypot(*moved.values()), math.hypot(*size.values())),
        }
        self._before = signs
        self._squares.zero_()
        self._steps.zero_()
        return found

    def remove(self) -> None:
        """Hear of no more steps."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """What this knows of the training so far, so that it can be resumed: the start, the last signs, the sums since then."""
        return {"start": self._start, "before": self._before, "squares": self._squares.clone(), "steps": self._steps.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._start, self._before = dict(state["start"]), dict(state["before"])
        self._squares.copy_(state["squares"])
        self._steps.copy_(state["steps"])

    @torch.no_grad()
    def _hear(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Add up the squared gradient norms of a step, on the device; its closure (Lightning gives one) is run first."""
        given = None if isinstance(optimizer, torch.optim.LBFGS) else evaluated(args, kwargs)
        norms = torch.stack([_gradient_norm(weight.grad, self._device) for weight in self.weights.values()])
        scale = getattr(optimizer, "grad_scale", None)  # of a fused optimiser, which unscales in its step
        squares = (norms if scale is None else norms / scale).square()
        finite = torch.isfinite(squares)
        self._squares += torch.where(finite, squares, 0)
        self._steps += finite
        return given

    def _dense(self) -> dict[str, Tensor]:
        """The weights in their dense shapes, whether they are stored so or not; zeros where pruned."""
        layers = compact(self.model)
        return {name: layers[name].scatter(w.detach()) if name in layers else w.detach() for name, w in self.weights.items()}

    def _kept(self) -> int:
        return self._hold.mask.kept if self._hold is not None else sum(weight.numel() for weight in self.weights.values())

    def _probe(self) -> tuple[float | None, float | None]:
        """The share of dead ReLUs, and the effective rank of the last features."""
        features: list[Tensor] = []

        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            features[:] = args[:1]  # the last layer's are what stays

        heard = [m.register_forward_pre_hook(note) for m in self.model.modules() if isinstance(m, nn.Linear)]
        try:
            with torch.no_grad(), _unseen(self.model), _Relus() as relus:
                run(self.model, self.example)
        finally:
            for handle in heard:
                handle.remove()
        dead = _finite(torch.cat(relus.dead).double().mean()) if relus.dead else None
        return dead, effective_rank(features[0].reshape(-1, features[0].shape[-1])) if features else None


def effective_rank(matrix: Tensor) -> float | None:
    """exp of the entropy of the singular values of `matrix` (M, N), divided by their sum: how many directions it really uses.

    In [1, min(M, N)]; None for a matrix of zeros or with values that are not finite. As in Roy and Vetterli, "The effective rank: a measure
    of effective dimensionality" (EUSIPCO 2007): columns are not centred.

    Example:
        >>> round(effective_rank(torch.eye(5)), 6), round(effective_rank(torch.ones(3, 4)), 6)
        (5.0, 1.0)
    """
    matrix = matrix.detach().cpu().double()
    if not torch.isfinite(matrix).all():
        return None  # LAPACK raises
    values = torch.linalg.svdvals(matrix)
    return _finite(torch.special.entr(values / values.sum()).sum().exp())


def sharpness(
    model: nn.Module,
    inputs: Any,
    target: Any,
    *,
    mask: Mask | None = None,
    loss: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    iterations: int = 50,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """The largest eigenvalue of the Hessian of the loss of one batch over the kept weights, by power iteration.

    In eval mode: batch norms have their running statistics, so this is the curvature of the network that is tested, not of the one whose
    norms see the batch. Biases and norms stand still. Where the eigenvalue of largest size is negative, or one of either sign is as
    large, a second iteration, on the Hessian moved up by that size, finds the largest. Sparse layers are dense meanwhile. The model and
    its gradients are left alone; memory is that of a double backward pass over the batch.

    Args:
        model: any module.
        inputs: one batch (N, ...), a tuple of positional or a mapping of keyword inputs.
        target: what `loss` takes.
        mask: which weights are kept; None for all prunable ones.
        loss: (logits, target) -> 0-D loss.
        iterations: at most so many Hessian-vector products (twice as many where the second iteration is needed), >= 1. Where they do not
            suffice the value is what the last ones gave, which is too small, never too large.
        tolerance: stop when v.Hv is within this share of ||Hv||, v of length 1: they are equal for an eigenvector.
        seed: of the vector that it begins with.

    Raises:
        MaskError: when the mask does not fit.
        SettingError: for less than one iteration.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> round(sharpness(layer, x, torch.zeros(2, 1), loss=F.mse_loss), 2)  # the Hessian is x.T @ x
        4.0
    """
    if iterations < 1:
        raise SettingError(f"iterations came as {iterations}", allowed="a number >= 1", fix="50 is usual")
    network = bare(model)
    smooth = twice_differentiable(network, fix="diagnose without the sharpness")
    with as_dense(network), _unseen(network), torch.enable_grad(), smooth:
        parameters = prunable(network) if mask is None else mask.check(network)
        # Leaves of our own, so that no hook on a parameter hears of these gradients.
        weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
        kept = torch.cat([(torch.ones_like(w) if mask is None else mask[name].to(w.device)).flatten() for name, w in weights.items()])
        args, keywords = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        output = functional_call(network, weights, tuple(args) if isinstance(args, (tuple, list)) else (args,), dict(keywords))
        product, start = _products(loss(logits_of(output), target), [*weights.values()], kept=kept.nonzero().flatten(), seed=seed)
        value, size = _power(product, start, iterations=iterations, tolerance=tolerance)
        if value < (1 - tolerance) * size:
            lifted, _ = _power(lambda v: product(v) + size * v, start, iterations=iterations, tolerance=tolerance)
            value = max(value, lifted - size)
    return value


def _products(loss: Tensor, weights: Sequence[Tensor], *, kept: Tensor, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """v (K,) -> H v (K,) over the kept places, and a vector (K,) to begin with."""

    def gradient(value: Tensor, *, again: bool = False) -> Tensor:
        found = torch.autograd.grad(value, weights, retain_graph=True, create_graph=again, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])[kept]

    slope = gradient(loss, again=True)

    def product(vector: Tensor) -> Tensor:
        return gradient(slope @ vector) if slope.requires_grad else torch.zeros_like(slope)  # a linear loss

    return product, torch.randn(len(kept), generator=torch.Generator().manual_seed(seed)).to(slope)


def _power(product: Callable[[Tensor], Tensor], vector: Tensor, *, iterations: int, tolerance: float) -> tuple[float, float]:
    """v.Hv, which tends to the eigenvalue of largest size, and ||Hv||, which tends to that size; v is of length 1."""
    value = size = math.nan
    vector = vector / _norm(vector)
    for _ in range(iterations):
        image = product(vector)
        value, size = float(vector @ image), float(_norm(image))
        if not size > 0 or size - abs(value) <= tolerance * size:
            break
        vector = image / size
    return value, size


# -- the pass of the probe batch ---------------------------------------------------------------------------------------
class _Relus(Mode):
    """Notes for each ReLU that is called, in whatever spelling, which of its channels are 0 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.dead: list[Tensor] = []  # bool (C,), on the CPU
        self.lengths = False  # whether three dimensions are (N, C, L), as a Conv1d has them, or (N, T, C)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.conv1d or func is F.linear or func is torch.addmm or str(func) == "anymask.conv.default":
            self.lengths = func is F.conv1d
        if _gives_relu(func, args, kwargs or {}):
            self._note(out[0] if isinstance(out, tuple) else out)
        return out

    def _note(self, out: Tensor) -> None:
        if out.ndim > 1 and out.is_floating_point() and out.numel():
            channels = out.ndim - 1 if out.ndim == 3 and not self.lengths else 1
            self.dead.append((out.amax([d for d in range(out.ndim) if d != channels]) <= 0).cpu())


def _gives_relu(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is a ReLU, be it the plain one below a ghost, or one that a norm of to_sparse takes along."""
    if str(func) == "anymask.norm.default":
        return bool(args[7])  # `relu`, however soft, and before a max pool that is taken along, but for places in no window
    below = {torch.ops.aten.relu.default, torch.ops.aten.hardtanh.default}  # what a ghost activation calls
    return relu_call(func, args, kwargs) is not None or func in below


@contextmanager
def _unseen(network: nn.Module) -> Iterator[None]:
    """Eval mode and no compiler; random numbers drawn inside are not missed by others."""
    device = next(network.parameters()).device
    loaded = "torch._dynamo.eval_frame" in sys.modules  # else nothing is compiled, and loading it takes a second
    stance = torch.compiler.set_stance("force_eager") if loaded else nullcontext()
    with evaluating(network), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), stance:
        yield


# -- numbers -----------------------------------------------------------------------------------------------------------
def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _gradient_norm(gradient: Tensor | None, device: torch.device) -> Tensor:
    if gradient is None:
        return torch.full((), math.nan, device=device)  # which is left out
    return _norm(gradient.coalesce().values() if gradient.is_sparse else gradient).to(device, torch.float32)


def _signs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.sign().to(torch.int8) for name, weight in weights.items()}


def _flips(now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> int:
    return sum(int((now[name] * then[name] < 0).sum()) for name in now)


def _ratio(part: float, whole: float) -> float | None:
    return _finite(part / whole) if whole else None


def _finite(value: Tensor | float) -> float | None:
    return float(value) if math.isfinite(value) else None
