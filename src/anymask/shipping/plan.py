"""The network as it is shipped: steps, and the arrays that they need; how values are stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from anymask.errors import SettingError
from anymask.shipping.ops import VALUES, Layer, Scale, Shape, Step, shapes

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
STORED = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


@dataclass(frozen=True, eq=False)
class Plan:
    """A network to be run or written.

    Args:
        input: shape of one sample, (C, H, W) or (D,).
        steps: what is done, in this order; the last one gives the output.
        arrays: for each step what it needs: of a layer positions int64 (kept,), ascending, in the flat dense weight, values (kept,),
            bias float (outputs,) and, where values are int8, scales float32 (outputs,); of a Scale scale and shift (channels,).
        values: how values are stored: float32, float16 or int8.
        info: plain JSON values about where it comes from.
    """

    input: Shape
    steps: tuple[Step, ...]
    arrays: tuple[Arrays, ...]
    values: str = "float32"
    info: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self) -> list[Shape]:
        """The shape of each value, per sample; the last one is the output's."""
        return shapes(self.input, self.steps)

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

    float16 rounds each number to 11 bits. int8 has 127 steps up to the largest value of each output channel.

    Raises:
        SettingError: for numbers that float16 cannot hold, or that are not finite.

    Example:
        >>> from anymask.shipping.ops import Linear
        >>> arrays = {"positions": np.array([0, 1]), "values": np.array([1.0, 0.001], np.float32)}
        >>> small = stored(Plan((2,), (Step(Linear(1, 2, kept=2), (0,)),), (arrays,)), "int8")
        >>> small.kept, small.arrays[0]["values"], small.arrays[0]["scales"]
        (1, array([127], dtype=int8), array([0.00787402], dtype=float32))
    """
    if values not in VALUES:
        raise SettingError(f"values came as {values!r}", allowed=", ".join(VALUES), fix="choose one of these")
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
    smaller = np.float16 if values == "float16" else np.float32
    small = {name: _cast(array, smaller) for name, array in arrays.items() if name not in {"positions", "values"}}
    if not isinstance(step.op, Layer):
        return step, small
    number, scales = _rounded(step.op, arrays, values)
    left = number != 0
    small |= {"positions": arrays["positions"][left], "values": number[left]} | ({} if scales is None else {"scales": scales})
    return Step(replace(step.op, kept=int(left.sum())), step.inputs), small


def _rounded(op: Layer, arrays: Arrays, values: str) -> tuple[Array, Array | None]:
    number = arrays["values"]
    if values != "int8":
        return _cast(number, STORED[values]), None
    rows = rows_of(op, arrays["positions"])
    largest = np.zeros(op.outputs, np.float32)
    np.maximum.at(largest, rows, np.abs(number))
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    scales = np.where(scales > 0, scales, np.float32(1))  # of a channel whose largest weight is subnormal
    return np.clip(np.rint(number / scales[rows]), -127, 127).astype(np.int8), scales.astype(np.float32)


def _cast(array: Array, dtype: Any) -> Array:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise SettingError(
            f"a number of {float(np.abs(array).max()):.3g}, which {np.dtype(dtype).name} cannot hold",
            allowed=f"numbers up to {np.finfo(dtype).max:.0f}",
            fix='ship with values="float32"',
        )
    return cast


def sizes(step: Step, values: str) -> dict[str, int]:
    """The constants that a step needs beside positions and values, in the order in which they are written, with their lengths."""
    op = step.op
    if isinstance(op, Layer):
        return ({"bias": op.outputs} if op.bias else {}) | ({"scales": op.outputs} if values == "int8" else {})
    return {"scale": op.channels, "shift": op.channels} if isinstance(op, Scale) else {}
