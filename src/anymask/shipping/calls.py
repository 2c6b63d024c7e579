"""What is known while the calls of a traced model are read: the steps so far, and the arguments of one call."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from anymask.errors import SettingError
from anymask.shipping.ops import Op, Shape, Step, Wrong
from anymask.shipping.plan import Array, Arrays


@dataclass(frozen=True)
class Value:
    """What a step makes; 0 is the input."""

    number: int


@dataclass
class Trace:
    """The steps so far; what the handlers write into."""

    model: str
    input: Shape
    steps: list[Step] = field(default_factory=list)
    arrays: list[Arrays] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shapes = [self.input]

    def add(self, op: Op, *inputs: Value, **arrays: Array) -> Value:
        """One more step.

        Raises:
            Wrong: when the operation cannot take its inputs.
        """
        self.shapes.append(op.shape(*map(self.shape, inputs)))
        self.steps.append(Step(op, tuple(value.number for value in inputs)))
        self.arrays.append(arrays)
        return Value(len(self.steps))

    def shape(self, value: Value) -> Shape:
        """The shape of one sample of it."""
        return self.shapes[value.number]


@dataclass(frozen=True)
class Given:
    """The arguments of one call, by the names that PyTorch gives them: values, constant tensors, and plain numbers."""

    arguments: Mapping[str, Any]
    node: fx.Node

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str) -> Any:
        """The argument, None when there is none of this name."""
        return self.arguments.get(name)

    def value(self) -> Value:
        """The argument `input`, called `self` where PyTorch does, which depends on the network's."""
        found = self.arguments["input" if "input" in self.arguments else "self"]
        if not isinstance(found, Value):
            raise Wrong("input does not depend on the input")
        return found

    def array(self, name: str) -> Array | None:
        """An argument that is constant, float32; None when it is left out."""
        found = self.arguments[name]
        if isinstance(found, Value):
            raise Wrong(f"{name} depends on the input")
        return None if found is None else np.ascontiguousarray(found.float().numpy())

    def pair(self, name: str) -> tuple[int, int]:
        """Two whole numbers, that are given as one or two."""
        found = self.arguments[name]
        numbers = [found] if isinstance(found, int) else list(found)
        if not all(type(number) is int for number in numbers):
            raise Wrong(f"{name} depends on the batch")
        return numbers[0], numbers[-1]

    def shape(self) -> Shape:
        """The shape of one sample of what it gives."""
        shape = tuple(self.node.meta["val"].shape[1:])
        if not all(type(number) is int for number in shape):
            raise Wrong(f"a shape {shape} that depends on the batch")
        return shape


def refused(model: str, name: str, node: fx.Node, *, why: str = "") -> SettingError:
    """The error for an operation that cannot be shipped, or not like this."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = stack[-1] if stack else ("", model)
    kind = kind if isinstance(kind, str) else kind.__qualname__
    where = f"module {path!r}, a {kind.rpartition('.')[2]}" if path else "its own forward"
    return SettingError(
        f"{model} uses {name} in {where}, which cannot be shipped" + (f" ({why})" if why else ""),
        allowed="what convolutional networks of images do in evaluation; docs/speed.md says which operations",
        fix="ship to .onnx, dense, or leave that operation out of what you ship",
    )
