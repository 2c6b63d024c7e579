"""The native library by ctypes: no header of Python or PyTorch, so that one build serves every version of both."""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from anymask.errors import SettingError
from anymask.kernels.plans import Conv, Job, backward, forward

Floats = NDArray[np.float32]
_INT, _POINTER, _C_INT, _C_FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_SIZES = (
    "images", "lanes", "src_channels", "src_rows", "src_cols", "dst_channels", "dst_rows", "dst_cols", "rows", "row_start", "row_step",
    "src_row_start", "src_row_step", "ring", "cols", "packed_cols", "strips", "col_tiles", "kept",
)  # fmt: skip
_VERSION = 6  # of the interface in core.c
_TABLES = ("run_ptr", "runs", "dst_map", "rowptr", "off")


class _AmJob(ctypes.Structure):
    _fields_ = (*((name, _INT) for name in _SIZES), *((name, _POINTER) for name in _TABLES))


@cache
def library() -> Any:
    """The library, or None where it was not built.

    ANYMASK_ISA (avx512, avx2, portable) takes a lesser instruction set than the best, ANYMASK_NATIVE another build of the library.
    """
    other = os.environ.get("ANYMASK_NATIVE")
    found = [Path(other)] if other else sorted(Path(__file__).parent.glob("*.clib"))
    try:
        loaded = ctypes.CDLL(str(found[0])) if found else None
    except OSError:  # of another machine, or no OpenMP here
        return None
    if loaded is None or not hasattr(loaded, "am_version") or loaded.am_version() != _VERSION:
        return None
    loaded.am_use.restype, loaded.am_use.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    loaded.am_gather.argtypes = [_POINTER] * 5 + [_C_INT, _POINTER, _C_INT]
    loaded.am_dot.argtypes = [_POINTER] * 4 + [_C_INT]
    loaded.am_both.argtypes = [_POINTER] * 6 + [_C_INT]
    loaded.am_norm.argtypes = [*[_INT] * 2, *[_POINTER] * 4, _C_FLOAT, _C_INT, _C_FLOAT, _C_INT, *[_POINTER] * 3, _C_INT]
    loaded.am_norm_back.argtypes = [*[_INT] * 2, *[_POINTER] * 7, _C_FLOAT, _C_INT, _C_FLOAT, _C_INT, *[_POINTER] * 4, _C_INT]
    loaded.am_norm_pooling.argtypes = [*[_POINTER] * 4, *[_C_FLOAT] * 2, _C_INT, *[_POINTER] * 4, _C_INT]
    loaded.am_norm_pooling_back.argtypes = [*[_POINTER] * 8, *[_C_FLOAT] * 2, _C_INT, *[_POINTER] * 3, _C_INT]
    loaded.am_block_products.argtypes = [_INT, *[_POINTER] * 4, _C_FLOAT, _POINTER, _C_INT]
    wanted = os.environ.get("ANYMASK_ISA")
    if loaded.am_use(wanted.encode() if wanted else None) is None:
        raise SettingError(f"ANYMASK_ISA is {wanted!r}", allowed="avx512, avx2 or portable, as far as this machine has it", fix="unset it")
    loaded.am_pooling.argtypes = [_POINTER] * 3 + [_C_INT]
    loaded.am_pooling_back.argtypes = [_POINTER] * 5 + [_C_INT]
    loaded.am_softening.argtypes = [_INT, _POINTER, _POINTER, _C_FLOAT, _POINTER, _C_INT]
    return loaded


def available() -> bool:
    """Whether the native library is here."""
    return library() is not None


def isa() -> str:
    """The instruction set in use: avx512, avx2 or portable."""
    name: bytes = library().am_use(os.environ["ANYMASK_ISA"].encode() if os.environ.get("ANYMASK_ISA") else None)
    return name.decode()


def why_not() -> str:
    """What to do where it is not."""
    how = "install a C compiler (gcc or clang) and run pip install --force-reinstall --no-deps anymask"
    return f"the native kernels were not built, or of another version: {how}"


_WORTH_A_THREAD = 300_000  # multiply-adds: fewer are done before a second thread is awake
_HANDLES = count()
_GATHERS: "WeakValueDictionary[int, Gather]" = WeakValueDictionary()


def gather_of(handle: int) -> "Gather":
    """The `Gather` that has this handle, for as long as somebody keeps it: operators take numbers, not objects."""
    return _GATHERS[handle]


class Gather:
    """A convolution over kept weights: forward, gradient of the input, gradient of the kept weights.

    Tensors are batch-last: (C, H, W, N), float32, C-contiguous. A linear layer is a 1x1 convolution of (C, 1, 1, N).

    Args:
        weight_shape: (O, C / groups, KH, KW) of the dense weight.
        kept: flat places of the kept weights, rising. Shape (K,).
        stride: of rows and columns; so are padding and dilation.

    Example:
        >>> import numpy as np
        >>> double = Gather((1, 1, 1, 1), np.array([0]))
        >>> double.forward(np.ones((1, 2, 2, 1), np.float32), np.array([2.0], np.float32)).ravel().tolist()
        [2.0, 2.0, 2.0, 2.0]
    """

    def __init__(
        self,
        weight_shape: tuple[int, int, int, int],
        kept: NDArray[np.int64],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        if len(kept) and not (kept[0] >= 0 and kept[-1] < np.prod(weight_shape) and (np.diff(kept) > 0).all()):
            raise SettingError(f"{len(kept)} kept places came out of order or range", allowed="rising, in the weight", fix="sort them")
        self.__setstate__(Conv(weight_shape, kept, stride, padding, dilation, groups))

    def __getstate__(self) -> Conv:
        return self.conv  # a copy makes its own tables, and has a handle of its own

    def __setstate__(self, conv: Conv) -> None:
        self.conv = conv
        self._plans: dict[tuple[Any, ...], list[tuple[Job, _AmJob]]] = {}
        self.handle = next(_HANDLES)
        _GATHERS[self.handle] = self

    def output_shape(self, rows: int, cols: int, *, images: int) -> tuple[int, int, int, int]:
        """(O, OH, OW, N)."""
        return (self.conv.weight_shape[0], *self.conv.output_size(rows, cols), images)

    def forward(
        self,
        x: Floats,
        values: Floats,
        *,
        bias: Floats | None = None,
        add: Floats | None = None,
        relu: bool = False,
        out: Floats | None = None,
        threads: int = 1,
    ) -> Floats:
        """`relu(conv(x) + bias + add)`: x (C, H, W, N), values (K,), bias (O,), add and out (O, OH, OW, N)."""
        out = np.empty(self.output_shape(x.shape[1], x.shape[2], images=x.shape[3]), np.float32) if out is None else out
        self.bind(x, values, bias=bias, add=add, relu=relu, out=out, threads=threads)()
        return out

    def bind(
        self, x: Floats, values: Floats, *, bias: Floats | None, add: Floats | None, relu: bool, out: Floats, threads: int
    ) -> Callable[[], None]:
        """`forward` as a call without arguments, for as long as these arrays live: the addresses are taken once."""
        output = self._checked(x, out, values)
        _check("bias", bias, output[:1])
        _check("add", add, output)
        if not out.size:
            return lambda: None
        ((_, job),) = self._plan("forward", *x.shape[1:3], images=x.shape[3], threads=threads)
        if len(self.conv.kept) * (out.size // len(out)) < _WORTH_A_THREAD:
            threads = 1
        function, held = library().am_gather, (x, values, bias, add, out)
        args = (ctypes.byref(job), *map(_address, (x, values, bias, add)), int(relu), _address(out), threads)

        def call(_held: Any = held) -> None:
            if function(*args):
                raise MemoryError("the native kernels found no memory")

        return call

    def input_gradient(self, g: Floats, values: Floats, out: Floats, *, threads: int = 1) -> Floats:
        """Into `out` (C, H, W, N), for the gradient g (O, OH, OW, N) of the output."""
        self._checked(out, g, values)
        for plan, job in self._plan("backward", *out.shape[1:3], images=out.shape[3], threads=threads) if out.size else ():
            _call(library().am_gather, job, g, values[plan.order], None, None, 0, out, threads)
        return out

    def weight_gradient(self, x: Floats, g: Floats, *, threads: int = 1) -> Floats:
        """Of the kept weights alone. Shape (K,)."""
        self._checked(x, g, None)
        out = np.zeros(len(self.conv.kept), np.float32)
        for _, job in self._plan("forward", *x.shape[1:3], images=x.shape[3], threads=threads) if g.size else ():
            _call(library().am_dot, job, x, g, out, threads)
        return out

    def gradients(self, x: Floats, g: Floats, values: Floats, out: Floats, *, threads: int = 1) -> Floats:
        """Both: that of the input into `out`, that of the kept weights (K,) returned."""
        self._checked(x, g, values)
        _check("the gradient of the input", out, x.shape)
        if x.shape[1] * x.shape[2] == 1 or x.shape[3] < library().am_width():  # the two jobs are cut otherwise, and faster alone
            self.input_gradient(g, values, out, threads=threads)
            return self.weight_gradient(x, g, threads=threads)
        of_values = np.zeros_like(values)
        for plan, job in self._plan("backward", *x.shape[1:3], images=x.shape[3], threads=threads) if x.size else ():
            summed = np.empty(plan.off.shape[1], np.float32)
            _call(library().am_both, job, g, values[plan.order], x, out, summed, threads)
            of_values[plan.order] = summed
        return of_values

    def _checked(self, x: Floats, y: Floats, values: Floats | None) -> tuple[int, ...]:
        """The shape of the output y; the native code would follow a wrong pointer anywhere."""
        _check("the input", x, (self.conv.channels, *x.shape[1:4], *(0,) * (4 - x.ndim)))
        output = self.output_shape(x.shape[1], x.shape[2], images=x.shape[3])
        _check("the output", y, output)
        _check("the weight", values, (len(self.conv.kept),))
        return output

    def _plan(self, kind: str, rows: int, cols: int, *, images: int, threads: int) -> list[tuple[Job, _AmJob]]:
        width = library().am_width()
        key = (kind, rows, cols, images, threads, width)
        if key not in self._plans:
            how = {"images": images, "width": width, "threads": threads}
            jobs = [forward(self.conv, rows, cols, **how)] if kind == "forward" else list(backward(self.conv, rows, cols, **how))
            if len(self._plans) > 7:  # sizes vary without end in some trainings; the tables are as large as the weights
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = [(job, _struct(job)) for job in jobs]
        return self._plans[key]


class Pool(ctypes.Structure):
    """A max or average (`mean`) pool of (C, H, W, N) to (C, OH, OW, N); windows are cut off where the input ends."""

    _fields_ = tuple(
        (name, _INT) for name in ("images", "channels", "rows", "cols", "out_rows", "out_cols", "kh", "kw", "sh", "sw", "ph", "pw", "mean")
    )

    def forward(self, x: Floats, out: Floats, *, threads: int) -> None:
        """x (C, H, W, N) into out (C, OH, OW, N)."""
        self.check(x, out)
        _call(library().am_pooling, self, x, out, threads)

    def gradient(self, x: Floats, y: Floats, g: Floats, out: Floats, *, threads: int) -> None:
        """Of x, into out: y is what `forward` gave, g its gradient."""
        self.check(x, y)
        self.check(out, g)
        _call(library().am_pooling_back, self, x, y, g, out, threads)

    def check(self, x: Floats, y: Floats) -> None:
        """Refuse an input or output of another shape."""
        _check("the input", x, (self.channels, self.rows, self.cols, self.images))
        _check("the output", y, (self.channels, self.out_rows, self.out_cols, self.images))


def soften(x: Floats, out: Floats, *, strength: float, g: Floats | None = None, threads: int = 1) -> None:
    """`s x sigmoid(x) + (1 - s) max(x, 0)` into out, of any shape; with g, the gradient of x for the gradient g of that.

    Example:
        >>> x, out = np.array([-1.0, 1.0], np.float32), np.empty(2, np.float32)
        >>> soften(x, out, strength=1.0); [round(float(value), 4) for value in out]
        [-0.2689, 0.7311]
    """
    for name, array in (("the output", out), ("the gradient", g)):
        _check(name, array, x.shape)
    _check("the input", x, x.shape)
    _call(library().am_softening, x.size, x, g, strength, out, threads)


class Blocks:
    """Values in blocks, each with a matrix of its size.

    Args:
        sizes: how many values each block has, (B,).
        order: the places of the values, block after block, (K,).

    Example:
        >>> swap, values = Blocks(np.array([2]), np.array([0, 1])), np.array([1.0, 2.0], np.float32)
        >>> swap.multiply(values, np.float32([0, 1, 1, 0] + 16 * [0])); values
        array([2., 1.], dtype=float32)
    """

    def __init__(self, sizes: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        self._order = order.astype(np.int32)
        self._first = np.concatenate([[0], sizes.cumsum()]).astype(np.int32)
        self._from = np.concatenate([[0], (sizes**2).cumsum()]).astype(np.int64)

    def multiply(self, values: Floats, matrices: Floats, *, strength: float = 1.0, threads: int = 1) -> None:
        """`values` (K,) towards their product with symmetric `matrices`, scaled to the norm that they have; in place.

        The matrices lie one after the other, each as large as its block, and then come 16 floats of anything: (sum of sizes squared + 16,).
        """
        _check("the values", values, (len(self._order),))
        _check("the matrices", matrices, (int(self._from[-1]) + 16,))
        threads = threads if matrices.size > _WORTH_A_THREAD // 10 else 1  # they come from memory
        where = (len(self._first) - 1, self._first, self._order, self._from)
        _call(library().am_block_products, *where, matrices, strength, values, threads)


def _struct(job: Job) -> _AmJob:
    return _AmJob(
        job.images, job.lanes, *job.src, *job.dst, job.rows, job.row_start, job.row_step, job.src_row_start, job.src_row_step, job.ring,
        job.dst_map.shape[1], job.packed_cols, job.strips, len(job.dst_map), job.off.shape[1],
        *(getattr(job, name).ctypes.data for name in _TABLES),
    )  # fmt: skip


def _check(what: str, array: Floats | None, shape: tuple[int, ...]) -> None:
    """Refuse what the native code would read or write wrongly."""
    if array is not None and (array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous):
        raise SettingError(
            f"{what} of a sparse operator came as {array.dtype} {array.shape}",
            allowed=f"float32 {shape}, contiguous{'; maps are (C, H, W, N)' if len(shape) == 4 else ''}",
            fix="give the shape that the layer was made for; sparse layers compute in float32 (model.float(), or anymask.to_dense)",
        )


def _address(array: Floats | None) -> int | None:
    return None if array is None else array.ctypes.data


def _call(function: Any, *args: Any) -> None:
    given = [_address(a) if isinstance(a, np.ndarray) else ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in args]
    if function(*given):
        raise MemoryError("the native kernels found no memory")


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

    def forward(self, x: Floats, out: Floats, *, add: Floats | None = None, place: NDArray[np.uint8] | None = None) -> None:
        """x, and what is added before the ReLU, into out."""
        if self.pool is not None:
            self._check(x, x)
            self.pool.check(x, out)
            self._check_pool(add, out, place)
            stats = (self.eps, self.soft, int(self.given), self.mean, self.var)
            _call(library().am_norm_pooling, self.pool, x, self.weight, self.bias, *stats, out, place, self.threads)
            return
        self._check(x, x, add, out)
        last = (self.eps, int(self.relu), self.soft, int(self.given), self.mean, self.var, out, self.threads)
        _call(library().am_norm, len(x), x.size // len(x), x, add, self.weight, self.bias, *last)

    def gradient(
        self, x: Floats, g: Floats, out: tuple[Floats | None, ...], *, add: Floats | None = None, place: NDArray[np.uint8] | None = None
    ) -> None:
        """Into out = (of x, of add or None, of weight, of bias); g is that of what `forward` gave, whose ReLU is done again here."""
        gx, gadd, *of_channels = out
        for vector in of_channels:
            _check("the gradient", vector, (len(x),))
        if self.pool is not None:
            self._check(x, gx)
            self.pool.check(x, g)
            self._check_pool(add, g, place)
            stats = (self.mean, self.var, self.eps, self.soft, int(self.given))
            _call(library().am_norm_pooling_back, self.pool, x, g, place, self.weight, self.bias, *stats, gx, *of_channels, self.threads)
            return
        self._check(x, add, g, gx, gadd)
        last = (self.eps, int(self.relu), self.soft, int(self.given), *out, self.threads)
        _call(library().am_norm_back, len(x), x.size // len(x), x, add, g, self.weight, self.bias, self.mean, self.var, *last)

    def _check_pool(self, add: Floats | None, y: Floats, place: NDArray[np.uint8] | None) -> None:
        assert self.pool is not None
        if add is not None or not self.relu or self.pool.kh * self.pool.kw > 256:
            allowed = "norm, ReLU and a pool of at most 256 places"
            raise SettingError("a norm with a pool too large, no ReLU, or a sum", allowed=allowed, fix="leave the pool out")
        if place is None or place.dtype != np.uint8 or place.shape != y.shape or not place.flags.c_contiguous:
            raise SettingError("a norm with a pool, but no places", allowed="uint8, of the pool's shape", fix="give what `forward` got")

    def _check(self, x: Floats, *others: Floats | None) -> None:
        for array in others:
            _check("a map", array, x.shape)
        for name in ("weight", "bias", "mean", "var"):
            _check(f"the {name}", getattr(self, name), (len(x),))
