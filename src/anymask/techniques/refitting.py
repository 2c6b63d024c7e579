"""A trained network, pruned by any mask, and refitted layer by layer to what it was: no training, a few batches of data."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from anymask.errors import MaskError, SettingError, TechniqueError
from anymask.interrupts import uninterrupted
from anymask.mask import Mask
from anymask.prunables import bare
from anymask.ranks import by_rank_0
from anymask.sparse import as_dense
from anymask.surgery import CONVS, copied, evaluating, needs_whole, run
from anymask.techniques.batches import plain
from anymask.techniques.neuron_blocks import inputs_of


@dataclass(frozen=True)
class Refit:
    """How layers are refitted; see `reconstruct`.

    Args:
        batches: how many batches of the data are looked at, >= 1.
        samples: places (images and pixels, or tokens) of each of them, >= 2.
        damping: how strongly kept weights are held to the dense ones, as a share of the inputs' mean square, > 0.
        iterations: of conjugate gradients, >= 1.
    """

    batches: int = 8
    samples: int = 512
    damping: float = 0.01
    iterations: int = 50

    def __post_init__(self) -> None:
        for name, least in (("batches", 1), ("samples", 2), ("iterations", 1)):
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise SettingError(f"{name} came as {value}", allowed=f"a whole number >= {least}", fix="leave it out for the default")
        if not 0 < self.damping < float("inf"):
            raise SettingError(f"damping came as {self.damping}", allowed="a finite number > 0", fix="0.01 is the default")


@dataclass(frozen=True)
class Reconstructed:
    """What `reconstruct` did: for each layer the share of its dense outputs' variance that its own do not explain, before and after."""

    unexplained: Mapping[str, tuple[float, float]]

    def __str__(self) -> str:
        before, after = (sum(shares) / len(self.unexplained) for shares in zip(*self.unexplained.values(), strict=True))
        return f"of their outputs {before:.0%} was unexplained, now {after:.0%}"


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    mask: Mask,
    *,
    data: Iterable[Any],
    settings: Refit | None = None,
    seed: int = 0,
) -> Reconstructed:
    r"""Prune a trained `model` by any `mask`, and refit what is kept, so that each layer gives what it gave before; no training.

    Layer by layer, in the order in which they compute, the kept weights w of each neuron become those with the least

        mean (w . x - y)^2 + damping * mean(x^2) * ||w - v||^2

    where x are inputs of the layer as the layers before now give them, y is what the dense network's neuron gives at the same places,
    and v are the dense weights that are kept. A bias is one of the weights. The minimum is found by conjugate gradients for all neurons
    at once, from v on. Norms and all else keep the dense network's weights and statistics.

    Refitted are convolutions and linear layers of the mask that own their weight and bias, compute with them as PyTorch's do, and are
    called as modules, once; others of the mask are only pruned. The same places must hold the same input in both networks: experts
    that choose their tokens by what pruned layers say of them get others, so leave them out of the mask (`prune(exclude=...)`).

    Args:
        model: changed in place; sparse layers (`to_sparse`) stay so.
        mask: what is kept.
        data: batches of inputs, or of (inputs, target) pairs of which the inputs are taken; inputs as `Recipe.attach` takes them.
        settings: see `Refit`.
        seed: of the places that are drawn.

    On several ranks of torch.distributed each has to call this; rank 0 does it, on its data, for all.

    Raises:
        TechniqueError: when no layer can be refitted, the model is 0 already wherever `mask` prunes, there are no data, the model is
            cut by fully_shard, or outputs are not finite. The model is then as before.
        MaskError: when the mask does not fit.

    Example:
        >>> import torch, anymask
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> mask = anymask.prune(model, "magnitude", sparsity=0.5)
        >>> print(anymask.reconstruct(model, mask, data=[torch.randn(64, 8)]))
        of their outputs 31% was unexplained, now 20%

    Reference: least squares for a given mask, as in OBC (arXiv 2208.11580) and arXiv 2401.02938. Differs from them: inputs are those of
    the sparse network and outputs those of the dense one (as in arXiv 1707.06168, for channels), so a layer makes up for those before it.
    """
    if not isinstance(mask, Mask):
        raise MaskError(f"mask came as {type(mask).__name__}", allowed="an anymask.Mask", fix="give anymask.load_mask(path) for a file")
    if isinstance(data, (Tensor, Mapping)):
        raise TechniqueError(f"data came as {type(data).__name__}", allowed="batches, in a list or a loader", fix="give [batch]")
    model, settings = bare(model), settings or Refit()
    needs_whole(model.parameters(), f"anymask.reconstruct on {type(model).__name__}", fix="reconstruct it before fully_shard")
    with as_dense(model):
        names = _refittable(model, mask)
        biases = [model.get_submodule(name).bias for name in names]
        changed: list[Any] = [p for p in (*mask.check(model).values(), *biases) if p is not None]
        done, values = by_rank_0(lambda: _found(model, mask, names, data, changed, settings=settings, seed=seed))
        with uninterrupted():
            for parameter, value in zip(changed, values, strict=True):
                parameter.copy_(value)
    return done


def _found(
    model: nn.Module, mask: Mask, names: list[str], data: Iterable[Any], changed: list[Tensor], *, settings: Refit, seed: int
) -> tuple[Reconstructed, list[Tensor]]:
    """What was done, and the values of parameters after it; the model is as before."""
    device = next(model.parameters()).device
    batches = [_on(device, batch) for batch in islice(data, settings.batches)]
    if not batches:
        raise TechniqueError("no data to refit layers on", allowed="at least one batch", fix="give a list or a loader that is not empty")
    dense, before = copied(model), [parameter.clone() for parameter in changed]
    try:
        mask.apply(model)
        with evaluating(model), evaluating(dense), _module_by_module():
            done = Reconstructed(_refitted(model, dense, names, mask, batches, settings=settings, seed=seed))
        return done, [parameter.detach().cpu().clone() for parameter in changed]
    finally:
        with uninterrupted():
            for parameter, value in zip(changed, before, strict=True):
                parameter.copy_(value)


@contextmanager
def _module_by_module() -> Iterator[None]:
    """PyTorch's fused encoder layers, which hand on nested tensors without a shape, are off inside the block."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _on(device: torch.device, batch: Any) -> Any:
    """The inputs of a batch, which may be a pair."""
    (inputs,) = plain((batch if isinstance(batch, (Tensor, Mapping)) else batch[0],))
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, inputs)


def _refittable(model: nn.Module, mask: Mask) -> list[str]:
    """The names of the layers that can be refitted, of those that are pruned."""
    mask.check(model)
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found: dict[int, str] = {}  # by the layer's id: it may have two names
    for name, module in model.named_modules(remove_duplicate=False):
        if _weight(name) in mask and _is_affine(module) and all(users[id(p)] == 1 for p in module.parameters(recurse=False)):
            found.setdefault(id(module), name)
    if not found:
        raise TechniqueError(
            f"there is nothing to refit in {type(model).__name__}",
            allowed="a mask of convolutions or linear layers",
            fix="give such a mask",
        )
    if not any(model.get_parameter(_weight(name)).cpu()[~mask[_weight(name)]].any() for name in found.values()):
        raise TechniqueError(
            "the mask prunes nothing that is not 0 already",
            allowed="the network as it was before it was pruned, and a mask that takes something away",
            fix=f"look at the sparsity of the mask, or whether {type(model).__name__} is pruned already",
        )
    return list(found.values())


def _is_affine(module: nn.Module) -> bool:
    """Whether it computes x W + b with weights that are its own, as a subclass with other arithmetic or a computed weight does not."""
    kind = next((kind for kind in (*CONVS, nn.Linear) if isinstance(module, kind)), None)
    plain = kind is not None and all(getattr(type(module), n, None) is getattr(kind, n, None) for n in ("forward", "_conv_forward"))
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    return plain and weight is not None and weight.is_floating_point() and bias is getattr(module, "bias", None)


def _weight(layer: str) -> str:
    return f"{layer}.weight".lstrip(".")


def _refitted(
    model: nn.Module, dense: nn.Module, names: list[str], mask: Mask, batches: list[Any], *, settings: Refit, seed: int
) -> dict[str, tuple[float, float]]:
    theirs, mine = ({name: net.get_submodule(name) for name in names} for net in (dense, model))
    wanted: dict[str, dict[int, tuple[torch.Size, Tensor]]] = {}  # what dense layers give, in the order in which they are called
    for turn, batch in enumerate(batches):
        for name, (shape, rows) in _seen(dense, theirs, batch, samples=settings.samples, seed=seed + turn).items():
            wanted.setdefault(name, {})[turn] = shape, rows @ _matrix(theirs[name]).mT
    unexplained = {}
    for name, outputs in wanted.items():
        how: dict[str, Any] = {"samples": settings.samples, "stops": True}
        seen = {turn: _seen(model, {name: mine[name]}, batches[turn], seed=seed + turn, **how).get(name) for turn in outputs}
        # Where networks send an input elsewhere when they are pruned (experts), the same places are not the same inputs any more.
        pairs = [(found[1], outputs[turn][1]) for turn, found in seen.items() if found is not None and found[0] == outputs[turn][0]]
        if pairs:
            rows, targets = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
            unexplained[name] = _refit(mine[name], _kept(mine[name], name, mask), rows, targets, settings)
    if not unexplained:
        raise TechniqueError(
            f"no masked layer of {type(model).__name__} was called as a module",
            allowed="layers that are called, with inputs",
            fix="look at the data, or prune without refitting: mask.apply(model)",
        )
    return unexplained


class _Heard(Exception):
    """What was to be heard of a forward pass has been."""


def _seen(
    net: nn.Module, layers: Mapping[str, nn.Module], batch: Any, *, samples: int, seed: int, stops: bool = False
) -> dict[str, tuple[torch.Size, Tensor]]:
    """The inputs of `layers`, by name: their shape, and they at drawn places, (groups, samples, inputs of a neuron), a 1 behind for a bias.

    The places are the same in networks of one kind. With `stops` the forward pass ends at the first of the layers; without, those that are
    called more than once are left out.
    """
    found: dict[str, tuple[torch.Size, Tensor]] = {}
    again: set[str] = set()

    def note(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> None:
        x = args[0] if args else kwargs["input"]
        if name in found or not x.numel():
            again.update([name] if name in found else [])
            return
        draws = torch.Generator().manual_seed((seed * 1_000_003 + crc32(name.encode())) % 2**63)
        rows = inputs_of(layer, x.to(torch.promote_types(x.dtype, torch.float32)), samples=samples, draws=draws)
        rows = rows.view(samples, getattr(layer, "groups", 1), -1).movedim(1, 0)
        found[name] = x.shape, rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)
        if stops:
            raise _Heard

    handles = [layer.register_forward_pre_hook(partial(note, name=name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with suppress(_Heard):
            run(net, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen for name, seen in found.items() if name not in again}


def _matrix(layer: Any) -> Tensor:
    """The weights of each neuron, with its bias behind: (groups, neurons of one, inputs)."""
    rows = layer.weight if layer.bias is None else torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
    rows = rows.flatten(1).to(torch.promote_types(rows.dtype, torch.float32))
    return rows.view(getattr(layer, "groups", 1), -1, rows.shape[1])


def _kept(layer: Any, name: str, mask: Mask) -> Tensor:
    """Of the rows of `_matrix`, without its groups."""
    kept = mask[_weight(name)].flatten(1)
    if layer.bias is None:
        return kept
    free = mask.get(_weight(name).removesuffix("weight") + "bias", torch.ones(len(kept), dtype=torch.bool))
    return torch.cat([kept, free[:, None]], 1)


def _refit(layer: Any, kept: Tensor, rows: Tensor, wanted: Tensor, settings: Refit) -> tuple[float, float]:
    """Give `layer` the weights by which `rows` explain `wanted` best; the share of its variance that is left, before and after."""
    old = _matrix(layer)
    new = least_squares(rows, wanted, old, kept.to(rows.device).view_as(old), damping=settings.damping, iterations=settings.iterations)
    if not (new.isfinite().all() and wanted.isfinite().all()):
        raise TechniqueError(
            f"what goes into or out of {layer} is not finite", allowed="a trained network", fix="look at its weights and at the data"
        )
    variance = float((wanted - wanted.mean(1, keepdim=True)).square().sum())
    if variance <= torch.finfo(wanted.dtype).eps * float(wanted.square().sum()):
        variance = float("inf")  # there is nothing to explain
    before, after = (float((rows @ weights.mT - wanted).square().sum()) / variance for weights in (old, new))
    flat = new.flatten(0, 1)
    layer.weight.copy_(flat[:, : layer.weight[0].numel()].view(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(flat[:, -1])
    return before, after


def least_squares(rows: Tensor, wanted: Tensor, start: Tensor, kept: Tensor, *, damping: float, iterations: int) -> Tensor:
    """For each neuron the w, 0 but where `kept`, of the least mean (rows . w - wanted)^2 + damping * mean(rows^2) * ||w - start||^2.

    By conjugate gradients with the diagonal as preconditioner, from `start` on, which is 0 there, too; no step makes it worse.

    Args:
        rows: (groups, samples, inputs).
        wanted: (groups, samples, neurons).
        start, kept: (groups, neurons, inputs).

    Example:
        >>> rows, wanted = torch.eye(2)[None], torch.tensor([[[3.0], [4.0]]])
        >>> start, kept = torch.zeros(1, 1, 2), torch.tensor([[[True, False]]])
        >>> least_squares(rows, wanted, start, kept, damping=1e-6, iterations=2)
        tensor([[[3.0000, 0.0000]]])
    """
    many = rows.shape[1]
    held = (damping * rows.square().mean((1, 2), keepdim=True)).clamp(min=torch.finfo(rows.dtype).tiny)  # dead inputs are all 0
    gram = rows.mT @ rows / many if rows.shape[2] <= many else None
    inverse = kept / (rows.square().mean(1)[:, None] + held)

    def product(p: Tensor) -> Tensor:
        return kept * ((p @ gram if gram is not None else (p @ rows.mT) @ rows / many) + held * p)

    w, left = start, kept * ((wanted - rows @ start.mT).mT @ rows / many)
    step = scaled = inverse * left
    size = (left * scaled).sum(2, keepdim=True)
    least = size * torch.finfo(size.dtype).eps ** 2  # below that it is rounding, which would grow
    for _ in range(iterations):
        along, going = product(step), size > least
        length = torch.where(going, size / (step * along).sum(2, keepdim=True), 0)
        w, left = w + length * step, left - length * along
        scaled, last = inverse * left, size
        size = (left * scaled).sum(2, keepdim=True)
        step = scaled + torch.where(going, size / last, 0) * step
    return w
