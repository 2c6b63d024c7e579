"""What the layers between the sparse ones compute, in NumPy, on arrays (C, H, W, N) or (D, N): batch last."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from anymask.shipping.ops import (
    Activation,
    AdaptivePool,
    Add,
    AvgPool,
    Cat,
    Clamp,
    MaxPool,
    Mul,
    Op,
    Pad,
    Pair,
    Permute,
    Scale,
)

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[Any, list[Array], dict[str, Array], Array], object]  # (op, inputs, constants, out); out may be inputs[0] where INPLACE


def _sigmoid(x: Array, out: Array) -> None:
    np.negative(x, out=out)
    with np.errstate(over="ignore"):  # exp gives infinity, and 1 / infinity is right
        np.exp(out, out=out)
    out += 1
    np.reciprocal(out, out=out)


def _silu(x: Array, out: Array) -> None:
    gate = np.empty_like(x)
    _sigmoid(x, gate)
    np.multiply(x, gate, out=out)


def _hardsigmoid(x: Array, out: Array) -> None:
    np.add(x, 3, out=out)
    np.clip(out, 0, 6, out=out)
    out *= np.float32(1 / 6)


def _hardswish(x: Array, out: Array) -> None:
    gate = np.empty_like(x)
    _hardsigmoid(x, gate)
    np.multiply(x, gate, out=out)


def _gelu(x: Array, out: Array) -> None:
    from scipy.special import erf  # here: most networks do not need it

    gate = erf(x * np.float32(0.5**0.5))
    gate += 1
    gate *= 0.5
    np.multiply(x, gate, out=out)


def _gelu_tanh(x: Array, out: Array) -> None:
    gate = np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x))
    gate += 1
    gate *= 0.5
    np.multiply(x, gate, out=out)


FUNCTIONS: dict[str, Callable[[Array, Array], object]] = {
    "relu": lambda x, out: np.maximum(x, 0, out=out),
    "sigmoid": _sigmoid,
    "tanh": lambda x, out: np.tanh(x, out=out),
    "silu": _silu,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    "gelu": _gelu,
    "gelu-tanh": _gelu_tanh,
}


def _channels(numbers: Array, x: Array) -> Array:
    return numbers.astype(np.float32).reshape(-1, *(1,) * (x.ndim - 1))


def _scale(op: Scale, given: list[Array], own: dict[str, Array], out: Array) -> None:
    np.multiply(given[0], _channels(own["scale"], out), out=out)
    out += _channels(own["shift"], out)


def _clamp(op: Clamp, given: list[Array], own: dict[str, Array], out: Array) -> None:
    x = given[0]
    if op.low is not None:
        x = np.maximum(x, np.float32(op.low), out=out)
    if op.high is not None:  # the last: where low > high PyTorch gives high
        np.minimum(x, np.float32(op.high), out=out)
    elif op.low is None:
        np.copyto(out, x)


def padded(x: Array, padding: Pair, size: tuple[int, int], value: float) -> Array:
    """`x` with `value` around it, at least of `size`; itself where that is no more."""
    _, h, w, _ = x.shape
    (ph, pw), high, wide = padding, max(size[0], padding[0] + h), max(size[1], padding[1] + w)
    if (high, wide) == (h, w):
        return x
    large = np.full((x.shape[0], high, wide, x.shape[3]), value, np.float32)
    large[:, ph : ph + h, pw : pw + w] = x
    return large


def taps(x: Array, out: Array, *, kernel: Pair, stride: Pair, dilation: Pair) -> list[Array]:
    """For each place of the kernel the inputs (C, OH, OW, N) that lie under it, as views of `x`, which holds its padding."""
    (sh, sw), (_, oh, ow, _) = stride, out.shape
    corners = ((i * dilation[0], j * dilation[1]) for i, j in product(range(kernel[0]), range(kernel[1])))
    return [x[:, i : i + sh * (oh - 1) + 1 : sh, j : j + sw * (ow - 1) + 1 : sw] for i, j in corners]


def needed(out: Array, kernel: Pair, stride: Pair, dilation: Pair) -> tuple[int, int]:
    """The height and width of the input that windows for `out` (C, OH, OW, N) reach over."""
    high, wide = ((n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(out.shape[1:3], stride, dilation, kernel, strict=True))
    return high, wide


def _max_pool(op: MaxPool, given: list[Array], own: dict[str, Array], out: Array) -> None:
    x = padded(given[0], op.padding, needed(out, op.kernel, op.stride, op.dilation), -np.inf)
    first, *rest = taps(x, out, kernel=op.kernel, stride=op.stride, dilation=op.dilation)
    np.copyto(out, first)
    for tap in rest:
        np.maximum(out, tap, out=out)


def _avg_pool(op: AvgPool, given: list[Array], own: dict[str, Array], out: Array) -> None:
    x = padded(given[0], op.padding, needed(out, op.kernel, op.stride, (1, 1)), 0.0)
    first, *rest = taps(x, out, kernel=op.kernel, stride=op.stride, dilation=(1, 1))
    np.copyto(out, first)
    for tap in rest:
        out += tap
    if op.divisor or op.kernel == (1, 1):  # the second: plain subsampling
        out *= np.float32(1 / (op.divisor or 1))
        return
    sides = zip(given[0].shape[1:3], out.shape[1:3], op.kernel, op.stride, op.padding, strict=True)
    high, wide = (_places(n, m, k, s, p, with_padding=op.count_padding) for n, m, k, s, p in sides)
    out *= (1 / (high[:, None] * wide)).astype(np.float32)[None, :, :, None]


def _places(size: int, windows: int, kernel: int, stride: int, padding: int, *, with_padding: bool) -> Array:
    """How many places of each window count along one side: what lies beyond the padding never does."""
    begin = np.arange(windows) * stride - padding
    end = np.minimum(begin + kernel, size + padding)
    return end - begin if with_padding else np.minimum(end, size) - np.maximum(begin, 0)


def _adaptive(op: AdaptivePool, given: list[Array], own: dict[str, Array], out: Array) -> None:
    x = given[0]
    if op.size == x.shape[1:3]:
        np.copyto(out, x)
        return
    if op.size == (1, 1):  # np.mean takes twice as long, and three times for a batch
        places = math.prod(x.shape[1:3])
        np.matmul(np.full(places, 1 / places, np.float32), x.reshape(len(x), places, -1), out=out[:, 0, 0])
        return
    rows, columns = (_parts(n, m) for n, m in zip(x.shape[1:3], op.size, strict=True))
    for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
        np.mean(x[:, row, column], axis=(1, 2), out=out[:, i, j])


def _parts(size: int, number: int) -> list[slice]:
    return [slice(i * size // number, -(-(i + 1) * size // number)) for i in range(number)]


def _pad(op: Pad, given: list[Array], own: dict[str, Array], out: Array) -> None:
    out.fill(op.value)
    inside = tuple(slice(op.by[2 * axis], op.by[2 * axis] + given[0].shape[axis]) for axis in range(3))
    out[inside] = given[0]


RUN: dict[type[Op], Run] = {
    Scale: _scale,
    Activation: lambda op, given, own, out: FUNCTIONS[op.kind](given[0], out),
    Clamp: _clamp,
    Add: lambda op, given, own, out: np.add(given[0], given[1], out=out),
    Mul: lambda op, given, own, out: np.multiply(given[0], given[1], out=out),
    MaxPool: _max_pool,
    AvgPool: _avg_pool,
    AdaptivePool: _adaptive,
    Permute: lambda op, given, own, out: np.copyto(out, given[0].transpose(*op.order, given[0].ndim - 1)),
    Pad: _pad,
    Cat: lambda op, given, own, out: np.concatenate(given, axis=0, out=out),
}
CHANNELWISE: tuple[type[Op], ...] = (Scale, Activation, Clamp, Add, Mul, MaxPool, AvgPool, AdaptivePool)  # each channel apart
INPLACE: tuple[type[Op], ...] = (Scale, Activation, Clamp, Add, Mul)  # may write where their first input lies
