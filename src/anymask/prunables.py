"""Which parameters a mask may cover, and of which model: what wraps it does not count."""

import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from anymask.errors import MaskError, SettingError

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHT, _PROJECTIONS = "weight", "(in|q|k|v)_proj_weight"
_COMPUTED = "(_orig|_v)?"  # what hooks make the weight of: torch.nn.utils.prune, spectral_norm; weight_norm's direction, not its length
_GPT_CONV = ("transformers.pytorch_utils", "Conv1D")  # a linear layer laid out (in, out); known only where it is imported already

Owner = tuple[type[nn.Module], str]  # a class of module and a pattern of its weights' names
KINDS: dict[str, tuple[Owner, ...]] = {
    "conv": tuple((kind, _WEIGHT) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)),
    "linear": ((nn.Linear, _WEIGHT), (nn.MultiheadAttention, _PROJECTIONS)),
    "embedding": ((nn.Embedding, _WEIGHT), (nn.EmbeddingBag, _WEIGHT)),
    "recurrent": ((nn.RNNBase, r"weight_[ih]h_l\d+(_reverse)?"), (nn.RNNCellBase, "weight_[ih]h")),
}

USUAL = ("conv", "linear")  # the kinds that a mask covers where nobody names others


def prunable(model: nn.Module, *, kinds: Iterable[str] = USUAL, exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters of `model` that a mask may cover, by name, in the model's own order.

    A tensor that several modules share (tied weights) is there once, under its first name; it is of the first of its kinds,
    so an embedding that a linear layer shares counts as linear. Names are those of the model inside `torch.compile` or
    DistributedDataParallel.

    Of a weight that hooks compute it is the tensor that zeros live in: `weight_orig` (torch.nn.utils.prune, the older
    spectral_norm), `weight_v` (the older weight_norm; a neuron that keeps nothing of it is NaN, as its length is 0). Weights that
    torch.nn.utils.parametrize computes are left out, with a warning that names them: what they come from may be no place for
    zeros, and loses its name when they are made plain.

    Args:
        model: any module.
        kinds: "conv" (1d, 2d, 3d, transposed), "linear" (with the projections of `nn.MultiheadAttention` and the `Conv1D` of
            transformers), "embedding" (with bags) and "recurrent" (RNN, LSTM, GRU and their cells, without the projection of
            an LSTM).
        exclude: names of parameters or of modules to leave dense, such as "fc" or "layer4.1.conv2.weight".

    Raises:
        SettingError: for a kind or an excluded name that is not there, and for a text in place of a list of them.
        MaskError: when nothing is left to prune, for complex weights, or for a model within FullyShardedDataParallel or with lazy
            layers that have seen no batch.

    Example:
        >>> from torch import nn
        >>> list(prunable(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))))
        ['0.weight', '2.weight']
        >>> list(prunable(nn.LSTM(2, 3), kinds=["recurrent"]))
        ['weight_ih_l0', 'weight_hh_l0']
    """
    wanted, exclude = names("kinds", kinds), names("exclude", exclude)
    for kind in wanted:
        if kind not in KINDS:
            raise SettingError(f"kinds holds {kind!r}", allowed=", ".join(KINDS), fix="choose among these")
    model = bare(model)
    if sparse := compact(model):
        raise MaskError(
            f"{len(sparse)} layers of {type(model).__name__} store their kept weights alone",
            allowed="a dense model",
            fix="call anymask.to_dense first",
        )
    kind_of = _kinds_of(model)
    named = {name: p for name, p in model.named_parameters() if kind_of.get(id(p)) in wanted}
    every = [*named, *_parametrized(model, wanted)]
    out: set[str] = set()
    for skip in exclude:
        hit = [name for name in every if name == skip or name.startswith(skip + ".")]
        if not hit:
            raise SettingError(f"exclude names {skip!r}", allowed=", ".join(every), fix="name a module or parameter of this model")
        out |= {*hit}
    kept = {name: p for name, p in named.items() if name not in out}
    if computed := [name for name in every if name not in named and name not in out]:
        _leave_out(computed, model, alone=not kept)
    if not kept:
        raise MaskError(
            f"{type(model).__name__} has no weight that a mask may cover",
            allowed=f"a model with one of: {', '.join(owner.__name__ for kind in wanted for owner, _ in KINDS[kind])}",
            fix="check `kinds` and `exclude`",
        )
    if odd := [name for name, p in kept.items() if p.is_complex()]:
        raise MaskError(
            f"weights of {type(model).__name__} are complex: {', '.join(odd)}",
            allowed="real numbers, which scores rank",
            fix=f"leave them dense: exclude={odd}; or hold an anymask.Mask of your own",
        )
    return kept


def names(what: str, given: Iterable[str]) -> tuple[str, ...]:
    """The names that `what` was given.

    Raises:
        SettingError: for a text, whose letters would each be taken for a name: "12" for the modules 1 and 2.
    """
    if isinstance(given, str):
        raise SettingError(f"{what} came as {given!r}, a text", allowed="a list of names", fix=f"write {what}=[{given!r}]")
    return tuple(given)


def effective(model: nn.Module) -> list[Tensor]:
    """The weights of the kinds "conv" and "linear" as `model` computes with them, each once: under masks of `torch.nn.utils.prune`, too.

    Example:
        >>> [tuple(weight.shape) for weight in effective(nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Linear(8, 2)))]
        [(8, 3, 3), (2, 8)]
    """
    found: list[Any] = []
    for kind, module, names in _owners(model):
        if kind in USUAL:
            stored = (re.sub(_COMPUTED + "$", "", name) for name, _ in module.named_parameters(recurse=False))
            found += [getattr(module, name) for name in (*stored, *getattr(module, "parametrizations", ())) if re.fullmatch(names, name)]
    return list({id(weight): weight for weight in found}.values())


def recurrent(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the kind "recurrent", each once.

    Example:
        >>> [tuple(weight.shape) for weight in recurrent(nn.Sequential(nn.GRU(3, 2), nn.Linear(2, 2)))]
        [(6, 3), (6, 2)]
    """
    kind_of = _kinds_of(bare(model))
    return [parameter for parameter in bare(model).parameters() if kind_of.get(id(parameter)) == "recurrent"]


def transposed_groups(model: nn.Module) -> dict[str, int]:
    """The weights laid out `(in, out / groups, *kernel)`, unlike all others, by name, with their groups.

    They are those of transposed convolutions, and of the `Conv1D` of transformers (groups 1).

    Example:
        >>> from torch import nn
        >>> transposed_groups(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(4, 2, 3, groups=2)))
        {'1.weight': 2}
    """
    model = bare(model)
    groups = {id(p): m.groups for m in model.modules() if isinstance(m, TRANSPOSED) for p in _own(m, _WEIGHT)}
    groups |= {id(p): 1 for m in model.modules() if isinstance(m, _imported(*_GPT_CONV)) for p in _own(m, _WEIGHT)}
    return {name: groups[id(p)] for name, p in model.named_parameters() if id(p) in groups}


def rows_of(shape: Sequence[int], *, transposed: int = 0) -> Tensor:
    """The flat index of each weight as `(outputs, places, inputs)`, int64.

    Args:
        shape: `(out, in / groups, *kernel)`; of a transposed convolution `(in, out / groups, *kernel)`.
        transposed: the number of groups of a transposed convolution; 0 for any other layer.

    Example:
        >>> rows_of((2, 3)).tolist()
        [[[0, 1, 2]], [[3, 4, 5]]]
    """
    index = torch.arange(math.prod(shape)).reshape(tuple(shape))
    if transposed:
        grouped = index.reshape(transposed, shape[0] // transposed, *shape[1:]).transpose(1, 2)
        index = grouped.reshape(transposed * shape[1], shape[0] // transposed, *shape[2:])
    return index.movedim(1, -1).reshape(index.shape[0], -1, index.shape[1])


def trained(optimizer: Optimizer) -> set[int]:
    """The ids of the parameters that `optimizer` trains.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> id(model.weight) in trained(torch.optim.SGD([model.bias], lr=0.1))
        False
    """
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def compact(model: nn.Module) -> dict[str, Any]:
    """The layers of `model` that store their kept weights alone (`anymask.to_sparse`), by the name of the weight.

    Each has `dense_shape`, and `collect(dense)`, which gives the values at its kept places.

    Example:
        >>> compact(nn.Linear(2, 2))
        {}
    """
    named = bare(model).named_modules(remove_duplicate=False)
    return {f"{name}.weight" if name else "weight": module for name, module in named if hasattr(module, "anymask_sparse")}


def bare(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DistributedDataParallel and DataParallel, which put a prefix before each name.

    Raises:
        MaskError: for FullyShardedDataParallel, whose flat parameters have no shape that a mask could fit, and for lazy layers that
            have none yet.
        SettingError: for what is no module.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> bare(torch.nn.DataParallel(model)) is model
        True
    """
    if not isinstance(model, nn.Module):
        raise SettingError(
            f"the model came as {type(model).__name__}",
            allowed="a torch.nn.Module",
            fix="give the model itself, in its place among the arguments",
        )
    compiled = _imported("torch._dynamo.eval_frame", "OptimizedModule")
    while isinstance(model, (*compiled, nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inside = model._orig_mod if isinstance(model, compiled) else model.module
        assert isinstance(inside, nn.Module)
        model = inside
    flat = _imported("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
    if flat and any(isinstance(module, flat) for module in model.modules()):
        raise MaskError(
            f"{type(model).__name__} is sharded by FullyShardedDataParallel, which flattens its parameters",
            allowed="plain modules, torch.compile, DistributedDataParallel, or torch.distributed.fsdp.fully_shard",
            fix="shard it with fully_shard (FSDP2), which keeps each parameter",
        )
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise MaskError(
            f"lazy layers of {type(model).__name__} have no size yet: {', '.join(lazy)}",
            allowed="parameters with values",
            fix="run one batch through the model first",
        )
    return model


def how_spread(model: nn.Module) -> str:
    """How a model is spread over ranks by its wrapper, or ""."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        return "within DistributedDataParallel"
    return "cut by fully_shard" if any(hasattr(parameter, "to_local") for parameter in model.parameters()) else ""


def _kinds_of(model: nn.Module) -> dict[int, str]:
    """The kind of each parameter that has one, by the parameter's id."""
    found: dict[int, str] = {}
    for kind, module, names in _owners(model):
        for parameter in _own(module, names):
            found.setdefault(id(parameter), kind)
    return found


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The modules that own weights, with their kind and the pattern of their weights' names, one kind after the other."""
    for kind, owners in KINDS.items():
        more = tuple((owner, _WEIGHT) for owner in _imported(*_GPT_CONV)) if kind == "linear" else ()
        for module in model.modules():
            for owner, names in (*owners, *more):
                if isinstance(module, owner):
                    yield kind, module, names


def _parametrized(model: nn.Module, kinds: Iterable[str]) -> list[str]:
    """The weights of these kinds that torch.nn.utils.parametrize computes, by the names that they had as parameters."""
    owners = [owner for kind in kinds for owner in KINDS[kind]]
    return [
        f"{name}.{weight}" if name else weight
        for name, module in model.named_modules()
        if is_parametrized(module)
        for weight in module.parametrizations
        if any(isinstance(module, owner) and re.fullmatch(names, weight) for owner, names in owners)
    ]


def _leave_out(computed: list[str], model: nn.Module, *, alone: bool) -> None:
    came = f"no mask covers what parametrizations of {type(model).__name__} compute: {', '.join(computed)}"
    fix = "make them plain with torch.nn.utils.parametrize.remove_parametrizations"
    if alone:
        raise MaskError(came, allowed="a model with plain weights", fix=fix)
    warnings.warn(f"{came}. To do: {fix}, or leave them dense: exclude={computed}", stacklevel=3)


def _own(module: nn.Module, names: str) -> list[nn.Parameter]:
    """The weights of `module` itself whose names are of the pattern `names`, or what hooks compute these from."""
    return [p for name, p in module.named_parameters(recurse=False) if re.fullmatch(names + _COMPUTED, name)]


def _imported(module: str, name: str) -> tuple[type[nn.Module], ...]:
    """A class of a module that somebody has imported, else nothing: a model can hold none of it then."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)
