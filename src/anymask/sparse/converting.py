"""A model's layers to sparse ones, and back."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from anymask.dataflow import norms_with_relu, shapes
from anymask.errors import SettingError
from anymask.interrupts import uninterrupted
from anymask.kernels import Gather, available, why_not
from anymask.mask import Mask
from anymask.prunables import bare, compact
from anymask.sparse import layers, memory, semi_structured
from anymask.sparse.tuning import times, worth_it
from anymask.surgery import evaluating, run

DENSE: dict[type, type] = {  # sparse class -> the class it was made of
    layers.SparseConv2d: nn.Conv2d,
    layers.SparseLinear: nn.Linear,
    layers.BatchLastNorm2d: nn.BatchNorm2d,
    layers.FusedReLU: nn.ReLU,
    layers.BatchLastMaxPool2d: nn.MaxPool2d,
    layers.BatchLastAvgPool2d: nn.AvgPool2d,
    layers.BatchLastZeroPad3d: nn.ZeroPad3d,
}


def dense_class(layer: nn.Module) -> type | None:
    """The class that a converted layer had before; None for any other."""
    kind = type(layer)
    return kind.__mro__[2] if issubclass(kind, layers.FusedSum) else DENSE.get(kind)


_SPARSE = {dense: sparse for sparse, dense in DENSE.items()}
_PLAIN = (nn.MaxPool2d, nn.AvgPool2d, nn.ZeroPad3d)  # need nothing but another class


def gather_for(layer: nn.Module, kept: Tensor) -> Gather | None:
    """The tables of a Conv2d or Linear with the kept places `kept` (bool, of its weight's shape); None where they have no form."""
    places = kept.flatten().nonzero().flatten().numpy()
    if type(layer) is nn.Linear:
        return Gather((layer.out_features, layer.in_features, 1, 1), places)
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        padding = layer.padding
        if isinstance(padding, str):
            spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            if padding == "same" and any(span % 2 for span in spans):
                return None  # more on one side than on the other
            padding = tuple(span // 2 if padding == "same" else 0 for span in spans)
        how: dict[str, Any] = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups}
        return Gather(tuple(layer.weight.shape), places, **how)  # type: ignore[arg-type]
    return None


@torch.no_grad()
def sparsify(layer: Any, gather: Gather, optimizer: Optimizer | None = None) -> None:
    """Change one layer in place: its weight, gradient and optimiser slots keep their identity and become vectors (K,)."""
    layer.gather, layer.dense_shape, layer.dense_stride = gather, tuple(layer.weight.shape), layer.weight.stride()
    places = torch.from_numpy(gather.conv.kept)
    _reshape(layer.weight, lambda dense: dense.reshape(-1)[places], shape=layer.dense_shape, optimizer=optimizer)
    layer.__class__ = _SPARSE[type(layer)]


@torch.no_grad()
def densify(layer: Any, optimizer: Optimizer | None = None) -> None:
    """Change one layer back, with the memory layout that its weight had."""

    def scatter(values: Tensor) -> Tensor:
        dense = layer.scatter(values)
        return dense.new_empty_strided(dense.shape, layer.dense_stride).copy_(dense)

    _reshape(layer.weight, scatter, shape=tuple(layer.weight.shape), optimizer=optimizer)
    layer.__class__ = DENSE[type(layer)]
    del layer.gather, layer.dense_shape, layer.dense_stride


def _reshape(weight: nn.Parameter, change: Callable[[Tensor], Tensor], *, shape: tuple[int, ...], optimizer: Optimizer | None) -> None:
    with torch.inference_mode(weight.is_inference()), torch.no_grad():  # whatever the caller is in, or a model that trains could not go on
        gradient, weight.grad = weight.grad, None
        changed = change(weight.data)
        # A graph that lives on (a loss in a variable) holds the node that adds up gradients of the old shape, and the next graph would take
        # that one, too; PyTorch makes a new one where the type changes.
        weight.data = weight.data.new_empty(0, dtype=torch.float64)
        weight.data = changed
        if gradient is not None:
            weight.grad = change(gradient)
        slots = {} if optimizer is None else optimizer.state.get(weight, {})
        for name, slot in slots.items():
            if isinstance(slot, Tensor) and tuple(slot.shape) == shape:
                slots[name] = change(slot)


def to_sparse(model: nn.Module, mask: Mask, example: Any, *, optimizer: Optimizer | None = None, measure: bool = True) -> nn.Module:
    """Let the masked layers of `model` store and compute their kept weights alone, in place, where that is faster on this machine.

    Forward pass, input gradient and weight gradient of a Conv2d or Linear take time in proportion to what is kept, and its weight,
    gradient and optimiser slots are vectors (K,) of that size. Parameters keep their identity and names, state dicts hold the dense
    weights, hooks and techniques stay where they are. What lies between (batch norm with its ReLU and max pool, pools) follows the
    memory layout of the kernels (C, H, W, N). Layers of other kinds, those that the mask leaves out, and those that are measured slower
    stay dense; so do all, with a warning, where the model cannot compute the example with sparse ones. A norm does the ReLU and the max
    pool after it too, while nobody hooks into them: a part of the model that is cut off between them, such as `model[:2]`, gives what
    comes after them.

    State dicts are copies: what is written into one in place (timm's `ModelEma`, `state[name].copy_(...)`) does not reach a sparse layer.
    Load it with `load_state_dict`, and average `parameters()`, as `torch.optim.swa_utils.AveragedModel` does. Call `to_dense` before
    modules are replaced or parametrized: a norm goes on doing the ReLU that it was converted with.

    Args:
        model: on the CPU, float32; changed in place.
        mask: what is kept; must fit `model`. Pruned weights become 0; `hold` keeps them so in the layers that stay dense.
        example: inputs as they will come, with their batch size, because that decides what is faster.
        optimizer: one that has made steps already: its slots are converted, too.
        measure: False converts every layer that can be; where that is none, a warning names the kinds that stay dense.

    Returns:
        `model` itself. Second derivatives are refused. A mask that `rewire` moves takes new tables when it moves, and only then; in a copy
        it does not move, so an average of the weights (EMA) of such a training wants dense layers.

    Raises:
        MaskError: when the mask does not fit.
        SettingError: without the native kernels, on another device, for a model that is sparse already, or an optimizer whose slots are not
            of the shape of its parameters.

    Example:
        >>> import torch, anymask
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> mask = anymask.prune(net, "magnitude", sparsity=0.9)
        >>> net = anymask.to_sparse(net, mask, torch.ones(8, 64), measure=False)
        >>> net[0].weight.shape, net.state_dict()["0.weight"].shape
        (torch.Size([410]), torch.Size([64, 64]))
    """
    parameters = _check(model, mask)
    if optimizer is not None:
        _check_slots(parameters, optimizer)
    memory.prepare()
    mask.apply(model)
    owners = {f"{name}.weight" if name else "weight": module for name, module in model.named_modules()}
    inputs, found = shapes(model, example), norms_with_relu(model, example)
    tables: dict[str, tuple[Any, Gather]] = {}
    able = inputs.keys() - semi_structured.in_fused_layers(model)
    for name, parameter in parameters.items():
        layer: Any = owners.get(name)
        gather = gather_for(layer, mask[name]) if id(layer) in able and not _tied(model, parameter) else None
        if gather is not None:
            tables[name] = layer, gather
    chosen = set(tables)
    if not (measure or tables):
        kinds = sorted({type(bare(model).get_submodule(name.rpartition(".")[0])).__name__ for name in parameters})
        which = "nn.Conv2d and nn.Linear that the example reaches (no subclasses, no tied weights, no wrapped model) become sparse"
        warnings.warn(f"to_sparse leaves all layers dense: {', '.join(kinds)}. Only {which}", stacklevel=2)
    if measure:
        chosen = worth_it({name: times(layer, gather, inputs[id(layer)]) for name, (layer, gather) in tables.items()})
    with uninterrupted():
        for name in chosen:
            sparsify(*tables[name], optimizer)
        if chosen:
            _follow(model, found)
    if chosen and (why := _failure(model, example)):
        to_dense(model, optimizer=optimizer)
        warnings.warn(
            f"to_sparse leaves all layers dense: with sparse ones the model fails ({why}). Their maps have the batch last in memory, which "
            "reshape and flatten take and view does not always, and their weights are vectors",
            stacklevel=2,
        )
    return model


def to_dense(model: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Undo `to_sparse` or `to_semi_structured`, in place: the same layers and values as if it had never been.

    Args:
        model: any module; one without sparse layers stays as it is.
        optimizer: its slots become dense, too.

    Raises:
        SettingError: before anything is changed, for a sparse layer whose weight is parametrized or pruned by PyTorch, or an
            optimizer whose slots are not of the shape of its parameters.

    Example:
        >>> import torch, anymask
        >>> net = torch.nn.Linear(8, 8)
        >>> mask = anymask.prune(net, "magnitude", sparsity=0.5)
        >>> to_dense(anymask.to_sparse(net, mask, torch.ones(2, 8), measure=False)).weight.shape
        torch.Size([8, 8])
    """
    _check_plain(model)
    if optimizer is not None:
        _check_slots({name: layer.weight for name, layer in compact(model).items()}, optimizer)
    with uninterrupted():
        for layer in model.modules():
            semi_structured.densify(layer)
            if isinstance(layer, layers.SparseWeight):
                densify(layer, optimizer)
            elif kind := dense_class(layer):
                if not isinstance(layer, layers.FusedSum):
                    layers.unlink(layer)
                layer.__class__ = kind
    return model


class Pause:
    """Sparse layers that are dense for a while, because their mask is about to move; `resume` makes new tables for the new mask.

    Example:
        >>> import torch, anymask
        >>> net = torch.nn.Linear(4, 4)
        >>> net = to_sparse(net, anymask.Mask({"weight": torch.eye(4)}), torch.ones(2, 4), measure=False)
        >>> pause = Pause(net, None)
        >>> net.weight.shape
        torch.Size([4, 4])
        >>> pause.resume(anymask.Mask({"weight": torch.ones(4, 4)}))
        >>> net.weight.shape
        torch.Size([16])
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._layers, self._optimizer = compact(model), optimizer
        with uninterrupted():
            for layer in self._layers.values():
                densify(layer, optimizer)

    def resume(self, mask: Mask) -> None:
        """Sparse again, with what `mask` keeps."""
        for name, layer in self._layers.items():
            gather = gather_for(layer, mask[name])
            assert gather is not None  # it had one before
            sparsify(layer, gather, self._optimizer)


@contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """Inside the block the sparse layers of `model` are dense; afterwards they are sparse again, with the values that they have then.

    Example:
        >>> with as_dense(torch.nn.Linear(2, 2)):
        ...     pass  # nothing to do
    """
    kinds = [(layer, type(layer)) for layer in model.modules() if dense_class(layer)]
    tables = {layer: layer.gather for layer, _ in kinds if isinstance(layer, layers.SparseWeight)}
    try:
        with uninterrupted():
            for layer, _ in kinds:
                if layer in tables:
                    densify(layer)
                else:
                    layer.__class__ = cast("type[nn.Module]", dense_class(layer))
        yield
    finally:
        with uninterrupted():
            for layer, kind in kinds:
                if isinstance(layer, layers.SparseWeight):
                    continue  # what came in between came before it was dense
                if layer in tables:
                    sparsify(layer, tables[layer])
                else:
                    layer.__class__ = kind


def _check(model: nn.Module, mask: Mask) -> dict[str, nn.Parameter]:
    if not available():
        raise SettingError("to_sparse has no native kernels", allowed="a machine where they were built", fix=why_not())
    if compact(model):
        raise SettingError("this model is sparse already", allowed="a dense model", fix="call anymask.to_dense first")
    parameters = mask.check(model)
    odd = [name for name, p in parameters.items() if p.device.type != "cpu" or p.dtype != torch.float32]
    if odd:
        first = parameters[odd[0]]
        raise SettingError(f"{odd[0]} is {first.dtype} on {first.device}", allowed="float32 on the CPU", fix="leave the model dense there")
    return parameters


def _check_plain(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, layers.SparseWeight) and (type(layer) not in DENSE or "weight" not in layer._parameters):
            raise SettingError(
                f"the weight of the sparse layer {name or type(model).__name__} came parametrized, or pruned by torch.nn.utils.prune",
                allowed="sparse layers as to_sparse made them",
                fix="take that off first (parametrize.remove_parametrizations, prune.remove), and put it on the dense layer",
            )


_BY_SHAPE = ("Adafactor", "LBFGS")  # what they keep depends on whether a weight is a matrix, or on how many numbers all of them have


def _check_slots(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Refuse slots that are neither numbers nor shaped like their weight, such as Adafactor's rows: they cannot be converted."""
    for name, weight in parameters.items():
        for slot, value in optimizer.state.get(weight, {}).items():
            tensors = [part for part in tree_leaves(value) if isinstance(part, Tensor)]
            if any(tensor.numel() > 1 and tensor.shape != weight.shape for tensor in tensors) or (tensors and tensors[0] is not value):
                raise SettingError(
                    f"{type(optimizer).__name__} keeps {slot} of {name} in a shape of its own",
                    allowed="an optimizer whose slots have the shape of the weight, as those of SGD, Adam and RMSprop have",
                    fix="convert the model before the optimizer is made, or make another one after",
                )
    if parameters and optimizer.state and type(optimizer).__name__ in _BY_SHAPE:
        raise SettingError(
            f"{type(optimizer).__name__} has made steps, and what it keeps is of the layers as they are now",
            allowed="an optimizer whose slots have the shape of the weight, as those of SGD, Adam and RMSprop have",
            fix="convert the model before the optimizer is made, or make another one after",
        )


@torch.no_grad()
def _failure(model: nn.Module, example: Any) -> str:
    """What goes wrong when the model computes the example, which it could before; empty where nothing does."""
    try:
        with evaluating(model):
            run(model, example)
    except Exception as error:  # it is the user's code
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _tied(model: nn.Module, parameter: nn.Parameter) -> bool:
    return sum(other is parameter for _, other in model.named_parameters(remove_duplicate=False)) > 1


def _follow(model: nn.Module, found: list[tuple[nn.Module, nn.Module, tuple[nn.Module, ...]]]) -> None:
    """Let the layers between sparse ones keep the memory layout."""
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = layers.BatchLastNorm2d
        elif type(layer) in _PLAIN:
            layer.__class__ = _SPARSE[type(layer)]
        elif getattr(layer, "anymask_sum", False):
            layer.__class__ = layers.fused_sum(type(layer))  # type: ignore[arg-type]  # mypy takes no class for hashable
    for norm, relu, more in found:
        if isinstance(norm, layers.BatchLastNorm2d):
            relu.__class__ = layers.FusedReLU
            norm.__dict__["relu"], relu.__dict__["norm"] = (relu,), (norm,)
            norm.__dict__["done"], norm.__dict__["waiting"] = norm.done, set()
            if more and isinstance(pool := more[0], layers.BatchLastMaxPool2d) and pool.is_tiling():
                norm.__dict__["pool"], pool.__dict__["norm"] = more, (norm,)
