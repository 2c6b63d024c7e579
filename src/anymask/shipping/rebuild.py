"""A shipped network as a PyTorch module again, dense with its zeros: to compare with, and to go on with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anymask.shipping.ops import (
    Activation,
    AdaptivePool,
    Add,
    AvgPool,
    Cat,
    Clamp,
    Conv,
    Layer,
    MaxPool,
    Mul,
    Op,
    Pad,
    Permute,
    Reshape,
    Scale,
    Slice,
    Step,
)
from anymask.shipping.plan import Arrays, Plan, weights


class Rebuilt(nn.Module):
    """The steps of a plan, with its layers as `nn.Conv2d` and `nn.Linear` in float32, named step0, step1 ..., in eval mode.

    It gives the same numbers as the plan's Program, up to rounding.

    Example:
        >>> from anymask.shipping.ops import Linear
        >>> arrays = {"positions": np.array([1]), "values": np.array([2.0], np.float32)}
        >>> Rebuilt(Plan((2,), (Step(Linear(1, 2, kept=1), (0,)),), (arrays,)))(torch.ones(1, 2))
        tensor([[2.]], grad_fn=<MmBackward0>)
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.steps = plan.steps
        for number, (step, arrays) in enumerate(zip(plan.steps, plan.arrays, strict=True)):
            if isinstance(step.op, Layer):
                self.add_module(f"step{number}", _layer(step.op, arrays))
            for name in ("scale", "shift") if isinstance(step.op, Scale) else ():
                shape = (-1, *(1,) * (len(plan.shapes()[number + 1]) - 1))
                self.register_buffer(f"{name}{number}", _tensor(arrays[name]).reshape(shape))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) as the plan has it."""
        values = [x]
        for number, step in enumerate(self.steps):
            values.append(self._step(number, step, [values[value] for value in step.inputs]))
        return values[-1]

    def _step(self, number: int, step: Step, given: list[Tensor]) -> Tensor:
        op = step.op
        if isinstance(op, Scale):
            scale, shift = getattr(self, f"scale{number}"), getattr(self, f"shift{number}")
            return given[0] * scale + shift
        if not isinstance(op, Layer):
            return _RUN[type(op)](op, *given)
        out = self.get_submodule(f"step{number}")(given[0])
        out = out + given[1] if op.add else out
        return F.relu(out) if op.relu else out


def _layer(op: Layer, arrays: Arrays) -> nn.Module:
    made: nn.Conv2d | nn.Linear
    if isinstance(op, Conv):
        made = nn.Conv2d(op.inputs, op.outputs, op.kernel, op.stride, op.padding, op.dilation, op.groups, bias=op.bias)
    else:
        made = nn.Linear(op.inputs, op.outputs, bias=op.bias)
    with torch.no_grad():
        dense = np.zeros(int(np.prod(op.weight_shape)), np.float32)
        dense[arrays["positions"]] = weights(op, arrays)
        made.weight.copy_(torch.from_numpy(dense).reshape(made.weight.shape))
        if made.bias is not None:
            made.bias.copy_(_tensor(arrays["bias"]))
    return made


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _avg_pool(op: AvgPool, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, op.kernel, op.stride, op.padding, op.ceil, op.count_padding, op.divisor or None)


_RUN: dict[type[Op], Callable[..., Tensor]] = {
    Activation: lambda op, x: _FUNCTIONS[op.kind](x),
    Clamp: lambda op, x: x if op.low is op.high is None else torch.clamp(x, op.low, op.high),
    Add: lambda op, a, b: a + b,
    Mul: lambda op, a, b: a * b,
    MaxPool: lambda op, x: F.max_pool2d(x, op.kernel, op.stride, op.padding, op.dilation, op.ceil),
    AvgPool: _avg_pool,
    AdaptivePool: lambda op, x: F.adaptive_avg_pool2d(x, op.size),
    Reshape: lambda op, x: x.reshape(len(x), *op.to),
    Permute: lambda op, x: x.permute(0, *(axis + 1 for axis in op.order)),
    Slice: lambda op, x: x[:, op.start : op.stop],
    Pad: lambda op, x: F.pad(x, (*op.by[4:], *op.by[2:4], *op.by[:2]), value=op.value),
    Cat: lambda op, *given: torch.cat(given, 1),
}
