"""Layers that store and compute kept weights alone. A layer becomes one by a change of its class: names, hooks and identity stay."""

import math
import warnings
from functools import cache
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymask.errors import SettingError
from anymask.kernels import Gather
from anymask.sparse import calls, layout, ops, rows

# Not an error: a dense checkpoint may be loaded to be masked, as into a model whose mask is held. Without names, so that it is said once.
_DROPPED = (
    "load_state_dict drops weights of a sparse layer that are not 0: its mask leaves them out. If the checkpoint is of another mask, call "
    "anymask.to_dense before it is loaded, and to_sparse with that mask after"
)


class SparseWeight:
    """What sparse layers share: `weight` is the vector (K,) of the kept weights, state dicts hold the dense weight under its plain name."""

    anymask_sparse = True  # what `anymask.prunables.compact` looks for; nobody else has it
    weight: Any
    _parameters: Any
    gather: Gather  # the tables
    dense_shape: tuple[int, ...]  # of the dense weight; so is the next
    dense_stride: tuple[int, ...]

    def scatter(self, values: Tensor) -> Tensor:
        """`values` (K,) at the kept places of a dense tensor of zeros."""
        dense = values.new_zeros(self.dense_shape).flatten()
        return dense.index_put((self.places(),), values).view(self.dense_shape)

    def collect(self, dense: Tensor) -> Tensor:
        """The values of a dense tensor at the kept places, (K,)."""
        return dense.reshape(-1)[self.places()]

    def dense(self, value: Any) -> Any:
        """`value` as of the dense layer, where it is a tensor of the stored shape (a slot, an average); else as it is."""
        return self.scatter(value) if isinstance(value, Tensor) and value.shape == self.weight.shape else value

    def stored(self, value: Any) -> Any:
        """The reverse of `dense`, which takes what is stored already as it is."""
        return self.collect(value) if isinstance(value, Tensor) and tuple(value.shape) == self.dense_shape else value

    def places(self) -> Tensor:
        """Flat places of the kept weights, (K,)."""
        return torch.from_numpy(self.gather.conv.kept)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if "weight" in self._parameters:  # else somebody's parametrization has it under another name
            destination[prefix + "weight"] = self.scatter(self.weight if keep_vars else self.weight.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "weight")
        if given is not None:
            state_dict = {**state_dict, prefix + "weight": (stored := self.stored(given))}
            if stored is not given and not given.is_meta and given.count_nonzero() > stored.count_nonzero():
                warnings.warn(_DROPPED, stacklevel=2)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def extra_repr(self) -> str:
        """As the dense layer's, and what is kept."""
        return f"{super().extra_repr()}, kept={len(self.weight)}"  # type: ignore[misc]


def _single(input: Tensor) -> Tensor:
    """Autocast's halves as float32."""
    if input.dtype is torch.float64:
        raise SettingError(
            "a sparse layer was given float64",
            allowed="float32, as its weights are",
            fix="call model.float() and give x.float(), or to_dense",
        )
    return input.float()


class SparseConv2d(SparseWeight, nn.Conv2d):
    """A Conv2d of kept weights. Made by `to_sparse`."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) to (N, O, OH, OW) or (O, OH, OW)."""
        if input.ndim == 3:
            return self.forward(input[None])[0]
        return ops.conv(_single(input), self.weight, self.bias, self.gather.handle)


class SparseLinear(SparseWeight, nn.Linear):
    """A Linear of kept weights. Made by `to_sparse`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., O)."""
        rows = input.reshape(-1, self.in_features)
        out = ops.conv(_single(rows)[:, :, None, None], self.weight, self.bias, self.gather.handle)
        return out[:, :, 0, 0].reshape(*input.shape[:-1], self.out_features)


# Those called BatchLast, without sparse weights, are what they were unless they are given batch-last tensors.
class BatchLastNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d, which takes the ReLU after it along (`relu`) while nobody hooks into either, and the max pool after that (`pool`)."""

    relu: "tuple[FusedReLU, ...]" = ()  # in a tuple, so that it is no child
    pool: tuple[nn.Module, ...] = ()  # the pool, and what contains a part of the three
    done = (False, False)  # whether the last call did the ReLU, and the pool
    waiting: "set[int]" = set()  # threads in which the ReLU that is done has not been called yet  # noqa: RUF012

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same, or to what the pool gives."""
        soft = self.fuses(input)
        if self.relu:
            self.__dict__["done"] = soft is not None, soft is not None and self.pools()
        if not layout.is_batch_last(input):
            return super().forward(input)
        y = self.normed(input, None, soft=soft, pool=self.done[1])
        if self.done[0] and not torch.compiler.is_compiling():
            y.anymask_done = (id(self), self.done[1], _version(y))  # type: ignore[attr-defined]  # on the tensor: others may call this meanwhile
            self.waiting.add(get_ident())
        return y

    def has_done(self, input: Tensor, *, pool: bool) -> bool:
        """Whether this gave `input`, with the ReLU, or the `pool`, that asks done already.

        A ReLU may be called with something else, too, in training, say; and it is too late where something came in between.
        """
        if torch.compiler.is_compiling():
            return self.done[pool]
        norm, pooled, version = vars(input).get("anymask_done", (None, False, 0))
        if norm == id(self) and version == _version(input):
            self.waiting.discard(get_ident())
            if pool or not pooled:
                del vars(input)["anymask_done"]  # torch.save of what the model gives would keep it
            return pooled or not pool
        if get_ident() in self.waiting:
            self.waiting.discard(get_ident())
            raise SettingError(
                "a ReLU was given something else than in the example of to_sparse",
                allowed="what the batch norm before it gave, which has done it already",
                fix="put what comes in between in training into a module of its own, or let the model stay dense (sparse='off' in fit); "
                "call anymask.to_dense before a ReLU or pool is replaced",
            )
        return False

    def normed(self, input: Tensor, add: Tensor | None, *, soft: float | None, pool: bool = False) -> Tensor:
        """The norm of a batch-last tensor, plus `add`, then a ReLU as soft as asked (0: a plain one; None: none), then a max pool."""
        batch = self.training or self.running_mean is None
        if self.training and input.numel() == input.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")  # as PyTorch's own
        given = (None, None) if batch else (self.running_mean, self.running_var)
        tiles = self.pool[0].tiles(input) if pool and isinstance(self.pool[0], BatchLastMaxPool2d) else (0, 0, 0, 0)
        y, mean, var, _ = ops.norm(input, add, self.weight, self.bias, *given, self.eps, soft is not None, soft or 0.0, *tiles)
        if self.training and self.track_running_stats:
            self._track(mean, var, input.numel() // input.shape[1])
        return y

    def fuses(self, input: Tensor) -> float | None:
        """How soft the ReLU is that is done here for this input; None where it is not done here."""
        return _softness(self.relu[0], input) if self.relu and layout.is_batch_last(input) and not _hooked(self) else None

    def pools(self) -> bool:
        """Whether the max pool is done here, too, where the ReLU is."""
        return bool(self.pool) and not any(map(_hooked, self.pool))

    def running(self, channels: int) -> calls.Running | None:
        """What it remembers, where the kernels can follow it."""
        return calls.running(channels, self._buffers, self.momentum)

    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        if ops.unseen([mean, var, self.running_mean, self.running_var]) and (running := self.running(len(mean))):
            calls.track(running, mean, var, count)
            return
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var * (count / max(1, count - 1)), share)


class FusedSum:
    """Made for a module that computes `act(body(x) + shortcut(x))` and says so by `anymask_sum`: its last norm does all three."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the module's own."""
        norm: Any = self.body[-1] if isinstance(self.body, nn.Sequential) and len(self.body) else None
        fits = isinstance(norm, BatchLastNorm2d) and not norm.relu and type(self.act) in {nn.ReLU, nn.Identity}
        soft = _softness(self.act, x)
        if norm is None or not fits or soft is None or _hooked(self.body) or _hooked(norm):
            return super().forward(x)  # type: ignore[misc]
        other, last = None, soft if type(self.act) is nn.ReLU else None
        stages = None if any(getattr(m, "inplace", False) for m in self.shortcut.modules()) else _stages(self.body, x, last=last)
        if stages is not None:
            other = self.shortcut(x)
            if layout.is_batch_last(other) and (*other.shape[1:], len(other)) == stages[-1].how.output and ops.unseen([other]):
                return rows.row(stages, x, other)
        inner = x
        for layer in self.body[:-1]:
            inner = layer(inner)
        other = self.shortcut(x) if other is None else other
        if not layout.is_batch_last(inner) or other.shape != inner.shape or other.dtype != inner.dtype:
            return self.act(norm(inner) + other)
        return norm.normed(inner, other, soft=soft if type(self.act) is nn.ReLU else None)

    def __reduce__(self) -> Any:  # the class has no name by which pickle could find it
        return _new_sum, (type(self).__mro__[2],), self.__dict__


def _stages(body: nn.Sequential, x: Tensor, *, last: float | None) -> list[rows.Stage] | None:
    """The layers of `body` as a row, the ReLU after it as soft as `last` says (None: there is none); None where a row is not the same."""
    if not ops.unseen([x]) or not layout.is_batch_last(x) or nn.modules.module._has_any_global_hook():
        return None
    found: list[rows.Stage] = []
    modules, at, shape = list(body._modules.values()), 0, x.shape
    while at < len(modules):
        conv, norm = modules[at], modules[at + 1] if at + 1 < len(modules) else None
        if type(conv) is not SparseConv2d or conv.bias is not None or type(norm) is not BatchLastNorm2d or _seen_now(conv):
            return None
        at += 2
        soft = last if at == len(modules) else None
        if norm.relu:
            soft = 0.0 if not _hooked_itself(norm.relu[0]) else norm.fuses(x)
            if soft is None or at == len(modules) or modules[at] is not norm.relu[0]:
                return None
            at += 1
        how = calls.sized(conv.gather, shape)
        o, h, w, n = how.output
        running = norm.running(o) if norm.track_running_stats else None
        fits = shape[1] == how.input[0] and norm.training and norm.num_features == o and not norm.pools() and not _hooked_itself(norm)
        fits = fits and h * w * n > 1  # or the norm refuses
        if not fits or (running is None and norm.track_running_stats):
            return None
        named = [("weight", conv), ("weight", norm), ("bias", norm)]
        trained: Any = [layer._parameters[name] for name, layer in named if name in layer._parameters]
        if len(trained) < len(named) or not ops.unseen(trained):  # one of them is a plain tensor, put there for this call
            return None
        found.append(rows.Stage(conv.gather, how, norm.eps, soft, running, *trained))
        shape = torch.Size((n, o, h, w))
    return found


@cache
def fused_sum(kind: type) -> type:
    """The class that `FusedSum` makes of `kind`."""
    return type(f"Fused{kind.__name__}", (FusedSum, kind), {"__module__": __name__})


def _new_sum(kind: type) -> Any:
    return object.__new__(fused_sum(kind))


class FusedReLU(nn.ReLU):
    """A ReLU after a batch norm, which has done it already unless somebody hooks into either."""

    norm: tuple[BatchLastNorm2d, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return input if self.norm and self.norm[0].has_done(input, pool=False) else super().forward(input)


class BatchLastMaxPool2d(nn.MaxPool2d):
    """A MaxPool2d, which a norm may have done already."""

    norm: tuple[BatchLastNorm2d, ...] = ()

    def is_tiling(self) -> bool:
        """Whether windows lie side by side from the first place on, of places that a byte counts: what a norm takes along."""
        plain = _pair(self.padding) == (0, 0) and _pair(self.dilation) == (1, 1) and not self.return_indices
        plain = plain and math.prod(_pair(self.kernel_size)) <= 256
        return plain and _pair(self.stride) == _pair(self.kernel_size)

    def tiles(self, input: Tensor) -> tuple[int, ...]:
        """(OH, OW, KH, KW) for this input, where it `is_tiling`."""
        kernel = _pair(self.kernel_size)
        size = [_pool_size(n, k, k, 0, ceil=self.ceil_mode) for n, k in zip(input.shape[2:], kernel, strict=True)]
        if not all(size):
            super().forward(input)  # which refuses that
        return *size, *kernel

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, OH, OW)."""
        if self.norm and self.norm[0].has_done(input, pool=True):
            return input
        if not layout.is_batch_last(input) or self.return_indices or _pair(self.dilation) != (1, 1):
            return super().forward(input)
        return _pooled(self, input, mean=False)


class BatchLastAvgPool2d(nn.AvgPool2d):
    """An AvgPool2d; with padding or another divisor it is PyTorch's own."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, OH, OW)."""
        if not layout.is_batch_last(input) or _pair(self.padding) != (0, 0) or self.divisor_override is not None:
            return super().forward(input)
        return _pooled(self, input, mean=True)


class BatchLastZeroPad3d(nn.ZeroPad3d):
    """A ZeroPad3d, which pads rows, columns and channels of a map."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same, larger."""
        if not layout.is_batch_last(input):
            return super().forward(input)
        return F.pad(input.permute(1, 2, 3, 0), (0, 0, *self.padding)).permute(3, 0, 1, 2)


def _version(x: Tensor) -> int:
    """How often `x` was written over."""
    return -1 if x.is_inference() else x._version


def unlink(layer: nn.Module) -> None:
    """Let a norm, ReLU or pool, and those that it is done together with, be done each by itself."""
    for norm in (layer, *getattr(layer, "norm", ())):
        for other in (*getattr(norm, "relu", ()), *getattr(norm, "pool", ()), norm):
            for link in ("relu", "pool", "norm", "done", "waiting"):
                other.__dict__.pop(link, None)


def _pooled(layer: Any, x: Tensor, *, mean: bool) -> Tensor:
    kernel, stride, padding = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding))
    size = [_pool_size(n, k, s, p, ceil=layer.ceil_mode) for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    return ops.pool(x, size, [*kernel, *stride, *padding], mean)


def _pool_size(n: int, kernel: int, stride: int, padding: int, *, ceil: bool) -> int:
    size = (n + 2 * padding - kernel + (stride - 1 if ceil else 0)) // stride + 1
    return size - 1 if ceil and (size - 1) * stride >= n + padding else size  # no window begins in the padding


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


class Softens:
    """Who hooks into a ReLU and does no more than make it soft, so that the norm before it may do that, too."""

    def softness(self) -> float | None:
        """The strength of `ops.soft_relu` that does the same; None where it does not."""
        raise NotImplementedError


class Glances:
    """A hook before a layer's forward pass that looks now and then, so that others may call the layer without it in between."""

    def glances(self) -> bool:
        """Whether it has to see the next call."""
        raise NotImplementedError


def _seen_now(layer: nn.Module) -> bool:
    if not layer._forward_pre_hooks:
        return _hooked_itself(layer)
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks or _replaced(layer):
        return True
    return any(not isinstance(hook, Glances) or hook.glances() for hook in layer._forward_pre_hooks.values())


def _softness(relu: nn.Module, x: Tensor) -> float | None:
    """How soft `relu` is on a tensor like `x`: 0 where nobody hooks into it, None where what it gives is only known by calling it."""
    if not _hooked(relu):
        return 0.0
    if not ops.softens(x) or _replaced(relu) or nn.modules.module._has_any_global_hook():
        return None
    if relu._backward_hooks or relu._backward_pre_hooks:
        return None
    who = [getattr(hook, "__self__", None) for hook in (*relu._forward_pre_hooks.values(), *relu._forward_hooks.values())]
    return who[0].softness() if isinstance(who[0], Softens) and all(other is who[0] for other in who) else None


def _hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what comes in or goes out, forward or backward, here or everywhere."""
    return _hooked_itself(module) or nn.modules.module._has_any_global_hook()


def _hooked_itself(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or _replaced(module)


def _replaced(module: nn.Module) -> bool:
    """Whether somebody has put another forward in the place of its class's."""
    return "forward" in vars(module) or module._compiled_call_impl is not None
