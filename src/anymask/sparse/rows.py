"""A row of sparse convolutions and norms with the sum after it as one function of autograd: `relu(... norm(conv(x)) ... + add)`.

One by one they are called in as much time as they compute in a narrow network: Python, whose memory the maps push out of the caches, was
a third of a resnet32's step. Here gradients are written over what nobody needs any more, and that of the shortcut is added on the way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.kernels import native
from anymask.sparse import calls
from anymask.sparse.layout import empty
from anymask.sparse.ops import no_second


class Stage(NamedTuple):
    """A convolution of kept weights without a bias, and the batch norm after it, on the statistics of its batch."""

    how: native.Sized
    eps: float
    soft: float | None  # how soft the ReLU after the norm is; None: there is none
    running: calls.Running | None
    values: Tensor  # (K,)
    weight: Tensor | None  # (O,); so is bias
    bias: Tensor | None

    @property
    def trained(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What gets gradients."""
        return self.values, self.weight, self.bias

    def norm(self, mean: Tensor, var: Tensor) -> calls.Norm:
        """Its norm, with these statistics."""
        return calls.Norm(self.weight, self.bias, mean, var, self.eps, self.soft is not None, self.soft or 0.0, given=False)


def row(stages: Sequence[Stage], x: Tensor, add: Tensor) -> Tensor:
    """What the stages give for x (N, C, H, W), `add` added before the last one's ReLU; the norms remember their batches.

    For tensors of which `ops.unseen` says that autograd alone looks at them.
    """
    y: Tensor = _Row.apply(stages, x, None if add is x else add, *(tensor for stage in stages for tensor in stage.trained))
    return y


class _Row(torch.autograd.Function):
    """`add` is None where it is x itself."""

    @staticmethod
    def forward(ctx: Any, stages: Sequence[Stage], x: Tensor, add: Tensor | None, *_: Any) -> Tensor:
        other, saved = x if add is None else add, []
        for stage in stages:
            o, h, w, n = stage.how.output
            y, out = empty(other, (n, o, h, w)), empty(other, (n, o, h, w))
            mean, var = other.new_empty(2, o).unbind()
            calls.conv(stage.how, x, stage.values, None, y)
            last = stage is stages[-1]
            signs = calls.signs(y) if last and stage.soft == 0 else None
            calls.norm(stage.norm(mean, var), y, other if last else None, out, signs=signs)
            if stage.running is not None:
                calls.track(stage.running, mean, var, h * w * n)
            saved += [x, *stage.trained, y, mean, var]
            x = out
        ctx.stages, ctx.merges = stages, add is None
        # For the gradient of the last ReLU: what it let through, a bit each, or of a soft one what was added before it.
        ctx.save_for_backward(signs, add if stages[-1].soft else None, *saved)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        signs, add, *saved = ctx.saved_tensors
        gadd, given = g, g
        found: list[Tensor | None] = []
        for number in reversed(range(len(ctx.stages))):
            x, values, weight, bias, y, mean, var = saved[7 * number : 7 * number + 7]
            stage = ctx.stages[number]._replace(values=values, weight=weight, bias=bias)
            gweight, gbias = g.new_empty(2, len(mean)).unbind()
            if number == len(ctx.stages) - 1:
                gy = empty(g, y.shape)
                of_add = None if stage.soft is None else empty(g, y.shape)
                add = (saved[0] if ctx.merges else add) if stage.soft else None
                calls.norm_gradient(stage.norm(mean, var), y, add, g, (gy, of_add, gweight, gbias), signs=signs)
                gadd = g if of_add is None else of_add
            else:  # over the gradient of what the norm gave, which is ours
                gy = g
                calls.norm_gradient(stage.norm(mean, var), y, None, g, (gy, None, gweight, gbias))
            merged = gadd if ctx.merges and number == 0 else None
            g = gadd if merged is not None and gadd is not given else empty(gy, x.shape)
            gvalues = gy.new_zeros(len(values))
            calls.conv_gradient(stage.how, x, gy, values, add=merged, gx=g, gvalues=gvalues)
            found = [gvalues, gweight if weight is not None else None, gbias if bias is not None else None, *found]
        made = [g, None if ctx.merges else gadd, *found]
        if torch.is_grad_enabled():
            made = _once(made, saved)
        return None, *made


def _once(made: list[Tensor | None], saved: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients `made`, which refuse to be differentiated once more."""
    there = [t for t in made if t is not None]
    refusing = iter(_Once.apply(len(there), *there, *(t for t in saved if t is not None)))
    return [None if t is None else next(refusing) for t in made]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    backward = staticmethod(no_second)
