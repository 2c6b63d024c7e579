"""Which operations of PyTorch can be shipped, and as what: one row of a table each."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from anymask.shipping.calls import Given, Trace, Value
from anymask.shipping.ops import (
    Activation,
    AdaptivePool,
    Add,
    AvgPool,
    Cat,
    Clamp,
    Conv,
    Linear,
    MaxPool,
    Mul,
    Op,
    Pad,
    Permute,
    Reshape,
    Scale,
    Shape,
    Slice,
    Wrong,
)
from anymask.shipping.plan import Array


# -- layers --------------------------------------------------------------------------------------------------------
def _weight(given: Given) -> dict[str, Array]:
    """All weights that are not 0, with their positions; and the bias."""
    weight, bias = given.array("weight"), given.array("bias")
    assert weight is not None
    positions = np.flatnonzero(weight)
    return {"positions": positions, "values": weight.reshape(-1)[positions]} | ({} if bias is None else {"bias": bias})


def _conv(trace: Trace, given: Given) -> Value:
    x, shape, arrays = given.value(), tuple(given["weight"].shape), _weight(given)
    dilation = given.pair("dilation")
    if isinstance(given["padding"], str):
        spans = [d * (k - 1) if given["padding"] == "same" else 0 for d, k in zip(dilation, shape[2:], strict=True)]
        padding = (spans[0] // 2, spans[1] // 2)
        if spans[0] % 2 or spans[1] % 2:  # one more after than before
            x = trace.add(Pad((0, 0, 0, spans[0] % 2, 0, spans[1] % 2)), x)
    else:
        padding = given.pair("padding")
    conv = Conv(
        outputs=shape[0],
        inputs=shape[1] * given["groups"],
        kept=len(arrays["values"]),
        bias="bias" in arrays,
        kernel=(shape[2], shape[3]),
        stride=given.pair("stride"),
        padding=padding,
        dilation=dilation,
        groups=given["groups"],
    )
    return trace.add(conv, x, **arrays)


def _linear(trace: Trace, given: Given) -> Value:
    outputs, inputs = given["weight"].shape
    arrays = _weight(given)
    return trace.add(Linear(outputs, inputs, kept=len(arrays["values"]), bias="bias" in arrays), given.value(), **arrays)


def _norm(trace: Trace, given: Given) -> Value:
    mean, var, weight, bias = (given.array(name) for name in ("running_mean", "running_var", "weight", "bias"))
    if given.get("training") or mean is None or var is None:
        raise Wrong("a batch norm that takes its statistics from the batch")
    scale = 1 / np.sqrt(var.astype(np.float64) + given["eps"]) * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    return trace.add(Scale(len(mean)), given.value(), scale=scale.astype(np.float32), shift=shift.astype(np.float32))


def _native_norm(trace: Trace, given: Given) -> list[Value | None]:
    return [_norm(trace, given), None, None]


# -- one number after the other ------------------------------------------------------------------------------------
def _activation(kind: str) -> "Handler":
    return lambda trace, given: trace.add(Activation(kind), given.value())


def _gelu(trace: Trace, given: Given) -> Value:
    return trace.add(Activation("gelu-tanh" if given["approximate"] == "tanh" else "gelu"), given.value())


def _clamp(low: str, high: str) -> "Handler":
    def bound(given: Given, name: str) -> float | None:
        found = given.get(name)
        if found is not None and not isinstance(found, (int, float)):
            raise Wrong(f"{name} is a tensor")
        return None if found is None or math.isinf(found) else float(found)

    def handle(trace: Trace, given: Given) -> Value:
        bounds = bound(given, low), bound(given, high)
        return given.value() if bounds == (None, None) else trace.add(Clamp(*bounds), given.value())

    return handle


def _binary(op: Op, *, sign: float = 1.0, inverse: bool = False) -> "Handler":
    """Add, subtract, multiply or divide: two values, or a value and numbers that are the same at each place of a map."""

    def handle(trace: Trace, given: Given) -> Value:
        first, second, alpha = given["self"], given["other"], given.get("alpha")
        factor = sign * (1 if alpha is None else alpha)
        if given.get("rounding_mode"):
            raise Wrong("a division that is rounded")
        if isinstance(first, Value) and isinstance(second, Value):
            if inverse:
                raise Wrong("one value divided by another")
            return trace.add(op, first, second if factor == 1 else _scaled(trace, second, factor, 0.0))
        value, number = (first, second) if isinstance(first, Value) else (second, first)
        if not isinstance(first, Value) and (inverse or sign != 1):
            raise Wrong("a number divided by a value, or less it")
        each = _per_channel(number, trace.shape(value))
        if isinstance(op, Mul):
            return _scaled(trace, value, 1 / each if inverse else each, 0.0)
        return _scaled(trace, value, 1.0, factor * each) if value is first else _scaled(trace, value, factor, each)

    return handle


def _reversed(trace: Trace, given: Given) -> Value:
    """A number less a value."""
    value = given.value()
    return _scaled(trace, value, -float(given["alpha"]), _per_channel(given["other"], trace.shape(value)))


def _scaled(trace: Trace, value: Value, scale: Any, shift: Any) -> Value:
    channels = trace.shape(value)[0]
    numbers = {name: np.broadcast_to(np.asarray(of, np.float32), channels).copy() for name, of in (("scale", scale), ("shift", shift))}
    return trace.add(Scale(channels), value, **numbers)


def _per_channel(number: Any, shape: Shape) -> Array:
    """A number, or a tensor of one for each channel, as float64 (channels,) or ()."""
    array = np.asarray(number.double().numpy() if isinstance(number, Tensor) else float(number))
    if array.size == 1:
        return array.reshape(())
    own = array.reshape((1,) * (len(shape) + 1 - array.ndim) + array.shape)
    if own.ndim != len(shape) + 1 or own.size != shape[0] or own.shape[1] != shape[0]:
        raise Wrong(f"a tensor of shape {array.shape}, where one number or one for each channel is needed")
    return own.reshape(-1)


# -- windows -------------------------------------------------------------------------------------------------------
def _windows(given: Given) -> dict[str, Any]:
    kernel = given.pair("kernel_size")
    return {"kernel": kernel, "stride": given.pair("stride") if given["stride"] else kernel,
            "padding": given.pair("padding"), "ceil": bool(given["ceil_mode"])}  # fmt: skip


def _max_pool(trace: Trace, given: Given) -> Value:
    return trace.add(MaxPool(**_windows(given), dilation=given.pair("dilation")), given.value())


def _native_max_pool(trace: Trace, given: Given) -> list[Value | None]:
    return [_max_pool(trace, given), None]


def _avg_pool(trace: Trace, given: Given) -> Value:
    padding, divisor = bool(given["count_include_pad"]), given["divisor_override"] or 0
    if divisor < 0:
        raise Wrong(f"a mean divided by {divisor}")
    return trace.add(AvgPool(**_windows(given), count_padding=padding, divisor=divisor), given.value())


def _adaptive_pool(trace: Trace, given: Given) -> Value:
    _, *size = given.shape()
    return trace.add(AdaptivePool((size[0], size[1])), given.value())


def _mean(trace: Trace, given: Given) -> Value:
    """The mean over a whole map."""
    value, dims = given.value(), given["dim"]
    if len(trace.shape(value)) != 3 or dims is None or sorted(dim % 4 for dim in dims) != [2, 3]:
        raise Wrong(f"a mean over dimensions {dims}, where only that over height and width can be shipped")
    pooled = trace.add(AdaptivePool(), value)
    return pooled if given["keepdim"] else trace.add(Reshape(trace.shape(value)[:1]), pooled)


# -- shapes --------------------------------------------------------------------------------------------------------
def _same(trace: Trace, given: Given) -> Value:
    value = given.value()
    if given.get("train") or given.get("training"):
        raise Wrong("it is as in training")
    return value


def _reshape(trace: Trace, given: Given) -> Value:
    value, shape = given.value(), given.shape()
    return value if shape == trace.shape(value) else trace.add(Reshape(shape), value)


def _pad(trace: Trace, given: Given) -> Value:
    value, by = given.value(), list(given["pad"])
    if given.get("mode") not in (None, "constant"):
        raise Wrong(f"a padding of mode {given['mode']!r}")
    if len(trace.shape(value)) != 3 or len(by) > 6 or min(by, default=0) < 0:
        raise Wrong(f"a padding {by} of {trace.shape(value)}")
    if not math.isfinite(given["value"] or 0.0):
        raise Wrong(f"a padding by {given['value']}, where finite numbers can be shipped")
    by += [0] * (6 - len(by))  # the last dimension comes first
    return trace.add(Pad((*by[4:], *by[2:4], *by[:2]), float(given["value"] or 0.0)), value)


def _dim(given: Given, shape: Shape) -> int:
    """A dimension, counted from the front, of (N, *shape)."""
    return given["dim"] % (len(shape) + 1)


def _cat(trace: Trace, given: Given) -> Value:
    values = given["tensors"]
    if not all(isinstance(value, Value) for value in values) or _dim(given, trace.shape(values[0])) != 1:
        raise Wrong("tensors one after the other along another dimension than the channels, or with constants")
    return trace.add(Cat(), *values)


def _cut(trace: Trace, given: Given, lengths: list[int]) -> list[Value]:
    """Parts of so many channels."""
    value = given.value()
    if _dim(given, trace.shape(value)) != 1:
        raise Wrong("parts along another dimension than the channels")
    ends = np.cumsum([0, *lengths]).tolist()
    return [trace.add(Slice(begin, end), value) for begin, end in pairwise(ends)]


def _chunk(trace: Trace, given: Given) -> list[Value]:
    return _cut(trace, given, [part.shape[1] for part in given.node.meta["val"]])


def _slice(trace: Trace, given: Given) -> Value:
    value = given.value()
    shape, dim = trace.shape(value), _dim(given, trace.shape(value))
    if given.shape() == shape and dim != 0:
        return value
    if dim == 0 and not given["start"] and given["end"] in (None, 2**63 - 1) and given["step"] == 1:
        return value
    if dim != 1 or given["step"] != 1:
        raise Wrong("a part along another dimension than the channels")
    start = given["start"] or 0
    start = max(0, start + shape[0]) if start < 0 else start  # before the beginning is the beginning
    return trace.add(Slice(start, start + given.shape()[0]), value)


def _permute(trace: Trace, given: Given) -> Value:
    value = given.value()
    dims = len(trace.shape(value)) + 1
    if "dims" in given.arguments:
        order = [dim % dims for dim in given["dims"]]
    else:
        order, a, b = list(range(dims)), given["dim0"] % dims, given["dim1"] % dims
        order[a], order[b] = order[b], order[a]
    if order[0] != 0:
        raise Wrong("the batch is moved")
    return trace.add(Permute(tuple(axis - 1 for axis in order[1:])), value)


Handler = Callable[[Trace, Given], Any]
HANDLERS: dict[str, Handler] = {
    "conv2d": _conv,
    "linear": _linear,
    "batch_norm": _norm,
    "_native_batch_norm_legit_no_training": _native_norm,
    "relu": _activation("relu"),
    "sigmoid": _activation("sigmoid"),
    "tanh": _activation("tanh"),
    "silu": _activation("silu"),
    "hardswish": _activation("hardswish"),
    "hardsigmoid": _activation("hardsigmoid"),
    "gelu": _gelu,
    "relu6": lambda trace, given: trace.add(Clamp(0.0, 6.0), given.value()),
    "hardtanh": _clamp("min_val", "max_val"),
    "clamp": _clamp("min", "max"),
    "clamp_min": _clamp("min", "none"),
    "clamp_max": _clamp("none", "max"),
    "add": _binary(Add()),
    "sub": _binary(Add(), sign=-1.0),
    "rsub": _reversed,
    "mul": _binary(Mul()),
    "div": _binary(Mul(), inverse=True),
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _native_max_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    "flatten": _reshape,
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "unsqueeze": _reshape,
    "squeeze": _reshape,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "cat": _cat,
    "chunk": _chunk,
    "split": _chunk,
    "split_with_sizes": _chunk,
    "slice": _slice,
    "permute": _permute,
    "transpose": _permute,
    "dropout": _same,
    "feature_dropout": _same,
    "alpha_dropout": _same,
    "contiguous": _same,
    "clone": _same,
    "alias": _same,
    "detach": _same,
}
RESHAPES = ("view", "reshape", "_unsafe_view")  # may name the size of the batch
