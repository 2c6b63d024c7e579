"""The kernels on tensors, into tensors that are there. They get addresses: an array around a tensor takes longer than a small kernel."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymask.errors import SettingError
from anymask.kernels import Gather, native, norms
from anymask.kernels.native import Address
from anymask.sparse.layout import batch_last, empty


def sized(gather: Gather, shape: torch.Size) -> native.Sized:
    """`gather` for inputs of `shape`, (N, C, H, W)."""
    return gather.at(shape[2], shape[3], images=shape[0], threads=torch.get_num_threads())


def conv(how: native.Sized, x: Tensor, values: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The convolution of x with the kept weights `values` (K,), into what `layout.empty` gave."""
    held = _map("the input", x, how.input), _vector("the weight", values, how.kept), _vector("the bias", bias, how.output[0])
    (_, x_at), (_, values_at), (_, bias_at) = held
    how.forward(x_at, values_at, bias_at, None, False, out.data_ptr())


def conv_gradient(
    how: native.Sized, x: Tensor, g: Tensor, values: Tensor, *, add: Tensor | None = None, gx: Tensor | None, gvalues: Tensor | None
) -> None:
    """Of x, plus `add` (which gx may be itself), into gx, and of the kept weights into gvalues, which is 0; what is None is not wanted."""
    held = _map("the output", g, how.output), _vector("the weight", values, how.kept), _map("what is added", add, how.input)
    (_, g_at), (_, values_at), (_, add_at) = held
    if gvalues is None:
        assert gx is not None
        how.input_gradient(g_at, values_at, add_at, gx.data_ptr())
        return
    x, x_at = _map("the input", x, how.input)
    if gx is None:
        how.weight_gradient(x_at, g_at, gvalues.data_ptr())
    else:
        how.gradients(x_at, g_at, values_at, add_at, gx.data_ptr(), gvalues.data_ptr())


class Norm(NamedTuple):
    """A batch norm and what follows it, as `ops.norm` has them."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    relu: bool
    soft: float
    given: bool


def signs(x: Tensor) -> Tensor:
    """Empty ones for `norm` of x, (N, C, H, W)."""
    return x.new_empty(norms.signs_shape(x.shape[1], x.numel() // x.shape[1]), dtype=torch.uint16)


def norm(how: Norm, x: Tensor, add: Tensor | None, out: Tensor, *, signs: Tensor | None = None) -> None:
    """The norm of x plus `add`, then the ReLU, into what `layout.empty` gave; the statistics into `how` where they are not given.

    A plain ReLU writes into `signs` what it let through, where they are given.
    """
    n, c, h, w = x.shape
    held = [*(_map("a map", t, (c, h, w, n)) for t in (x, add)), *_vectors(how, c)]
    (_, x_at), (_, add_at), (_, weight_at), (_, bias_at), (_, mean_at), (_, var_at) = held
    last = (mean_at, var_at, out.data_ptr(), _of_signs(signs, x), torch.get_num_threads())
    norms.norm(c, h * w * n, x_at, add_at, weight_at, bias_at, how.eps, how.relu, how.soft, how.given, *last)


Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor]


def norm_gradient(how: Norm, x: Tensor, add: Tensor | None, g: Tensor, out: Gradients, *, signs: Tensor | None = None) -> None:
    """Into `out`: of x (which may be g itself), of `add` or None, of weight and of bias; `g` is that of what `norm` gave.

    `signs` are what `norm` wrote; `add` is not needed then.
    """
    n, c, h, w = x.shape
    held = [*(_map("a map", t, (c, h, w, n)) for t in (x, add, g)), *_vectors(how, c)]
    out_at = [None if t is None else t.data_ptr() for t in out]
    signs = None if signs is None else signs.contiguous()
    last = (_of_signs(signs, x), how.eps, how.relu, how.soft, how.given, *out_at, torch.get_num_threads())
    norms.norm_gradient(c, h * w * n, *(at for _, at in held), *last)


def pooled_norm(how: Norm, pool: norms.Pool, x: Tensor, out: Tensor, place: Tensor) -> None:
    """`norm` with its ReLU and then the max pool, into `out` and `place` (uint8) that `layout.empty` gave."""
    n, c, h, w = x.shape
    held = [_map("a map", x, (c, h, w, n)), *_vectors(how, c)]
    (_, x_at), (_, weight_at), (_, bias_at), *stats = held
    last = (*(at for _, at in stats), out.data_ptr(), place.data_ptr(), torch.get_num_threads())
    norms.pooled_norm(pool, x_at, weight_at, bias_at, how.eps, how.soft, how.given, *last)


def pooled_norm_gradient(how: Norm, pool: norms.Pool, x: Tensor, g: Tensor, *, place: Tensor, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Into `out`: of x, of weight and of bias; `place` is what `pooled_norm` wrote."""
    n, c, h, w = x.shape
    held = [_map("a map", x, (c, h, w, n)), _map("a map", g, (c, pool.out_rows, pool.out_cols, n)), *_vectors(how, c)]
    if place.dtype is not torch.uint8 or place.shape != g.shape:
        raise _other("the places of a pool", place, f"uint8 {tuple(g.shape)}")
    place = batch_last(place)
    (_, x_at), (_, g_at), *vectors = held
    last = (how.eps, how.soft, how.given, *(t.data_ptr() for t in out), torch.get_num_threads())
    norms.pooled_norm_gradient(pool, x_at, g_at, place.data_ptr(), *(at for _, at in vectors), *last)


class Running(NamedTuple):
    """What a BatchNorm2d remembers, which `track` moves."""

    mean: Tensor
    var: Tensor
    batches: Tensor
    momentum: float


def running(channels: int, buffers: Mapping[str, Tensor | None], momentum: float | None) -> Running | None:
    """Of the buffers of a BatchNorm2d; None where the kernels cannot write them, or do not know how."""
    mean, var, batches = (buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))
    if momentum is None or mean is None or var is None or batches is None or batches.dtype is not torch.int64 or batches.numel() != 1:
        return None
    for x in (mean, var):
        if x.shape != (channels,) or x.dtype is not torch.float32 or not x.is_contiguous():
            return None
    return Running(mean, var, batches, momentum) if mean.is_cpu and var.is_cpu and batches.is_cpu else None


def track(how: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """Move it towards the statistics of a batch of `count` numbers, in a tenth of what PyTorch's four operators for it take."""
    *tensors, momentum = how
    unbiased = count / max(1, count - 1)
    norms.track(len(mean), mean.data_ptr(), var.data_ptr(), momentum, unbiased, *(t.data_ptr() for t in tensors))
    torch.autograd.graph.increment_version(tensors)


def _of_signs(signs: Tensor | None, x: Tensor) -> Address:
    if signs is None:
        return None
    shape = norms.signs_shape(x.shape[1], x.numel() // x.shape[1])
    if signs.dtype is not torch.uint16 or signs.shape != shape:
        raise _other("what a ReLU let through", signs, f"uint16 {shape}")
    return signs.data_ptr()


def _other(what: str, saved: Tensor, shape: str) -> SettingError:
    return SettingError(
        f"{what} came back as {saved.dtype} {tuple(saved.shape)}",
        allowed=f"the {shape} that were saved",
        fix="see that the hooks on saved tensors give back what they got",
    )


def _vectors(how: Norm, c: int) -> list[tuple[Any, Address]]:
    return [_vector("a vector", t, c) for t in how[:4]]


def _map(what: str, x: Any, shape: tuple[int, ...]) -> tuple[Any, Address]:
    """`x` (N, C, H, W) batch-last in memory, copied where it is not, and where it lies. `shape` is (C, H, W, N)."""
    if x is None:
        return None, None
    c, h, w, n = shape
    if x.shape != (n, c, h, w) or x.dtype is not torch.float32 or not x.is_cpu:
        came = tuple(x.permute(1, 2, 3, 0).shape if x.ndim == 4 else x.shape)
        raise _wrong(what, x, came, shape)
    x = _written(x)
    if x.stride() != (1, h * w * n, w * n, n) and not (n == 1 and x.is_contiguous()):
        x = _transposed(x) if x.is_contiguous() and x.numel() else batch_last(x).permute(3, 0, 1, 2)
    return x, x.data_ptr()


def _transposed(x: Tensor) -> Tensor:
    """Images as they come from a loader, in half of the time that PyTorch takes in the middle of a training."""
    out = empty(x, x.shape)
    native.transpose(len(x), x[0].numel(), x.data_ptr(), out.data_ptr(), threads=torch.get_num_threads())
    return out


def _vector(what: str, x: Any, length: int) -> tuple[Any, Address]:
    """`x` (length,), copied where it has gaps, and where it lies."""
    if x is None:
        return None, None
    if x.shape != (length,) or x.dtype is not torch.float32 or not x.is_cpu:
        raise _wrong(what, x, tuple(x.shape), (length,))
    x = _written(x).contiguous()
    return x, x.data_ptr()


def _written(x: Tensor) -> Tensor:
    """`x` with its numbers in memory: not negated when they are read, nor zeros that nobody wrote."""
    return x.resolve_neg().clone() if x.is_neg() or x._is_zerotensor() else x


def _wrong(what: str, x: Tensor, came: tuple[int, ...], shape: tuple[int, ...]) -> SettingError:
    where = "" if x.is_cpu else f" on {x.device}"
    return native.wrong(what, f"{x.dtype} {came}{where}".removeprefix("torch."), shape)
