"""The operations that a shipped network is made of, as values: what they are, and the shape that each gives.

Shapes are those of one sample, (C, H, W) or (D,). A network is a list of steps; value 0 is its input, and step i makes value i + 1.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

Shape = tuple[int, ...]
Pair = tuple[int, int]
KINDS = ("relu", "sigmoid", "tanh", "silu", "hardswish", "hardsigmoid", "gelu", "gelu-tanh")


class Wrong(ValueError):
    """An operation that cannot take what it is given; the text says why."""


def _need(fits: bool, why: str) -> None:
    if not fits:
        raise Wrong(why)


_ROOM, _LONGEST, _PARTS = 2**28, 2**16, 2**16  # numbers of a padded map, a side of a kernel, places of an adaptive pool: see `_fits`
_PLACES, _TABLE = 2**18, 2**29  # of a kernel, each of which is a call of NumPy in a pool; numbers of a convolution's table of places


def _fits(channels: int, sides: Iterable[int], kernel: Pair, stride: Pair) -> None:
    """Refuse windows that no network has: a file may come from anywhere, and the kernels count places in 32 bits."""
    numbers = channels * math.prod(sides)
    _need(numbers <= _ROOM, f"a padded map of {numbers:,} numbers, at most {_ROOM:,} are allowed")
    few = max(kernel) <= _LONGEST and math.prod(kernel) <= _PLACES
    _need(few and max(stride) <= _ROOM, f"a kernel {kernel} at a stride {stride}")


def _image(shape: Shape) -> tuple[int, int, int]:
    _need(len(shape) == 3, f"a map (C, H, W) is needed, and {shape} came")
    return shape[0], shape[1], shape[2]


@dataclass(frozen=True)
class Op:
    """What all operations have; `takes` is the number of their inputs, -1 for any from 1."""

    takes: ClassVar[int] = 1

    @property
    def inputs_taken(self) -> int:
        """How many inputs this one takes; -1 for any number from 1."""
        return self.takes

    def shape(self, *given: Shape) -> Shape:
        """The shape of what it gives, for inputs of these shapes.

        Raises:
            Wrong: when it cannot take them.
        """
        return given[0]


@dataclass(frozen=True)
class Layer(Op):
    """What convolution and linear have in common: kept weights, then maybe a bias, a sum with a second input, and a ReLU."""

    outputs: int
    inputs: int
    kept: int = 0
    bias: bool = False
    add: bool = False
    relu: bool = False

    @property
    def inputs_taken(self) -> int:
        """Two when something is added."""
        return 2 if self.add else 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(O, C / groups, KH, KW) of the dense weight."""
        return self.outputs, self.inputs, 1, 1

    def check_sum(self, shape: Shape, given: tuple[Shape, ...]) -> Shape:
        """`shape`, when what is added has it, too, and the number of kept weights can be."""
        _need(self.outputs > 0 and self.inputs > 0, "a layer of no channels")
        _need(self.kept <= math.prod(self.weight_shape), f"{self.kept} weights kept of a weight {self.weight_shape}")
        _need(all(other == shape for other in given[1:]), f"{given[1:]} added to {shape}")
        return shape


@dataclass(frozen=True)
class Conv(Layer):
    """A 2-D convolution of maps (C, H, W); padding by zeros, the same on both sides."""

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(O, C / groups, KH, KW) of the dense weight."""
        return (self.outputs, self.inputs // self.groups, *self.kernel)

    def shape(self, *given: Shape) -> Shape:
        """(O, OH, OW)."""
        c, *size = _image(given[0])
        _need(c == self.inputs, f"a map of {c} channels, where {self.inputs} are needed")
        _need(min(self.groups, *self.kernel, *self.stride, *self.dilation) > 0, "a kernel, stride, dilation or groups of 0")
        _need(self.inputs % self.groups == 0 == self.outputs % self.groups, f"{self.groups} groups of {self.inputs} channels")
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        out = [(n + 2 * p - s) // t + 1 for n, p, s, t in zip(size, self.padding, spans, self.stride, strict=True)]
        _need(min(out) > 0, f"a map {given[0]} that is smaller than the kernel")
        _fits(c, [n + 2 * p for n, p in zip(size, self.padding, strict=True)], self.kernel, self.stride)
        shape = self.check_sum((self.outputs, *out), given)
        _need(spans[0] * self.kept <= _TABLE, f"{self.kept} weights kept of a kernel {self.kernel}, {spans[0]} rows high")
        return shape


@dataclass(frozen=True)
class Linear(Layer):
    """A linear layer of vectors (D,)."""

    def shape(self, *given: Shape) -> Shape:
        """(O,)."""
        _need(given[0] == (self.inputs,), f"{given[0]}, where a vector ({self.inputs},) is needed")
        return self.check_sum((self.outputs,), given)


@dataclass(frozen=True)
class Scale(Op):
    """Each channel times a number, plus another: a batch norm that no layer could take up."""

    channels: int

    def shape(self, *given: Shape) -> Shape:
        """As it came."""
        _need(bool(given[0]) and given[0][0] == self.channels, f"{given[0]}, where {self.channels} channels are needed")
        return given[0]


@dataclass(frozen=True)
class Activation(Op):
    """A function of each number, one of `KINDS`."""

    kind: str

    def shape(self, *given: Shape) -> Shape:
        """As it came."""
        _need(self.kind in KINDS, f"an activation {self.kind!r}")
        return given[0]


@dataclass(frozen=True)
class Clamp(Op):
    """Each number brought into [low, high]; None for no bound. ReLU6 and hardtanh are of this kind."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Add(Op):
    """The sum of two inputs; sizes of 1 are repeated."""

    takes: ClassVar[int] = 2

    def shape(self, *given: Shape) -> Shape:
        """What both are brought to."""
        a, b = given
        _need(len(a) == len(b) and all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True)), f"{a} with {b}")
        return tuple(m if n == 1 else n for m, n in zip(a, b, strict=True))


@dataclass(frozen=True)
class Mul(Add):
    """The product of two inputs; sizes of 1 are repeated."""


@dataclass(frozen=True)
class MaxPool(Op):
    """The largest number of each window."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil: bool = False

    def shape(self, *given: Shape) -> Shape:
        """(C, OH, OW)."""
        c, *size = _image(given[0])
        _need(min(*self.kernel, *self.stride, *self.dilation) > 0, "a kernel, stride or dilation of 0")
        _need(all(2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True)), "a padding of more than half the kernel")
        parts = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out = tuple(pooled(n, k, s, p, d, ceil=self.ceil) for n, k, s, p, d in parts)
        _need(min(out) > 0, f"a map {given[0]} that is smaller than the window")
        ends = [(m - 1) * s + d * (k - 1) + 1 for m, s, d, k in zip(out, self.stride, self.dilation, self.kernel, strict=True)]
        _fits(c, [max(end, n + 2 * p) for end, n, p in zip(ends, size, self.padding, strict=True)], self.kernel, self.stride)
        return (c, *out)


@dataclass(frozen=True)
class AvgPool(Op):
    """The mean of each window; `divisor` 0 stands for the number of its places, with those of the padding if `count_padding`."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil: bool = False
    count_padding: bool = True
    divisor: int = 0

    def shape(self, *given: Shape) -> Shape:
        """(C, OH, OW)."""
        return MaxPool(self.kernel, self.stride, self.padding, ceil=self.ceil).shape(*given)


@dataclass(frozen=True)
class AdaptivePool(Op):
    """The means of `size` parts of a map, which may overlap by one place."""

    size: Pair = (1, 1)

    def shape(self, *given: Shape) -> Shape:
        """(C, *size)."""
        c, *size = _image(given[0])
        _need(min(self.size) > 0, "an output of no size")
        _need(math.prod(self.size) <= _PARTS or [*self.size] == size, f"an output of {self.size}")
        return (c, *self.size)


@dataclass(frozen=True)
class Reshape(Op):
    """The same numbers in another shape."""

    to: Shape

    def shape(self, *given: Shape) -> Shape:
        """`to`."""
        _need(len(self.to) <= 16, f"a shape of {len(self.to)} dimensions")
        _need(bool(self.to) and math.prod(self.to) == math.prod(given[0]), f"{given[0]} brought to {self.to}")
        return self.to


@dataclass(frozen=True)
class Permute(Op):
    """Its dimensions in another order."""

    order: Shape

    def shape(self, *given: Shape) -> Shape:
        """The sizes in that order."""
        _need(sorted(self.order) == list(range(len(given[0]))), f"{given[0]} in the order {self.order}")
        return tuple(given[0][axis] for axis in self.order)


@dataclass(frozen=True)
class Slice(Op):
    """The channels from `start` to before `stop`."""

    start: int
    stop: int

    def shape(self, *given: Shape) -> Shape:
        """So many channels."""
        _need(bool(given[0]) and 0 <= self.start < self.stop <= given[0][0], f"channels {self.start} to {self.stop} of {given[0]}")
        return (self.stop - self.start, *given[0][1:])


@dataclass(frozen=True)
class Pad(Op):
    """`value` around a map: (channels before, after, rows before, after, columns before, after)."""

    by: Shape
    value: float = 0.0

    def shape(self, *given: Shape) -> Shape:
        """The larger one."""
        sizes = _image(given[0])
        _need(len(self.by) == 6, f"a padding of {len(self.by)} numbers")
        return tuple(n + self.by[2 * i] + self.by[2 * i + 1] for i, n in enumerate(sizes))


@dataclass(frozen=True)
class Cat(Op):
    """The channels of all inputs, one after the other."""

    takes: ClassVar[int] = -1

    def shape(self, *given: Shape) -> Shape:
        """As many channels as all of them."""
        _need(all(shape[1:] == given[0][1:] and shape for shape in given), f"{given} one after the other")
        return (sum(shape[0] for shape in given), *given[0][1:])


OPS: dict[str, type[Op]] = {
    "conv": Conv,
    "linear": Linear,
    "scale": Scale,
    "activation": Activation,
    "clamp": Clamp,
    "add": Add,
    "mul": Mul,
    "max-pool": MaxPool,
    "avg-pool": AvgPool,
    "adaptive-pool": AdaptivePool,
    "reshape": Reshape,
    "permute": Permute,
    "slice": Slice,
    "pad": Pad,
    "cat": Cat,
}


@dataclass(frozen=True)
class Step:
    """An operation, and the numbers of the values that it takes."""

    op: Op
    inputs: tuple[int, ...]


def pooled(size: int, kernel: int, stride: int, padding: int, dilation: int, *, ceil: bool) -> int:
    """How many windows there are along one side, as PyTorch counts them.

    Example:
        >>> pooled(7, 2, 2, 0, 1, ceil=False), pooled(7, 2, 2, 0, 1, ceil=True)
        (3, 4)
    """
    out = (size + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil else 0)) // stride + 1
    return out - 1 if ceil and (out - 1) * stride >= size + padding else out
