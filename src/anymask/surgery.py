"""Looking into models: what they are made of, what they take and give."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from anymask.errors import DataError, TechniqueError
from anymask.interrupts import Mode
from anymask.prunables import bare, compact

_OFF = 0.05  # by which probabilities of classes may miss 1: those of bfloat16 do by 0.01
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs of `model` go: the device of its first parameter."""
    return next(model.parameters(), torch.empty(0)).device


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What `model` is made of, a line a thing: modules with their type and attributes, parameters, buffers, hooks.

    Two fingerprints are equal when nothing was added, removed, renamed, replaced or left behind; values of weights and
    training mode do not count.

    Example:
        >>> from torch import nn
        >>> fingerprint(nn.ReLU())["module "].startswith("torch.nn.modules.activation.ReLU")
        True
    """
    found = form(model)
    for name, module in model.named_modules(remove_duplicate=False):
        plain = sorted(key for key in vars(module) if not key.endswith("hooks"))
        found[f"module {name}"] += f" attributes {plain} {module.extra_repr()}"
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] += f" {parameter.requires_grad}"
    return found


def form(model: nn.Module, *, dense: bool = False) -> dict[str, str]:
    """As `fingerprint`, without what a loop may change in the middle of a training: attributes, and which parameters are frozen.

    With `dense`, neither which layers are sparse (`anymask.to_sparse`): while a mask moves they are not for some steps.

    Example:
        >>> from torch import nn
        >>> list(form(nn.Linear(1, 1)))
        ['module ', 'parameter weight', 'parameter bias']
    """
    found: dict[str, str] = {}
    shapes = {name: layer.dense_shape for name, layer in compact(model).items()} if dense else {}
    for name, module in model.named_modules(remove_duplicate=False):
        made = next(kind for kind in type(module).__mro__ if not dense or not kind.__module__.startswith("anymask.sparse"))
        kind = f"{made.__module__}.{made.__qualname__}"
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("hooks") and value}
        found[f"module {name}"] = f"{kind} id {id(module)} hooks {hooks}"
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = f"{shapes.get(name, tuple(parameter.shape))} {parameter.dtype} id {id(parameter)}"
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found[f"buffer {name}"] = f"{tuple(buffer.shape)} {buffer.dtype}"
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What is new, gone or changed between two forms of a model.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential()
        >>> before = form(net)
        >>> net = net.append(nn.ReLU())
        >>> changes(before, form(net))
        ['module 0 is new']
    """
    keys = sorted(key for key in {*after, *before} if after.get(key) != before.get(key))
    how = {key: "new" if key not in before else "gone" if key not in after else "changed" for key in keys}
    return [f"{'the model itself' if key == 'module ' else key} is {what}" for key, what in how.items()]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of `model` without its wrapper, with its hooks, which fire in it too; the model itself stays as it is.

    Weights that a hook computes from others before each call (torch.nn.utils.prune, the older weight_norm) are plain tensors
    with a graph, which deepcopy refuses: they are copied by value, and the copy computes its own.

    Example:
        >>> from torch.nn.utils import prune
        >>> twin = copied(prune.identity(nn.Linear(2, 2), "weight"))
        >>> twin.weight_orig.requires_grad, twin.weight.requires_grad
        (True, False)
    """
    model = bare(model)
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf})


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each module is in the mode it was in.

    Example:
        >>> from torch import nn
        >>> net = nn.Dropout()
        >>> with evaluating(net):
        ...     print(net.training)
        False
        >>> net.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def twice_differentiable(model: nn.Module, *, fix: str) -> Iterator[None]:
    """A block in which the gradients of `model` have gradients, wherever PyTorch can: fused attentions have none, nor hard sigmoids.

    Raises:
        TechniqueError: for a forward pass in the block that cannot be differentiated twice all the same; `fix` says what to do.

    Example:
        >>> import torch
        >>> x = torch.ones(1, requires_grad=True)
        >>> with twice_differentiable(nn.Hardsigmoid(), fix="take another network"):
        ...     (slope,) = torch.autograd.grad(nn.Hardsigmoid()(x).square().sum(), x, create_graph=True)
        ...     round(torch.autograd.grad(slope, x)[0].item(), 4)
        0.0556
    """
    try:
        with sdpa_kernel(SDPBackend.MATH), _HardSigmoids():
            yield
    except RuntimeError as error:
        if isinstance(error, TechniqueError) or not any(part in str(error) for part in ("derivative for", "a second time")):
            raise
        said = f"{type(model).__name__} cannot be differentiated twice ({error})"
        raise TechniqueError(said, allowed="a forward pass that can, and keeps no tensor", fix=fix) from None


def uncapped() -> Mode:
    """A block in which ReLU6, function or module, is ReLU.

    Example:
        >>> import torch
        >>> with uncapped():
        ...     nn.ReLU6()(torch.tensor([-1.0, 7.0])).tolist()
        [0.0, 7.0]
    """
    return _Uncapped()


class _Uncapped(Mode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        low = kwargs.get("min_val", args[1] if len(args) > 1 else None)
        if func is F.relu6 or (func in (F.hardtanh, F.hardtanh_) and low == 0):  # which is how nn.ReLU6 calls it
            return F.relu(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


class _HardSigmoids(Mode):
    """Hard sigmoid out of parts: torch's own (2.13) has no second derivative, and MobileNet v3 is full of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6((args[0] if args else kwargs["input"]) + 3) / 6
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, example: Any) -> Any:
    """What `model` gives for `example`: one tensor, a tuple or list of positional inputs, or a mapping of keyword inputs.

    Example:
        >>> import torch
        >>> run(nn.Identity(), {"input": torch.ones(1)}), run(nn.Identity(), (torch.ones(1),))
        (tensor([1.]), tensor([1.]))
    """
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def tensors(given: Any) -> list[Tensor]:
    """The tensors in a tensor, tuple, list or mapping, or in such within one another, in their order.

    Example:
        >>> import torch
        >>> tensors({"loss": None, "logits": torch.ones(1), "states": (torch.zeros(1),)})
        [tensor([1.]), tensor([0.])]
    """
    if isinstance(given, Tensor):
        return [given]
    parts = given.values() if isinstance(given, Mapping) else given if isinstance(given, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def samples(inputs: Any) -> int:
    """How many samples `inputs` (as `run` takes them) hold: the length of their first tensor, which is within another part if need be.

    Raises:
        TechniqueError: when there is no tensor (N, ...).

    Example:
        >>> import torch
        >>> samples({"input_ids": torch.ones(4, 7)})
        4
    """
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    own = [part for part in parts if isinstance(part, Tensor)]  # first: what lies deeper may be states, (layers, N, ...)
    found = next((len(tensor) for tensor in (*own, *tensors(inputs)) if tensor.ndim), None)
    if found is None:
        raise TechniqueError(
            f"inputs came as {type(inputs).__name__} without a tensor of samples",
            allowed="a tensor (N, ...), or a tuple or mapping that holds one",
            fix="give batches of (inputs, targets)",
        )
    return found


def logits_of(output: Any) -> Tensor:
    """The tensor that a loss takes: `output` itself, its `logits` (as Hugging Face calls them), or its first tensor.

    Raises:
        TechniqueError: when there is none.

    Example:
        >>> import torch
        >>> logits_of({"loss": None, "logits": torch.ones(1)})
        tensor([1.])
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    first = next((part for part in output if isinstance(part, Tensor)), None) if isinstance(output, (tuple, list)) else None
    if first is None:
        raise TechniqueError(
            f"the model's output is a {type(output).__name__}",
            allowed="a tensor, an output with logits, or a tuple with a tensor in it",
            fix="give the tensor that the loss is of; for anymask.prune, wrap the model in one that returns it",
        )
    return first


def check_targets(loss: Any, logits: Tensor, target: Any) -> None:
    """Refuse numbers as targets (N, ...) where `loss` was left at cross entropy of logits (N, C, ...): it gives 0, or nonsense.

    Raises:
        DataError: for floating-point targets that are no probabilities of the classes; a sample without any (all 0) passes.

    Example:
        >>> check_targets(F.cross_entropy, torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.3, 0.7]]))
    """
    if inspect.unwrap(loss) is not F.cross_entropy or not isinstance(target, Tensor) or not target.is_floating_point():
        return
    shares = target.shape == logits.shape and target.dim() > 1 and target.shape[1] > 1
    sums = target.sum(1) if shares else target
    if not shares or bool((target < 0).any()) or bool(((sums != 0) & ((sums - 1).abs() > _OFF)).any()):
        raise DataError(
            f"targets came as {str(target.dtype).removeprefix('torch.')} of shape {tuple(target.shape)}, and the loss is cross entropy",
            allowed=f"numbers of classes, or probabilities in the shape of the outputs, {tuple(logits.shape)}, which sum to 1",
            fix="give class numbers as integers, y.long(), or the loss of your training, such as loss=torch.nn.functional.mse_loss",
        )


def needs_whole(parameters: Iterable[Tensor], what: str, *, fix: str) -> None:
    """Raises TechniqueError where `fully_shard` has cut one of `parameters`, which `what` has to see whole.

    Example:
        >>> needs_whole(nn.Linear(2, 2).parameters(), "rescale on Linear", fix="call it before fully_shard")
    """
    if any(hasattr(parameter, "to_local") for parameter in parameters):
        came = f"{what}, whose parameters are cut by fully_shard"
        raise TechniqueError(came, allowed="a model that is whole on each rank", fix=fix)


@dataclass(frozen=True)
class Cost:
    """Parameters, and floating-point operations of one sample's forward pass (a multiply-add counts 2)."""

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.flops + other.flops)
