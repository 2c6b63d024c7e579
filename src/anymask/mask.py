"""The mask: which weights of a network are kept."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anymask.errors import MaskError
from anymask.prunables import bare, compact, prunable
from anymask.ranks import from_rank, together
from anymask.registry import nearest

_DESCRIBED = 20  # entries that do not fit for which the nearest are looked up


class Mask(Mapping[str, Tensor]):
    """An immutable mapping of parameter name to bool tensor on the CPU, **True = kept**, shaped like the parameter.

    Args:
        kept: for each parameter name a tensor of bool, or of 0 and 1, in the parameter's shape.
        info: where the mask comes from (method, sparsity, seed ...), plain JSON values, saved with it.

    Raises:
        MaskError: when `kept` or one of its tensors is empty, or holds values other than 0 and 1.

    Example:
        >>> import torch
        >>> mask = Mask({"weight": torch.tensor([[1, 0], [0, 0]])})
        >>> mask.sparsity, mask.density, mask.kept, mask.total
        (0.75, 0.25, 1, 4)
    """

    def __init__(self, kept: Mapping[str, Tensor], *, info: Mapping[str, Any] | None = None) -> None:
        if not kept:
            raise MaskError("a mask of no parameters", allowed="at least one parameter", fix="give name -> bool tensor")
        self._kept = {str(name): _as_bool(str(name), tensor) for name, tensor in kept.items()}
        self.info: dict[str, Any] = dict(info or {})

    # -- a mapping -------------------------------------------------------------------------------------------------
    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name].clone()  # a copy: writing into it does not change the mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        """Equal when the same weights are kept; where a mask comes from does not count."""
        if not isinstance(other, Mask):
            return NotImplemented
        return self._kept.keys() == other._kept.keys() and all(torch.equal(t, other._kept[n]) for n, t in self._kept.items())

    __hash__ = None  # type: ignore[assignment]  # compared by value, and holds tensors

    def __repr__(self) -> str:
        made = f", {self.info['method']}" if "method" in self.info else ""
        return f"Mask({len(self)} parameters, {self.kept:,} of {self.total:,} kept, sparsity {self.sparsity:.4f}{made})"

    # -- counts ----------------------------------------------------------------------------------------------------
    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(int(t.sum()) for t in self._kept.values())

    @property
    def total(self) -> int:
        """Number of weights covered, kept or not."""
        return sum(t.numel() for t in self._kept.values())

    @property
    def density(self) -> float:
        """Share of kept weights, in [0, 1]."""
        return self.kept / self.total

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]: 1 - density."""
        return 1.0 - self.density

    def layer_density(self) -> dict[str, float]:
        """Share of kept weights, in [0, 1], for each parameter."""
        return {name: int(t.sum()) / t.numel() for name, t in self._kept.items()}

    def collapsed(self) -> list[str]:
        """Names of the parameters that keep no weight at all: nothing passes through such a layer."""
        return [name for name, t in self._kept.items() if not t.any()]

    # -- on a model ------------------------------------------------------------------------------------------------
    def check(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of `model` that this mask covers, by name; it may leave any out.

        Names are those of the model inside `torch.compile` or DistributedDataParallel.

        Raises:
            MaskError: naming every entry that the model does not have or has in another shape, each with the nearest
                parameters; and then also the prunable weights that the mask leaves out.
        """
        model = bare(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        layers = compact(model)
        shapes = {name: tuple(layers[name].dense_shape if name in layers else p.shape) for name, p in parameters.items()}
        odd = [name for name, t in self._kept.items() if name not in shapes or tuple(t.shape) != shapes[name]]
        if odd:
            raise self._misfit(odd, shapes, model)
        for name in layers.keys() & self._kept.keys():
            self._check_stored(name, layers[name])
        return {name: parameters[name] for name in self._kept}

    def by_parameter(self, model: nn.Module) -> dict[int, Tensor]:
        """What is kept of each parameter that this mask covers, by its id: of a tied one what the mask keeps under all its names."""
        found: dict[int, Tensor] = {}
        for name, parameter in self.check(model).items():
            found[id(parameter)] = self[name] & found[id(parameter)] if id(parameter) in found else self[name]
        return found

    def _check_stored(self, name: str, layer: Any) -> None:
        lost = int(self._kept[name].sum()) - int(layer.collect(self._kept[name]).sum())
        if lost:
            raise MaskError(
                f"the mask keeps {lost} weights of {name} that the sparse layer does not store",
                allowed="the mask that to_sparse was given, or one that keeps less",
                fix="convert back with anymask.to_dense first",
            )

    def _misfit(self, odd: list[str], shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> MaskError:
        ours = {name: tuple(self._kept[name].shape) for name in odd}
        theirs = {name: shape for name, shape in shapes.items() if name not in self._kept or name in ours}
        unexpected = {name: shape for name, shape in ours.items() if name not in theirs}
        said = {
            "not in the model": _listed(unexpected, lambda name, shape: f"{name} {shape} (nearest: {_nearest(name, shape, theirs)})"),
            "another shape": _listed(
                {name: shape for name, shape in ours.items() if name in theirs},
                lambda name, shape: (
                    f"{name} is {shape} in the mask and {theirs[name]} in the model (of that shape: {_alike(name, shape, theirs)})"
                ),
            ),
            "prunable and not in the mask": _listed(
                {name: theirs[name] for name in _prunable(model) if name not in self._kept},
                lambda name, shape: f"{name} {shape} (nearest: {_nearest(name, shape, unexpected)})",
            ),
        }
        parts = "; ".join(f"{what}: {'; '.join(entries)}" for what, entries in said.items() if entries)
        return MaskError(
            f"the mask does not fit {type(model).__name__}; {parts}",
            allowed="every name and shape of the mask as in the model",
            fix="make the mask for this very model, or rename its entries",
        )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of `model` to exactly 0, once, in place. To keep them there, see `anymask.hold`.

        Raises:
            MaskError: when the mask does not fit the model.
        """
        kept = self.as_stored(model)
        for name, parameter in self.check(model).items():
            here = local(parameter)
            here.masked_fill_(~shard(kept[name], parameter).to(here.device), 0)

    def revived(self, model: nn.Module) -> list[str]:
        """The names of the parameters of `model`, or of this rank's parts of them, in which some pruned weight is not 0.

        Example:
            >>> Mask({"weight": torch.eye(2)}).revived(nn.Linear(2, 2))
            ['weight']
        """
        kept, found = self.as_stored(model), []
        for name, parameter in self.check(model).items():
            here = local(parameter)
            found += [name] if bool(here[~shard(kept[name], parameter).to(here.device)].any()) else []
        return found

    def as_stored(self, model: nn.Module) -> dict[str, Tensor]:
        """The bits of this mask in the shapes of `model`'s parameters: of a sparse layer (`anymask.to_sparse`) those of its places."""
        layers = compact(model)
        return {name: layers[name].collect(kept) if name in layers else kept for name, kept in self._kept.items()}

    def broadcast(self, source: int = 0) -> "Mask":
        """The mask of rank `source`, on every rank of torch.distributed; this very mask where a process trains alone.

        The same seed gives the same mask up to the rounding of a device's arithmetic; ranks that train one network need the very
        same one: make it on each rank, then hold `mask.broadcast()`. Every rank has to call this.

        Example:
            >>> mask = Mask({"weight": torch.eye(2)})
            >>> mask.broadcast() is mask  # no process group here
            True
        """
        if not together():
            return self
        bits = {name: (t.shape, np.packbits(t.numpy().reshape(-1))) for name, t in self._kept.items()}
        sent, info = from_rank((bits, self.info), source)
        flat = {name: np.unpackbits(packed, count=shape.numel()) for name, (shape, packed) in sent.items()}
        return Mask({name: torch.from_numpy(flat[name]).reshape(sent[name][0]) for name in sent}, info=info)

    def save(self, path: Any, *, format: str = "anymask", weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the mask to `path`: safetensors, one bit a weight, or as `anymask.formats.save` says. See `anymask.load_mask`."""
        from anymask import formats  # below: formats needs Mask

        formats.save(self, path, format=format, weights=weights)


def needs_mask(mask: Any) -> Mask:
    """`mask`; raises MaskError where it is none."""
    if isinstance(mask, Mask):
        return mask
    raise MaskError(
        f"mask came as {type(mask).__name__}",
        allowed="an anymask.Mask",
        fix="give anymask.load_mask(path) for a file, anymask.Mask(tensors) for a dict",
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Twelve digits of names, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]


def local(tensor: Tensor) -> Tensor:
    """What of `tensor` lies on this rank, without its graph: all of it, unless it is a DTensor (fully_shard, tensor parallel)."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` cut as `like` is: what of it belongs to this rank. Every rank has the whole, nothing is sent."""
    if not hasattr(like, "to_local"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor  # here: a slow import, and only DTensors need it

    assert isinstance(like, DTensor)
    placed = distribute_tensor(whole.to(local(like).device), like.device_mesh, like.placements, src_data_rank=None)
    return local(placed).clone()  # may be a view of the whole


def _prunable(model: nn.Module) -> list[str]:
    try:
        return list(prunable(model))
    except MaskError:  # it has none
        return []


def _listed(names: Mapping[str, tuple[int, ...]], describe: Callable[[str, tuple[int, ...]], str]) -> list[str]:
    """Every name; the first ones described, because to look for names like theirs takes time."""
    return [describe(name, shape) if place < _DESCRIBED else name for place, (name, shape) in enumerate(names.items())]


def _nearest(name: str, shape: tuple[int, ...], names: Mapping[str, tuple[int, ...]]) -> str:
    """The names most like `name`, those of its shape first; of names that are not like it those of its shape."""
    like = sorted(nearest(name, names), key=lambda other: names[other] != shape)
    return ", ".join(like) or _alike(name, shape, names)


def _alike(name: str, shape: tuple[int, ...], names: Mapping[str, tuple[int, ...]]) -> str:
    """The names of that shape, at most three, the likest first."""
    shaped = [other for other, of in names.items() if of == shape]
    like = nearest(name, shaped)
    return ", ".join([*like, *(other for other in shaped if other not in like)][:3]) or "none"


def _as_bool(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise MaskError(f"{name} came as {type(tensor).__name__}", allowed="a tensor of bool or of 0 and 1", fix="torch.as_tensor(...) it")
    tensor = tensor.detach().cpu()
    if tensor.numel() == 0:
        raise MaskError(f"{name} has no weights: its shape is {tuple(tensor.shape)}", allowed="at least one weight", fix="leave it out")
    kept = tensor.bool()
    if tensor.dtype is not torch.bool and not torch.equal(kept.to(tensor.dtype), tensor):
        raise MaskError(
            f"{name} holds values other than 0 and 1",
            allowed="bool, or 0 and 1 with 1 = kept",
            fix="give `weight != 0` for a pruned weight",
        )
    return kept.clone()
