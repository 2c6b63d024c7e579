"""The network as it is shipped: steps, and the arrays that they need; how values are stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from anymask.errors import SettingError
from anymask.shipping.ops import Layer, Scale, Shape, Step, Wrong

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
# How values are stored. NumPy has no bfloat16: in a file it is the upper half of a float32, and in a Plan a float32 whose lower half is 0.
STORED = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16, "int8": np.int8}


@dataclass(frozen=True, eq=False)
class Plan:
    """A network to be run or written.

    Args:
        input: shape of one sample, (C, H, W) or (D,).
        steps: what is done, in this order; the last one gives the output.
        arrays: for each step what it needs: of a layer positions int64 (kept,), ascending, in the flat dense weight, values (kept,),
            bias float (outputs,) and, where values are int8, scales float32 (outputs,); of a Scale scale and shift (channels,).
        values: how values are stored: float32, bfloat16, float16 or int8.
        info: plain JSON values about where it comes from.
    """

    input: Shape
    steps: tuple[Step, ...]
    arrays: tuple[Arrays, ...]
    values: str = "float32"
    info: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self) -> list[Shape]:
        """The shape of each value, per sample: of the input, then of what each step makes; the last one is the output's.

        Raises:
            Wrong: naming the step that cannot take what it is given.

        Example:
            >>> from anymask.shipping.ops import AdaptivePool, Reshape
            >>> Plan((3, 8, 8), (Step(AdaptivePool(), (0,)), Step(Reshape((3,)), (1,))), ({}, {})).shapes()
            [(3, 8, 8), (3, 1, 1), (3,)]
        """
        found = [self.input]
        for number, step in enumerate(self.steps):
            takes = step.op.inputs_taken
            if len(step.inputs) != takes and not takes < 0 < len(step.inputs):
                raise Wrong(f"step {number}: {len(step.inputs)} inputs")
            if not all(0 <= value <= number for value in step.inputs):
                raise Wrong(f"step {number}: an input that is not made before it")
            try:
                found.append(step.op.shape(*(found[value] for value in step.inputs)))
            except Wrong as error:
                raise Wrong(f"step {number}, {type(step.op).__name__}: {error}") from None
        return found

    @property
    def kept(self) -> int:
        """Number of weights that are stored."""
        return sum(step.op.kept for step in self.steps if isinstance(step.op, Layer))

    @property
    def total(self) -> int:
        """Number of weights of the dense layers."""
        return sum(math.prod(step.op.weight_shape) for step in self.steps if isinstance(step.op, Layer))


def rows_of(op: Layer, positions: Array) -> Array:
    """The output channel of each kept weight, int64 (kept,)."""
    _, *inner = op.weight_shape
    return positions // math.prod(inner)


def weights(op: Layer, arrays: Arrays) -> Array:
    """The values of a layer in float32, (kept,), however they are stored."""
    values = arrays["values"].astype(np.float32)
    return values * arrays["scales"][rows_of(op, arrays["positions"])] if "scales" in arrays else values


def stored(plan: Plan, values: str) -> Plan:
    """`plan`, whose values are float32, with values stored as `values`; those that round to 0 are left out.

    float16 rounds each number to 11 bits, bfloat16 to 8 (and keeps float32's range). int8 has 127 steps up to the largest value of each
    output channel. Biases, and the scales and shifts of norms that are not folded, are float16 with float16, else float32.

    Raises:
        SettingError: for numbers that float16 or bfloat16 cannot hold, or that are not finite.

    Example:
        >>> from anymask.shipping.ops import Linear
        >>> arrays = {"positions": np.array([0, 1]), "values": np.array([1.0, 0.001], np.float32)}
        >>> small = stored(Plan((2,), (Step(Linear(1, 2, kept=2), (0,)),), (arrays,)), "int8")
        >>> small.kept, small.arrays[0]["values"], small.arrays[0]["scales"]
        (1, array([127], dtype=int8), array([0.00787402], dtype=float32))
    """
    pairs = [_stored(step, arrays, values) for step, arrays in zip(plan.steps, plan.arrays, strict=True)]
    return replace(plan, steps=tuple(step for step, _ in pairs), arrays=tuple(arrays for _, arrays in pairs), values=values)


def _stored(step: Step, arrays: Arrays, values: str) -> tuple[Step, Arrays]:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise SettingError(
                f"{name} of {type(step.op).__name__} holds numbers that are not finite",
                allowed="finite weights, and batch norms of finite statistics",
                fix="ship a model that was trained without NaN",
            )
    small = {name: _cast(array, constants(values)) for name, array in arrays.items() if name not in {"positions", "values"}}
    if not isinstance(step.op, Layer):
        return step, small
    number, scales = _rounded(step.op, arrays, values)
    left = number != 0
    if not left.any() and arrays["values"].any():
        raise SettingError(
            f"all {len(left):,} weights of a layer of {step.op.outputs} outputs are 0 in {values}",
            allowed="weights that stay, at least one in each layer that has any",
            fix="ship with values='float32' or 'bfloat16'",
        )
    small |= {"positions": arrays["positions"][left], "values": number[left]} | ({} if scales is None else {"scales": scales})
    return Step(replace(step.op, kept=int(left.sum())), step.inputs), small


def _rounded(op: Layer, arrays: Arrays, values: str) -> tuple[Array, Array | None]:
    number = arrays["values"]
    if values != "int8":
        return _cast(number, values), None
    rows = rows_of(op, arrays["positions"])
    largest = np.zeros(op.outputs, np.float32)
    np.maximum.at(largest, rows, np.abs(number))
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    scales = np.where(scales > 0, scales, np.float32(1))  # of a channel whose largest weight is subnormal
    return np.clip(np.rint(number / scales[rows]), -127, 127).astype(np.int8), scales.astype(np.float32)


def _cast(array: Array, values: str) -> Array:
    with np.errstate(over="ignore"):
        cast = whole(halves(array)) if values == "bfloat16" else array.astype(STORED[values])
    if not np.isfinite(cast).all():
        largest = {"float16": 65504.0, "bfloat16": float(whole(np.array([0x7F7F], np.uint16))[0])}.get(values, np.finfo(np.float32).max)
        raise SettingError(
            f"a number of {float(np.abs(array).max()):.3g}, which {values} cannot hold",
            allowed=f"numbers up to {largest:.5g}",
            fix=f'ship with values="{"bfloat16" if values == "float16" else "float32"}"',
        )
    return cast


def constants(values: str) -> str:
    """How biases, scales and shifts are stored where weights are stored as `values`."""
    return "float16" if values == "float16" else "float32"


def halves(array: Array) -> Array:
    """The upper halves of float32 numbers, rounded to nearest with ties to even: bfloat16, as uint16. They must not be NaN."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def whole(halved: Array) -> Array:
    """What `halves` gave as float32.

    Example:
        >>> whole(halves(np.array([1.0, 3.14159], np.float32)))
        array([1.      , 3.140625], dtype=float32)
    """
    return (halved.astype(np.uint32) << 16).view(np.float32)


def sizes(step: Step) -> dict[str, int]:
    """The constants that a step needs beside positions, values and scales, in the order in which they are written, with their lengths."""
    op = step.op
    if isinstance(op, Layer):
        return {"bias": op.outputs} if op.bias else {}
    return {"scale": op.channels, "shift": op.channels} if isinstance(op, Scale) else {}
