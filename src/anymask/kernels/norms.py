"""Batch norms and pools between sparse layers, NumPy in and out."""

from collections.abc import Callable
from ctypes import Structure, byref
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymask.errors import SettingError
from anymask.kernels.library import INT, call, held_call, library
from anymask.kernels.native import Address, Floats, address, check

_PARTED = 1 << 15  # numbers of a map that are worth a second thread
Bytes = NDArray[np.uint8]
Signs = NDArray[np.uint16]


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
    """`Norm.forward` without a pool, of (C, size): x, add, weight, bias, eps, relu, soft, given, mean, var, out, signs, threads; arrays by
    their addresses, which nobody checks.
    """
    call(library().am_norm, channels, size, *args)


def norm_gradient(channels: int, size: int, *args: Any) -> None:
    """`Norm.gradient`, likewise: x, add, g, weight, bias, mean, var, signs, eps, relu, soft, given, gx, gadd, gweight, gbias, threads."""
    call(library().am_norm_back, channels, size, *args)


def signs_shape(channels: int, size: int) -> tuple[int, int]:
    """Of the uint16 that say of each vector what a plain ReLU lets through."""
    return channels, -(-size // library().am_width())


def track(channels: int, *args: Any) -> None:
    """What a norm remembers: mean and biased variance of a batch, its share, what makes the variance unbiased, and what is written: running
    mean, running variance and the number of batches (int64).
    """
    call(library().am_norm_tracking, channels, *args)


@dataclass(frozen=True)
class Norm:
    """A batch norm of (C, ...), contiguous, with a ReLU after it if asked: `relu(weight * (x - mean) / sqrt(var + eps) + bias + add)`.

    Args:
        weight: (C,), or None for 1; so is bias, for 0.
        mean: (C,), written by `forward` unless it is `given`; so is var, the biased variance.
        soft: above 0 the ReLU is its ghost of that strength, as `soften` has it.
        pool: a max pool after the ReLU, whose windows of at most 256 places do not overlap: `out` and `g` are of its output, and so is
            `place`, uint8, where `forward` notes what `gradient` has to know. Not together with `add`.
    """

    weight: Floats | None
    bias: Floats | None
    mean: Floats
    var: Floats
    eps: float
    relu: bool
    given: bool
    threads: int
    soft: float = 0.0
    pool: Pool | None = None

    def forward(self, x: Floats, out: Floats, *, add: Floats | None = None, place: Bytes | None = None, signs: Signs | None = None) -> None:
        """x, and what is added before the ReLU, into out; and `signs` of `signs_shape`, where the ReLU is a plain one."""
        if self.pool is not None:
            self._check(x, x)
            self.pool.check(x, out)
            self._check_pool(add, out, place)
            kind = (self.eps, self.soft, int(self.given))
            given, last = map(address, (x, self.weight, self.bias)), map(address, (self.mean, self.var, out, place))
            call(library().am_norm_pooling, byref(self.pool), *given, *kind, *last, self.threads)
            return
        self._check(x, x, add, out)
        given, written = map(address, (x, add, self.weight, self.bias)), map(address, (self.mean, self.var, out))
        how = (self.eps, self.relu, self.soft, self.given)
        norm(len(x), x.size // len(x), *given, *how, *written, self._signs(signs, x), self.threads)

    def gradient(
        self,
        x: Floats,
        g: Floats,
        out: tuple[Floats | None, ...],
        *,
        add: Floats | None = None,
        place: Bytes | None = None,
        signs: Signs | None = None,
    ) -> None:
        """Into out = (of x, of add or None, of weight, of bias); g is that of what `forward` gave, whose ReLU is done again here.

        Or it is read off the `signs` that `forward` wrote, and needs no `add` then.
        """
        gx, gadd, *of_channels = out
        for vector in of_channels:
            check("the gradient", vector, (len(x),))
        if self.pool is not None:
            self._check(x, gx)
            self.pool.check(x, g)
            self._check_pool(add, g, place)
            given = map(address, (x, g, place, self.weight, self.bias, self.mean, self.var))
            kind = (self.eps, self.soft, int(self.given))
            call(library().am_norm_pooling_back, byref(self.pool), *given, *kind, *map(address, (gx, *of_channels)), self.threads)
            return
        self._check(x, add, g, gx, gadd)
        given = map(address, (x, add, g, self.weight, self.bias, self.mean, self.var))
        how = (self._signs(signs, x), self.eps, self.relu, self.soft, self.given)
        norm_gradient(len(x), x.size // len(x), *given, *how, *map(address, out), self.threads)

    def _check_pool(self, add: Floats | None, y: Floats, place: Bytes | None) -> None:
        assert self.pool is not None
        if add is not None or not self.relu or self.pool.kh * self.pool.kw > 256:
            allowed = "norm, ReLU and a pool of at most 256 places"
            raise SettingError("a norm with a pool too large, no ReLU, or a sum", allowed=allowed, fix="leave the pool out")
        if place is None or place.dtype != np.uint8 or place.shape != y.shape or not place.flags.c_contiguous:
            raise SettingError("a norm with a pool, but no places", allowed="uint8, of the pool's shape", fix="give what `forward` got")

    def _signs(self, signs: Signs | None, x: Floats) -> Address:
        if signs is None:
            return None
        fits = self.relu and not self.soft and signs.dtype == np.uint16 and signs.flags.c_contiguous
        if not fits or signs.shape != signs_shape(len(x), x.size // len(x)):
            raise SettingError("a norm with other signs", allowed="those of a plain ReLU of this size", fix="leave them out")
        return address(signs)

    def _check(self, x: Floats, *others: Floats | None) -> None:
        for array in others:
            check("a map", array, x.shape)
        for name in ("weight", "bias", "mean", "var"):
            check(f"the {name}", getattr(self, name), (len(x),))
