"""Batch norms and pools between sparse layers, NumPy in and out."""

from collections.abc import Callable
from ctypes import Structure, byref
from functools import partial
from typing import Any

from anymask.kernels.library import INT, call, held_call, library
from anymask.kernels.native import Floats, address, check

_PARTED = 1 << 15  # numbers of a map that are worth a second thread


class Pool(Structure):
    """A max or average (`mean`) pool of (C, H, W, N) to (C, OH, OW, N); windows are cut off where the input ends."""

    _fields_ = tuple(
        (name, INT) for name in ("images", "channels", "rows", "cols", "out_rows", "out_cols", "kh", "kw", "sh", "sw", "ph", "pw", "mean")
    )

    def forward(self, x: Floats, out: Floats, *, threads: int) -> None:
        """x (C, H, W, N) into out (C, OH, OW, N)."""
        self.check(x, out)
        call(library().am_pooling, byref(self), address(x), address(out), threads)

    def bind(self, x: Floats, out: Floats, *, threads: int) -> Callable[[], None]:
        """`forward` as a call without arguments, for as long as these arrays live: the addresses are taken once."""
        self.check(x, out)
        held = (self, x, out)
        return partial(held_call, held, library().am_pooling, byref(self), address(x), address(out), threads if x.size > _PARTED else 1)

    def gradient(self, x: Floats, y: Floats, g: Floats, out: Floats, *, threads: int) -> None:
        """Of x, into out: y is what `forward` gave, g its gradient."""
        self.check(x, y)
        self.check(out, g)
        call(library().am_pooling_back, byref(self), *map(address, (x, y, g, out)), threads)

    def check(self, x: Floats, y: Floats) -> None:
        """Refuse an input or output of another shape."""
        check("the input", x, (self.channels, self.rows, self.cols, self.images))
        check("the output", y, (self.channels, self.out_rows, self.out_cols, self.images))


def norm(channels: int, size: int, *args: Any) -> None:
    """A batch norm of (C, size), with a ReLU after it if asked: `relu(weight * (x - mean) / sqrt(var + eps) + bias + add)`.

    Args:
        args: x, add, weight, bias, eps, relu, soft, given, mean, var, out, signs, threads; arrays by their addresses, which nobody checks.
            Without a weight it is 1, without a bias 0; mean and biased variance are written unless they are `given`; with `soft` above 0
            the ReLU is its ghost of that strength, as `soften` has it; `signs` of `signs_shape` are written by a plain one.
    """
    call(library().am_norm, channels, size, *args)


def norm_gradient(channels: int, size: int, *args: Any) -> None:
    """Its gradient, likewise: x, add, g, weight, bias, mean, var, signs, eps, relu, soft, given, gx, gadd, gweight, gbias, threads.

    The ReLU is done again here, or read off the `signs` that `norm` wrote, which needs no `add` then.
    """
    call(library().am_norm_back, channels, size, *args)


def pooled_norm(pool: Pool, *args: Any) -> None:
    """`norm` with its ReLU and then a max pool, whose windows of at most 256 places do not overlap.

    Args:
        pool: a max pool.
        args: x, weight, bias, eps, soft, given, mean, var, out, place, threads. What `pooled_norm_gradient` has to know is written into
            `place`, uint8, of the shape of `out`.
    """
    call(library().am_norm_pooling, byref(pool), *args)


def pooled_norm_gradient(pool: Pool, *args: Any) -> None:
    """Its gradient: x, g, place, weight, bias, mean, var, eps, soft, given, gx, gweight, gbias, threads."""
    call(library().am_norm_pooling_back, byref(pool), *args)


def signs_shape(channels: int, size: int) -> tuple[int, int]:
    """Of the uint16 that say of each vector what a plain ReLU lets through."""
    return channels, -(-size // library().am_width())


def track(channels: int, *args: Any) -> None:
    """What a norm remembers: mean and biased variance of a batch, its share, what makes the variance unbiased, and what is written: running
    mean, running variance and the number of batches (int64).
    """
    call(library().am_norm_tracking, channels, *args)
