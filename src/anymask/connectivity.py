"""What a mask leaves of a network: channels, dead filters, and weights that no path from input to output passes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from anymask.errors import MaskError, SettingError
from anymask.interrupts import Mode
from anymask.mask import Mask
from anymask.prunables import bare, transposed_groups
from anymask.surgery import copied, tensors


@dataclass(frozen=True)
class Layer:
    """What a mask keeps of one parameter.

    Args:
        shape: of the parameter.
        kept, total: weights.
        outs_kept, outs: output channels with at least one kept weight, and all.
        ins_kept, ins: the same for input channels.
    """

    shape: tuple[int, ...]
    kept: int
    total: int
    outs_kept: int
    outs: int
    ins_kept: int
    ins: int

    @property
    def density(self) -> float:
        """Share of kept weights, in [0, 1]."""
        return self.kept / self.total

    @property
    def dead(self) -> int:
        """Dead filters: output channels without a kept weight."""
        return self.outs - self.outs_kept


def structure(mask: Mask, model: nn.Module | None = None) -> dict[str, Layer]:
    """Weights, channels and dead filters that `mask` keeps in each parameter.

    Dimension 0 holds the output channels and dimension 1 the input channels, as in linear layers and convolutions; a vector
    has one input. A mask does not say more, so a grouped convolution shows the inputs of one group, and a transposed one or the
    `Conv1D` of transformers, whose dimensions lie the other way round, its inputs as outputs. With the `model` all are counted as
    they are.

    Raises:
        MaskError: when the mask does not fit the model.

    Example:
        >>> import torch
        >>> layer = structure(Mask({"weight": torch.tensor([[1, 1, 0], [0, 0, 0]])}))["weight"]
        >>> layer.outs_kept, layer.outs, layer.ins_kept, layer.ins, layer.dead
        (1, 2, 2, 3, 1)
    """
    if model is None:
        return {name: _layer(kept) for name, kept in mask.items()}
    weights, inside = mask.check(model), bare(model)
    turned = {id(inside.get_parameter(name)) for name in transposed_groups(inside)}  # by id: a tied one has several names
    owners = {name: inside.get_submodule(name.rpartition(".")[0]) for name in weights}
    return {name: _layer(mask[name], owners[name], turned=id(weight) in turned) for name, weight in weights.items()}


def _layer(kept: Tensor, owner: nn.Module | None = None, *, turned: bool = False) -> Layer:
    """`links` is (groups, outputs, inputs) of one group: True where a kept weight joins the two."""
    groups = getattr(owner, "groups", 1) if kept.ndim > 2 else 1
    rows = kept.reshape(kept.shape[0] if kept.ndim else 1, kept.shape[1] if kept.ndim > 1 else 1, -1).any(2)
    links = rows.reshape(groups, -1, rows.shape[1])
    if turned:
        links = links.transpose(1, 2)
    outs, ins = links.any(2), links.any(1)
    return Layer(tuple(kept.shape), int(kept.sum()), kept.numel(), int(outs.sum()), outs.numel(), int(ins.sum()), ins.numel())


def reachable(mask: Mask, model: nn.Module, example: Tensor) -> Mask:
    """The kept weights that lie on a path of kept weights from the input to the output; the sparsity of it is the effective one.

    A weight that only sees zeros, or whose result nothing uses, takes no part, however the network is trained: effective
    sparsity counts it as a zero (Vysogorets and Kempe, arXiv 2107.02306). Paths run pixel by pixel: in a 3x3 convolution of a
    1x1 map eight of nine weights only see the padding.

    A copy of the model runs once on an input of ones, forwards and backwards, with the mask as its weights and biases of 0; a
    weight is reachable when it is kept and its gradient is over 0. Each product (convolution, linear layer, matmul) is cut to
    0 or 1 both ways, so that nothing over- or underflows at any depth. Norms, activations and dropout hand on what they are
    given, also as functions (`F.layer_norm`); max-pools hand it on from each pixel; differences count as sums.

    Exact for what adds, multiplies, concatenates, pads, moves, pools, norms and activates. Elsewhere it may take an
    unreachable weight for a reachable one: what turns zeros into something (sigmoid, softmax, exp, learned constants such as
    position embeddings) is a source of its own, and a difference that always cancels counts as a path. It is no guide to
    the weights inside `nn.MultiheadAttention`, recurrent layers and parametrisations (weight norm), behind `x.max(dim)` and
    dilated max-pools (only the first maximum is followed), in embeddings (only rows that `example` names are used) and in
    operations of your own that are written as `torch.autograd.Function`.

    Args:
        mask: fits `model`. Of a tied weight what all its entries keep counts.
        model: takes one tensor and gives tensors, also in tuples, lists or mappings. It is left as it is, as is the random state.
            Its forward hooks count: while a recipe is attached, its ghost skips are paths too.
        example: an input (N, ...), for shape and dtype; a floating one is replaced by ones, of one sample.

    Raises:
        MaskError: when the mask does not fit the model, or nothing that the model gives has a gradient.
        SettingError: when the example does not go through the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> mask = Mask({"0.weight": torch.tensor([[1, 0], [0, 1]]), "2.weight": torch.tensor([[1, 0]])})
        >>> mask.sparsity, reachable(mask, net, torch.zeros(1, 2)).sparsity  # nothing uses the second output of layer 0
        (0.5, 0.6666666666666667)
    """
    mask.check(model)
    twin = copied(model).cpu().float().eval().requires_grad_(True)
    _set_weights(twin, mask)
    wanted = mask.check(twin)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        grads = dict(zip(wanted, _gradients(twin, example[:1].detach().cpu(), list(wanted.values())), strict=True))
    kept = {name: mask[name] if _is_bias(name) else parameter > 0 for name, parameter in wanted.items()}
    return Mask({name: kept[name] & (grads[name] > 0) for name in mask}, info=mask.info)


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


@torch.no_grad()
def _set_weights(twin: nn.Module, mask: Mask) -> None:
    """The mask as the weights of `twin`, 1 where it says nothing; biases are 0, as they are no path from the input."""
    for name, parameter in twin.named_parameters():
        parameter.fill_(0 if _is_bias(name) else 1)
    for name, parameter in mask.check(twin).items():
        parameter.masked_fill_(~mask[name], 0)
    for buffer in twin.buffers():
        if buffer.is_floating_point():
            buffer.abs_()


def _gradients(twin: nn.Module, x: Tensor, wanted: list[nn.Parameter]) -> tuple[Tensor, ...]:
    if x.is_floating_point():
        x = torch.ones_like(x, dtype=torch.float32, requires_grad=True) * 1  # times 1: a model may change its input in place
    try:
        with _Paths():
            given = twin(x)
    except (RuntimeError, ValueError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise SettingError(
            f"an input of shape {tuple(x.shape)} does not go through {type(twin).__name__} ({why})",
            allowed="an input that the model takes",
            fix="give an example of the shape and dtype of its data",
        ) from error
    ends = [end for end in tensors(given) if end.requires_grad]
    if not ends:
        raise MaskError(
            f"{type(twin).__name__} gives {type(given).__name__}, in which nothing has a gradient",
            allowed="tensors, also in tuples, lists or mappings",
            fix="give the part of the model that holds the mask, without what comes after it",
        )
    return torch.autograd.grad(ends, wanted, [torch.ones_like(end) for end in ends], allow_unused=True, materialize_grads=True)


# -- arithmetic of paths -------------------------------------------------------------------------------------------


class _Indicator(torch.autograd.Function):
    """1 where something arrives and 0 elsewhere, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad > 0).to(grad.dtype)


class _Paths(Mode):
    """Inside, every function of torch follows its rule, whether a module or the model's own code calls it.

    What depends neither on the input nor on a parameter, such as a causal mask or a table of positions, is computed as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not any(isinstance(given, Tensor) and given.requires_grad for given in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        result = RULES.get(name, func)(*args, **kwargs)
        return _Indicator.apply(result) if name in PRODUCTS else result


def _same(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _lift(input: Tensor, *_: Any, **__: Any) -> Tensor:
    """What makes something of nothing; minus infinity, as attention masks have it, stays nothing."""
    return (input + 1).clamp(min=0)


def _norm_channels(input: Tensor, *_: Any, weight: Tensor | None = None, bias: Tensor | None = None, **__: Any) -> Tensor:
    """(N, C, ...) times its weight (C), which a mask may cover."""
    shape = (-1, *[1] * (input.ndim - 2))
    return _norm(input, weight=None if weight is None else weight.reshape(shape), bias=None if bias is None else bias.reshape(shape))


def _norm(input: Tensor, *_: Any, weight: Tensor | None = None, bias: Tensor | None = None, **__: Any) -> Tensor:
    scaled = input if weight is None else input * weight
    return scaled if bias is None else scaled + bias


def _plus(input: Any, other: Any, *_: Any, **__: Any) -> Tensor:
    return torch.add(input, other)


def _plus_in_place(input: Tensor, other: Any, *_: Any, **__: Any) -> Tensor:
    return input.add_(other)


def _over(input: Tensor, other: Any, *_: Any, **__: Any) -> Tensor:
    """A division by something computed, as norms do it by hand, cuts nothing."""
    return input * _lift(other) if isinstance(other, Tensor) else input / other


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    heads = query.shape[-3] // key.shape[-3] if query.ndim > 3 else 1
    if heads > 1:  # grouped queries
        key, value = (t.repeat_interleave(heads, dim=-3) for t in (key, value))
    return _lift(query @ key.transpose(-2, -1)) @ value


def _max_pool(average: Callable[..., Tensor], exact: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The gradient of a maximum goes to the first of equals only; that of a mean to each of them."""

    def rule(input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, **more: Any) -> Tensor:
        if any(step != 1 for step in (dilation if isinstance(dilation, (tuple, list)) else [dilation])):
            return exact(input, kernel_size, stride, padding, dilation, more.get("ceil_mode", False))
        return average(input, kernel_size, stride or kernel_size, padding, more.get("ceil_mode", False))

    return rule


def _adaptive(average: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, output_size, *_, **__: average(input, output_size)


# The names are those of the functions, which F.relu, torch.relu and Tensor.relu share.
_SAME = (
    "relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_ prelu rrelu rrelu_ elu elu_ selu selu_ celu celu_ gelu silu mish "
    "hardswish tanh tanh_ softsign tanhshrink softshrink hardshrink threshold _threshold threshold_ erf clamp clamp_ clamp_min clip "
    "sqrt neg normalize local_response_norm dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
)
_LIFT = "sigmoid sigmoid_ hardsigmoid softplus softmax log_softmax softmin log_sigmoid logsigmoid exp log rsqrt reciprocal __rdiv__"
RULES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **dict.fromkeys(_SAME.split(), _same),
        **dict.fromkeys(_LIFT.split(), _lift),
        **dict.fromkeys(("batch_norm", "group_norm", "instance_norm"), _norm_channels),
        **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
        **dict.fromkeys(("sub", "subtract", "rsub", "__rsub__", "maximum"), _plus),
        **dict.fromkeys(("sub_", "subtract_"), _plus_in_place),
        **dict.fromkeys(("div", "divide", "true_divide"), _over),
        "scaled_dot_product_attention": _attention,
        "max_pool1d": _max_pool(F.avg_pool1d, F.max_pool1d),
        "max_pool2d": _max_pool(F.avg_pool2d, F.max_pool2d),
        "max_pool3d": _max_pool(F.avg_pool3d, F.max_pool3d),
        "adaptive_max_pool1d": _adaptive(F.adaptive_avg_pool1d),
        "adaptive_max_pool2d": _adaptive(F.adaptive_avg_pool2d),
        "adaptive_max_pool3d": _adaptive(F.adaptive_avg_pool3d),
    }
)
_PRODUCTS = (
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear matmul __matmul__ __rmatmul__ mm bmm "
    "addmm addbmm baddbmm mv addmv dot einsum tensordot scaled_dot_product_attention"
)
PRODUCTS = frozenset(_PRODUCTS.split())
