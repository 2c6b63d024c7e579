"""How data flows through a model: which layers meet which norms, whatever they are called and in whatever order they stand."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from anymask.interrupts import Mode
from anymask.surgery import evaluating, run, tensors

_CONVS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_LINEAR = {F.linear, torch.addmm}  # addmm: transformers' Conv1D
_NORMS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm}
_NORMS |= {torch.batch_norm, torch.layer_norm, torch.group_norm, torch.rms_norm}
_ACTIVATIONS = {F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.leaky_relu, F.elu, F.mish, F.selu, F.prelu, torch.relu, Tensor.relu}
_ACTIVATIONS |= {torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid, F.hardtanh}
_RELUS = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_SAME = {Tensor.permute, torch.permute, Tensor.transpose, torch.transpose, Tensor.movedim, torch.movedim, Tensor.contiguous}
_SAME |= {
    Tensor.to,
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.flatten,
    torch.flatten,
    F.dropout,
    F.dropout2d,
    F.dropout3d,
    Tensor.float,
}


@dataclass(frozen=True)
class Unit:
    """A layer and the norm after it ("layer + norm"), or the norm before it ("norm + layer").

    Shapes have the channels in dimension 1: (N, C, H, W), (N, C, L), (N, C). Where the tensors have them is `entry_dim` and `exit_dim`.
    """

    kind: str  # "conv + norm", "linear + norm", "norm + conv" or "norm + linear"
    layer: nn.Module
    entry: nn.Module  # what enters here ...
    exit: nn.Module  # ... is added to what leaves here
    entry_dim: int
    exit_dim: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    stem: bool  # whether it takes the model's own input

    @property
    def spatial(self) -> bool:
        """Whether the layer looks at more than one place."""
        kernel: Any = getattr(self.layer, "kernel_size", 1)
        return any(k > 1 for k in (kernel if isinstance(kernel, tuple) else (kernel,)))


@dataclass
class _Call:
    module: nn.Module
    given: Tensor | None
    kind: str = ""
    output: Tensor | None = None
    order: int = 0
    used: int = 0  # how often what was given had been used before
    handed: bool = False  # whether another module than those around this one was given the same before
    took: Tensor | None = None  # what hooks of the user's made of what was given


@dataclass
class _Flow:
    """What was seen while the example went through."""

    calls: list[_Call] = field(default_factory=list)
    stack: list[_Call] = field(default_factory=list)
    source: dict[int, int] = field(default_factory=dict)  # a tensor that holds the values of another, moved or cut
    activated: dict[int, int] = field(default_factory=dict)  # the output of an activation -> its input
    uses: Counter = field(default_factory=Counter)
    touched: Counter = field(default_factory=Counter)  # how often a tensor itself was in an argument or in the model's output
    entered: Counter = field(default_factory=Counter)  # how often each module was called
    handed: dict[int, list[_Call]] = field(default_factory=lambda: defaultdict(list))  # to which modules a tensor was given
    alive: list[Any] = field(default_factory=list)  # an id means something only while its tensor lives

    def root(self, tensor: Any) -> int:
        """The tensor whose values `tensor` holds."""
        return self.source.get(id(tensor), id(tensor))


class _Watching(Mode):
    def __init__(self, flow: _Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A norm of to_sparse gives its statistics, too.
        self._note(func, args, kwargs or {}, out=out[0] if str(func) == "anymask.norm.default" else out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, *, out: Any) -> None:
        flow = self.flow
        flow.touched.update(id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        flow.alive.append(out)  # an id must not be used again
        if not isinstance(out, Tensor):
            return  # a tuple of chunks, say: seen by nobody as a unit
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        flow.alive.append(given)
        if func in _SAME and given:
            flow.source[id(out)] = flow.root(given[0])
            return
        flow.uses.update({flow.root(t) for t in given})
        if func in _ACTIVATIONS:
            flow.activated[id(out)] = flow.root(given[0])
        if flow.stack and not flow.stack[-1].kind:
            flow.stack[-1].kind = _kind(func, flow.stack[-1].module)


def _kind(func: Any, module: nn.Module) -> str:
    """What `func`, called in the forward of `module`, makes it."""
    kinds = ((_CONVS, "conv"), (_LINEAR, "linear"), (_NORMS, "norm"), (_RELUS, "relu"))
    if str(func) == "anymask.conv.default":  # a layer of to_sparse; so is the next
        return "linear" if isinstance(module, nn.Linear) else "conv"
    if str(func) == "anymask.norm.default":
        return "norm"
    return next((kind for functions, kind in kinds if func in functions), "")


@torch.no_grad()
def units(model: nn.Module, example: Any) -> list[Unit]:
    """The units of `model`, in the order in which data leaves them.

    A layer is a module whose own forward convolves with its `weight`, or multiplies by it; a norm one whose own forward calls a norm
    of torch. First each layer goes with the norm that alone uses what it gives; then each layer that is left with the norm whose
    output, activated or not, it takes. Modules that are called more than once count where each call of the one is followed by the
    other's, and so do any moves of dimensions in between. Units whose shapes cannot be told apart are left out.

    Args:
        model: any module; nothing in it is changed.
        example: a batch of inputs: a tensor (N, ...), a tuple of positional or a mapping of keyword inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        >>> [(unit.kind, unit.layer is net[1]) for unit in units(net, torch.ones(1, 1, 8, 8))]
        [('conv + norm', True)]
    """
    flow = _watch(model, example)
    inputs = {id(t) for t in tensors(example)}
    layers, norms = _layers(flow)
    pairs = _after(layers, norms, flow)
    taken = {id(c.module) for pair in pairs for c in pair}
    pairs += _before([c for c in layers if id(c.module) not in taken], [c for c in norms if id(c.module) not in taken], flow)
    found: dict[tuple[int, int], list[tuple[_Call, _Call]]] = defaultdict(list)
    for pair in pairs:
        found[id(pair[0].module), id(pair[1].module)].append(pair)
    times = Counter(id(c.module) for c in flow.calls)
    made = []
    for (first, last), every in found.items():
        if times[first] == len(every) == times[last] and _in_turn(every) and (unit := _unit(*every[0], flow=flow, inputs=inputs)):
            made.append((every[0][1].order, unit))
    return [unit for _, unit in sorted(made, key=lambda item: item[0])]


@torch.no_grad()
def before_norms(model: nn.Module, example: Any) -> list[tuple[nn.Module, nn.Module]]:
    """(layer, norm) for each layer whose output a norm alone uses, in the order of the norms; `units` has those that a skip can span.

    Example:
        >>> net = nn.Sequential(nn.ConvTranspose2d(1, 4, 2, stride=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        >>> [(type(layer).__name__, type(norm).__name__) for layer, norm in before_norms(net, torch.ones(1, 1, 8, 8))]
        [('ConvTranspose2d', 'BatchNorm2d')]
    """
    flow = _watch(model, example)
    return [(layer.module, norm.module) for layer, norm in _after(*_layers(flow), flow)]


@torch.no_grad()
def shapes(model: nn.Module, example: Any) -> dict[int, tuple[int, ...]]:
    """The shape of the input of each layer, by the id of its module, in its last call; of norms and activations, too.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> shapes(net, torch.ones(5, 2))[id(net)]
        (5, 2)
    """
    return {id(call.module): tuple(call.took.shape) for call in _watch(model, example).calls if call.took is not None}


@torch.no_grad()
def norms_with_relu(model: nn.Module, example: Any) -> list[tuple[nn.Module, nn.Module, tuple[nn.Module, ...]]]:
    """(norm, `nn.ReLU`, what follows) for each norm whose output goes through that ReLU and nowhere else, all called once.

    Nor is there a module between them, which may do nothing in evaluation and more in training, as one that adds noise does.

    What follows is an `nn.MaxPool2d`, where an `nn.Sequential` has it next after the two, so that nothing can stand between or branch
    off; then the containers that hold a part of the three. It is empty where no such pool is.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        >>> [(type(norm).__name__, type(more[0]).__name__) for norm, _, more in norms_with_relu(net, torch.ones(1, 1, 8, 8))]
        [('BatchNorm2d', 'MaxPool2d')]
    """
    flow = _watch(model, example)
    once = [call for call in flow.calls if flow.entered[id(call.module)] == 1]
    norms = {id(call.output): call.module for call in once if call.kind == "norm"}
    pools = _pools(model, flow.entered)
    found: list[tuple[nn.Module, nn.Module, tuple[nn.Module, ...]]] = []
    for call in once:
        norm = norms.get(id(call.given))
        if (
            norm is not None
            and type(call.module) is nn.ReLU
            and call.used == 0
            and not call.handed
            and (call.module.inplace or flow.touched[id(call.given)] == 1)
        ):
            found.append((norm, call.module, pools.get((norm, call.module), ())))
    return found


def _pools(model: nn.Module, entered: Counter) -> dict[tuple[nn.Module, nn.Module], tuple[nn.Module, ...]]:
    """By the two modules before it in a row of Sequentials: a max pool, and the containers that hold a part of the three."""
    found: dict[tuple[nn.Module, nn.Module], tuple[nn.Module, ...]] = {}
    for row in (module for module in model.modules() if _is_row(module, entered)):
        leaves = list(_leaves(row, entered, ()))
        for (first, in_1), (second, in_2), (pool, in_3) in zip(leaves, leaves[1:], leaves[2:], strict=False):
            if type(pool) is nn.MaxPool2d and entered[id(pool)] == 1:
                found[first, second] = (pool, *({*in_1, *in_2, *in_3} - ({*in_1} & {*in_2} & {*in_3})))
    return found


def _leaves(row: nn.Module, entered: Counter, path: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
    for child in row._modules.values():  # children() leaves out what comes a second time
        assert child is not None
        if _is_row(child, entered):
            yield from _leaves(child, entered, (*path, child))
        else:
            yield child, path


def _is_row(module: nn.Module, entered: Counter) -> bool:
    """Whether a module hands data from child to child and does nothing else, and was called once as a whole."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and entered[id(module)] == 1


def _layers(flow: _Flow) -> tuple[list[_Call], list[_Call]]:
    """The calls of layers with a weight, and those of norms."""
    layers = [c for c in flow.calls if c.kind in {"conv", "linear"} and isinstance(getattr(c.module, "weight", None), Tensor)]
    return layers, [c for c in flow.calls if c.kind == "norm"]


def _watch(model: nn.Module, example: Any) -> _Flow:
    flow, handles = _Flow(), []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        flow.entered[id(module)] += 1
        inside = {id(call) for call in flow.stack}
        others = any(id(call) not in inside and type(call.module) is not nn.Identity for call in flow.handed[id(given)])
        flow.stack.append(_Call(module, given, used=flow.uses[flow.root(given)], handed=others))
        flow.handed[id(given)].append(flow.stack[-1])

    def leave(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = flow.stack.pop()
        # Its shape is asked for later: here that would count as a use.
        call.took = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if call.kind and isinstance(output, Tensor) and call.given is not None:
            call.output, call.order = output, len(flow.calls)
            flow.calls.append(call)

    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        with evaluating(model), _Watching(flow):
            flow.touched.update(id(t) for t in tree_leaves(run(model, example)) if isinstance(t, Tensor))
    finally:
        for handle in handles:
            handle.remove()
    return flow


def _after(layers: list[_Call], norms: list[_Call], flow: _Flow) -> list[tuple[_Call, _Call]]:
    """(layer, norm): the norm alone uses what the layer gives."""
    made = {id(c.output): c for c in layers if flow.uses[id(c.output)] == 1}
    return [(layer, norm) for norm in norms if (layer := made.get(flow.root(norm.given))) is not None]


def _before(layers: list[_Call], norms: list[_Call], flow: _Flow) -> list[tuple[_Call, _Call]]:
    """(norm, layer): the layer takes what the norm gives, through an activation at most; the first that does, where several do."""
    made = {id(c.output): c for c in norms}
    pairs: list[tuple[_Call, _Call]] = []
    for layer in layers:
        root = flow.root(layer.given)
        norm = made.pop(root, None) or made.pop(flow.activated.get(root, 0), None)
        if norm is not None:
            pairs.append((norm, layer))
    return pairs


def _in_turn(pairs: list[tuple[_Call, _Call]]) -> bool:
    """Whether each call of the first is followed by the second's before the first is called again."""
    orders = [call.order for pair in pairs for call in pair]
    return orders == sorted(orders)


def _unit(first: _Call, last: _Call, *, flow: _Flow, inputs: set[int]) -> Unit | None:
    layer, norm = (last, first) if first.kind == "norm" else (first, last)
    assert first.given is not None
    assert last.output is not None
    dim = 1 if layer.kind == "conv" else -1
    near = layer.given if first is norm else layer.output
    far = first.given if first is norm else last.output
    moved = _where(near, far, dim)
    if moved is None:
        return None
    entry_dim, exit_dim = (moved, dim) if first is norm else (dim, moved)
    given, gives = first.given.movedim(entry_dim, 1), last.output.movedim(exit_dim, 1)
    if (
        given.ndim != gives.ndim
        or not given.is_floating_point()
        or any(a < b for a, b in zip(given.shape[2:], gives.shape[2:], strict=True))
    ):
        return None  # space grows, or something else than space changes
    if layer.kind == "linear" and given.shape[2:] != gives.shape[2:]:
        return None
    kind = f"norm + {layer.kind}" if first is norm else f"{layer.kind} + norm"
    return Unit(
        kind, layer.module, first.module, last.module, entry_dim, exit_dim, tuple(given.shape), tuple(gives.shape),
        stem=flow.root(first.given) in inputs,
    )  # fmt: skip


def _where(near: Any, far: Any, dim: int) -> int | None:
    """The dimension of the channels in `far`, which holds as many as `near` does in `dim`: 1 or the last; None where it is neither."""
    if far.shape == near.shape:
        return dim
    other = -1 if dim == 1 else 1
    return other if far.ndim == near.ndim and near.movedim(dim, other).shape == far.shape else None
