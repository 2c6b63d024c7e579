"""A row of sparse convolutions and norms with the sum after it as one function of autograd: `relu(... norm(conv(x)) ... + add)`.

One by one they are called in as much time as they compute in a narrow network: Python, whose memory the maps push out of the caches, was
a third of a resnet32's step. Here gradients are written over what nobody needs any more, and that of the shortcut is added on the way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.kernels import Gather, library, native
from anymask.sparse import calls, ops
from anymask.sparse.layout import empty


class Stage(NamedTuple):
    """A convolution of kept weights without a bias, and the batch norm after it, on the statistics of its batch."""

    gather: Gather  # kept here: the layer may be gone when backward comes
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
        add = saved[0] if ctx.merges and ctx.stages[-1].soft else add
        layers = [_Layer(stage, *saved[7 * number : 7 * number + 7]) for number, stage in enumerate(ctx.stages)]
        seen = torch.is_grad_enabled() or not ops.unseen([g])
        gx, gadd, found = _by_operators(layers, g, add, signs) if seen else _at_once(layers, g, add, signs, merges=ctx.merges)
        if ctx.merges and seen:
            gx = gx + gadd
        return None, gx, None if ctx.merges else gadd, *found


class _Layer(NamedTuple):
    """A stage and what was saved of it."""

    stage: Stage
    x: Tensor
    values: Tensor
    weight: Tensor | None
    bias: Tensor | None
    y: Tensor
    mean: Tensor
    var: Tensor

    def norm(self) -> calls.Norm:
        """As the forward pass had it."""
        return self.stage._replace(weight=self.weight, bias=self.bias).norm(self.mean, self.var)

    def gradients(self, gvalues: Tensor, gweight: Tensor, gbias: Tensor) -> list[Tensor | None]:
        """Of what is there."""
        return [gvalues, None if self.weight is None else gweight, None if self.bias is None else gbias]


Made = tuple[Tensor, Tensor, list[Tensor | None]]  # of the input, of what is added, and of all that is trained


def _at_once(layers: list[_Layer], g: Tensor, add: Tensor | None, signs: Tensor | None, *, merges: bool) -> Made:
    """That of the input is with that of what is added in it where it `merges`."""
    *_, end = layers
    of_add = None if end.stage.soft is None else empty(g, end.y.shape)
    gadd, found = g if of_add is None else of_add, list[Tensor | None]()
    for layer in reversed(layers):
        gweight, gbias = g.new_empty(2, len(layer.mean)).unbind()
        if layer is end:
            gy = empty(g, layer.y.shape)
            calls.norm_gradient(layer.norm(), layer.y, add, g, (gy, of_add, gweight, gbias), signs=signs)
        else:  # over the gradient of what the norm gave, which is ours
            gy = g
            calls.norm_gradient(layer.norm(), layer.y, None, g, (gy, None, gweight, gbias))
        merged = gadd if merges and layer is layers[0] else None
        g = of_add if merged is not None and of_add is not None else empty(gy, layer.x.shape)
        gvalues = gy.new_zeros(len(layer.values))
        calls.conv_gradient(layer.stage.how, layer.x, gy, layer.values, add=merged, gx=g, gvalues=gvalues)
        found = layer.gradients(gvalues, gweight, gbias) + found
    return g, gadd, found


def _by_operators(layers: list[_Layer], g: Tensor, add: Tensor | None, signs: Tensor | None) -> Made:
    """The same for whoever looks: batched gradients, compiled autograd; who differentiates once more is refused by the operators."""
    if signs is not None:
        g = g.masked_fill(~_through(signs, layers[-1].y.shape), 0.0)
    gadd, found = g, list[Tensor | None]()
    for layer in reversed(layers):
        how = layer.norm()
        last, place = layer is layers[-1], layer.y.new_empty((0, 0, 0, 0), dtype=torch.uint8)
        vectors, kind = how[:4], (how.eps, how.relu and not (last and signs is not None), how.soft)
        g, of_add, gweight, gbias = ops.norm_gradient(layer.y, add if last else None, g, *vectors, place, *kind, 0, 0, 0, 0, False)
        gadd = of_add if last and add is not None else gadd
        g, gvalues = ops.conv_gradient(layer.x, g, layer.values, layer.stage.gather.handle, True, True)
        found = layer.gradients(gvalues, gweight, gbias) + found
    return g, gadd, found


def _through(signs: Tensor, shape: torch.Size) -> Tensor:
    """`signs` as a tensor of bool of `shape`, (N, C, H, W)."""
    n, c, h, w = shape
    lanes = (signs.to(torch.int32)[:, :, None] >> torch.arange(library.library().am_width())) & 1
    return lanes.flatten(1)[:, : h * w * n].reshape(c, h, w, n).permute(3, 0, 1, 2) != 0
