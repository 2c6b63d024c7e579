"""A trained network, pruned by any mask, and refitted layer by layer to what it was: no training, a few batches of data."""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from anymask.errors import SettingError, TechniqueError
from anymask.mask import Mask
from anymask.prunables import bare
from anymask.ranks import from_rank
from anymask.sparse import as_dense
from anymask.surgery import CONVS, copied, evaluating, run
from anymask.techniques.batches import plain
from anymask.techniques.neuron_blocks import inputs_of


@dataclass(frozen=True)
class Refit:
    """How layers are refitted; see `reconstruct`.

    Args:
        batches: how many batches of the data are looked at, >= 1.
        samples: places (images and pixels, or tokens) of each of them, >= 1.
        damping: how strongly kept weights are held to the dense ones, as a share of the inputs' mean square, > 0.
        iterations: of conjugate gradients, >= 1.
    """

    batches: int = 8
    samples: int = 512
    damping: float = 0.01
    iterations: int = 50

    def __post_init__(self) -> None:
        for name in ("batches", "samples", "iterations"):
            if (value := getattr(self, name)) < 1:
                raise SettingError(f"{name} came as {value}", allowed="a whole number >= 1", fix="leave it out for the default")
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

    Refitted are convolutions and linear layers of the mask that own their weight and are called as modules (the first call counts);
    others of the mask are only pruned.

    Args:
        model: changed in place; sparse layers (`to_sparse`) stay so.
        mask: what is kept.
        data: batches of inputs, or of (inputs, target) pairs of which the inputs are taken; inputs as `Recipe.attach` takes them.
        settings: see `Refit`.
        seed: of the places that are drawn.

    On several ranks of torch.distributed each has to call this, and the weights of rank 0 are used.

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
    model, settings = bare(model), settings or Refit()
    if any(hasattr(p, "to_local") for p in model.parameters()):
        raise TechniqueError(
            f"the parameters of {type(model).__name__} are cut by fully_shard",
            allowed="a model that is whole on each rank",
            fix="reconstruct it before fully_shard",
        )
    device = next(model.parameters(), torch.empty(0)).device
    batches = [_on(device, batch) for batch in islice(data, settings.batches)]
    if not batches:
        raise TechniqueError("no data to refit layers on", allowed="at least one batch", fix="give a list or a loader that is not empty")
    with as_dense(model):
        names = _refittable(model, mask)
        dense = copied(model)
        try:
            mask.apply(model)
            with evaluating(model), evaluating(dense):
                return Reconstructed(_refitted(model, dense, names, mask, batches, settings=settings, seed=seed))
        except BaseException:
            model.load_state_dict(dense.state_dict())
            raise


def _on(device: torch.device, batch: Any) -> Any:
    """The inputs of a batch, which may be a pair."""
    (inputs,) = plain((batch if isinstance(batch, (Tensor, Mapping)) else batch[0],))
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, inputs)


def _refittable(model: nn.Module, mask: Mask) -> list[str]:
    """The names of the layers that can be refitted, of those that are pruned."""
    mask.check(model)
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found = {name: module for name, module in model.named_modules() if isinstance(module, (*CONVS, nn.Linear)) and _weight(name) in mask}
    found = {name: module for name, module in found.items() if users[id(module.weight)] == 1 and module.weight.is_floating_point()}
    if not found:
        raise TechniqueError(
            f"there is nothing to refit in {type(model).__name__}",
            allowed="a mask of convolutions or linear layers",
            fix="give such a mask",
        )
    if not any(module.weight.cpu()[~mask[_weight(name)]].any() for name, module in found.items()):
        raise TechniqueError(
            f"{type(model).__name__} is 0 already wherever the mask prunes",
            allowed="the network as it was before it was pruned, and a mask that takes something away",
            fix="give that network",
        )
    return list(found)


def _weight(layer: str) -> str:
    return f"{layer}.weight".lstrip(".")


def _refitted(
    model: nn.Module, dense: nn.Module, names: list[str], mask: Mask, batches: list[Any], *, settings: Refit, seed: int
) -> dict[str, tuple[float, float]]:
    theirs, mine = dict(dense.named_modules()), dict(model.named_modules())
    wanted: dict[str, list[Tensor]] = {}  # what the dense layers give, in the order in which they are called
    for turn, batch in enumerate(batches):
        for name, rows in _seen(dense, {n: theirs[n] for n in names}, batch, samples=settings.samples, seed=seed + turn).items():
            wanted.setdefault(name, []).append(rows @ _matrix(theirs[name]).mT)
    unexplained = {}
    for name, outputs in wanted.items():
        how: dict[str, Any] = {"samples": settings.samples, "stops": True}
        rows = torch.cat([_seen(model, {name: mine[name]}, batch, seed=seed + turn, **how)[name] for turn, batch in enumerate(batches)], 1)
        unexplained[name] = _refit(mine[name], _kept(mine[name], name, mask), rows, torch.cat(outputs, 1), settings)
    return unexplained


class _Heard(Exception):
    """What was to be heard of a forward pass has been."""


def _seen(
    net: nn.Module, layers: Mapping[str, nn.Module], batch: Any, *, samples: int, seed: int, stops: bool = False
) -> dict[str, Tensor]:
    """The inputs of `layers` at drawn places of a batch, by name: (groups, samples, inputs of a neuron), with a 1 behind for a bias.

    The places are the same in networks of one kind. With `stops` the forward pass ends at the first of the layers.
    """
    found: dict[str, Tensor] = {}

    def note(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> None:
        if name in found:
            return
        x = args[0] if args else kwargs["input"]
        draws = torch.Generator().manual_seed((seed * 1_000_003 + crc32(name.encode())) % 2**63)
        rows = inputs_of(layer, x.to(torch.promote_types(x.dtype, torch.float32)), samples=samples, draws=draws)
        rows = rows.view(samples, getattr(layer, "groups", 1), -1).movedim(1, 0)
        found[name] = rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)
        if stops:
            raise _Heard

    handles = [layer.register_forward_pre_hook(partial(note, name=name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with suppress(_Heard):
            run(net, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


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
    variance = (wanted - wanted.mean(1, keepdim=True)).square().sum().clamp(min=torch.finfo(wanted.dtype).tiny)
    before, after = ((float((rows @ weights.mT - wanted).square().sum() / variance)) for weights in (old, new))
    if not after < float("inf"):
        raise TechniqueError(
            f"what goes into or out of {layer} is not finite", allowed="a trained network", fix="look at its weights and at the data"
        )
    flat = from_rank(new.flatten(0, 1).cpu()).to(new.device)
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
