"""Sparse convolutions and what else works on kept weights, NumPy in and out."""

from collections.abc import Callable
from ctypes import byref
from functools import cached_property, partial
from secrets import randbits
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from anymask.errors import SettingError
from anymask.kernels.library import AmJob, call, held_call, library, struct
from anymask.kernels.plans import Conv, Job, backward, forward

Floats = NDArray[np.float32]
Address = int | None  # of nothing where it is None


_WORTH_A_THREAD = 300_000  # multiply-adds: fewer are done before a second thread is awake
_GATHERS: "WeakValueDictionary[int, Gather]" = WeakValueDictionary()


def gather_of(handle: int) -> "Gather":
    """The `Gather` that has this handle, for as long as somebody keeps it: operators take numbers, not objects.

    Raises:
        SettingError: when nobody does, or it is of another process.
    """
    try:
        return _GATHERS[handle]
    except KeyError:
        raise SettingError(
            f"a graph asks for the sparse layer {handle}, which is not in this process",
            allowed="graphs (torch.export, torch.jit.trace) of sparse layers while their model is there: they hold no tables",
            fix="export after anymask.to_dense, or write the network with anymask.ship",
        ) from None


class Gather:
    """A convolution over kept weights: forward here, the gradients of its input and kept weights in what `at` gives.

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
        self._sizes: dict[tuple[int, ...], Sized] = {}
        self.handle = randbits(62)  # and no counter: a graph from another process must not find a layer that is not its own
        _GATHERS[self.handle] = self

    def at(self, rows: int, cols: int, *, images: int, threads: int) -> "Sized":
        """This, for inputs (C, rows, cols, images)."""
        key = (rows, cols, images, threads, library().am_width())
        sized = self._sizes.get(key)
        if sized is None:
            if len(self._sizes) > 7:  # sizes vary without end in some trainings; the tables are as large as the weights
                self._sizes.pop(next(iter(self._sizes)))
            sized = self._sizes[key] = Sized(self.conv, *key)
        return sized

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
        check("bias", bias, output[:1])
        check("add", add, output)
        if not out.size:
            return lambda: None
        sized = self._at(x, threads)
        x_at, values_at, bias_at, add_at, out_at = (address(array) for array in (x, values, bias, add, out))
        return partial(held_call, (sized, x, values, bias, add, out), *sized.call(x_at, values_at, bias_at, add_at, relu, out_at))

    def _at(self, x: Floats, threads: int) -> "Sized":
        return self.at(*x.shape[1:3], images=x.shape[3], threads=threads)

    def _checked(self, x: Floats, y: Floats, values: Floats | None) -> tuple[int, ...]:
        """The shape of the output y; the native code would follow a wrong pointer anywhere."""
        check("the input", x, (self.conv.channels, *x.shape[1:4], *(0,) * (4 - x.ndim)))
        output = self.output_shape(x.shape[1], x.shape[2], images=x.shape[3])
        check("the output", y, output)
        check("the weight", values, (len(self.conv.kept),))
        return output


class Sized:
    """A `Gather` for inputs of one size. It takes the addresses of contiguous float32 arrays, and checks nothing.

    Args:
        conv: the convolution.
        rows: of inputs (C, rows, cols, images).
        width: floats of a vector.
    """

    def __init__(self, conv: Conv, rows: int, cols: int, images: int, threads: int, width: int) -> None:  # noqa: PLR0917
        self._size = (conv, rows, cols)
        self._how: dict[str, Any] = {"images": images, "width": width, "threads": threads}
        self.input = (conv.channels, rows, cols, images)
        self.output = (conv.weight_shape[0], *conv.output_size(rows, cols), images)
        self.kept = len(conv.kept)
        self._threads = threads
        positions = self.output[1] * self.output[2] * images
        self._threads_forward = 1 if self.kept * positions < _WORTH_A_THREAD else threads
        self._apart = rows * cols == 1 or images < width  # then the two jobs are cut otherwise, and faster alone
        self._empty = images == 0

    def forward(self, x: Address, values: Address, bias: Address, add: Address, relu: bool, out: Address) -> None:  # noqa: PLR0917
        """As `Gather.forward`."""
        if not self._empty:
            call(*self.call(x, values, bias, add, relu, out))

    def call(self, x: Address, values: Address, bias: Address, add: Address, relu: bool, out: Address) -> tuple[Any, ...]:  # noqa: PLR0917
        """The native function that `forward` calls, and what with."""
        return library().am_gather, self._ahead[2], x, values, bias, add, relu, out, self._threads_forward

    def input_gradient(self, g: Address, values: Address, add: Address, out: Address) -> None:
        """Plus `add`, into `out` (which may be `add`), both (C, H, W, N), for the gradient g (O, OH, OW, N) of the output."""
        for _, _, job in self._back:
            call(library().am_gather, job, g, values, None, add, 0, out, self._threads)

    def weight_gradient(self, x: Address, g: Address, out: Address) -> None:
        """Of the kept weights alone, into `out` (K,), which must be 0."""
        if not self._empty:
            call(library().am_dot, self._ahead[2], x, g, out, self._threads)

    def gradients(self, x: Address, g: Address, values: Address, add: Address, out: Address, of_values: Address) -> None:  # noqa: PLR0917
        """Both at once, as these two give them; `of_values` must be 0."""
        if self._apart:
            self.input_gradient(g, values, add, out)
            self.weight_gradient(x, g, of_values)
            return
        for _, _, job in self._back:
            call(library().am_both, job, g, values, x, add, out, of_values, self._threads)

    @cached_property
    def _ahead(self) -> tuple[Job, AmJob, Any]:
        return _ready(forward(*self._size, **self._how))

    @cached_property
    def _back(self) -> list[tuple[Job, AmJob, Any]]:
        return [] if self._empty else [_ready(job) for job in backward(*self._size, **self._how)]


def _ready(job: Job) -> tuple[Job, AmJob, Any]:
    made = struct(job)
    return job, made, byref(made)


def soften(x: Floats, out: Floats, *, strength: float, g: Floats | None = None, threads: int = 1) -> None:
    """`s x sigmoid(x) + (1 - s) max(x, 0)` into out, of any shape; with g, the gradient of x for the gradient g of that.

    Example:
        >>> x, out = np.array([-1.0, 1.0], np.float32), np.empty(2, np.float32)
        >>> soften(x, out, strength=1.0); [round(float(value), 4) for value in out]
        [-0.2689, 0.7311]
    """
    for name, array in (("the output", out), ("the gradient", g)):
        check(name, array, x.shape)
    check("the input", x, x.shape)
    call(library().am_softening, x.size, address(x), address(g), strength, address(out), threads)


def transpose(rows: int, cols: int, x: Address, out: Address, *, threads: int) -> None:
    """The matrix at x into out, of (cols, rows)."""
    call(library().am_transpose, rows, cols, x, out, threads)


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
        check("the values", values, (len(self._order),))
        check("the matrices", matrices, (int(self._from[-1]) + 16,))
        threads = threads if matrices.size > _WORTH_A_THREAD // 10 else 1  # they come from memory
        where = [address(table) for table in (self._first, self._order, self._from)]
        call(library().am_block_products, len(self._first) - 1, *where, address(matrices), strength, address(values), threads)


def check(what: str, array: Floats | None, shape: tuple[int, ...]) -> None:
    """Refuse what the native code would read or write wrongly."""
    if array is not None and (array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous):
        raise wrong(what, f"{array.dtype} {array.shape}", shape)


def wrong(what: str, came: str, shape: tuple[int, ...]) -> SettingError:
    """The error for an array of another kind."""
    return SettingError(
        f"{what} of a sparse operator came as {came}",
        allowed=f"float32 {shape}, contiguous{'; maps are (C, H, W, N)' if len(shape) == 4 else ''}",
        fix="give the shape that the layer was made for; sparse layers compute in float32 (model.float(), or anymask.to_dense)",
    )


def address(array: NDArray[Any] | None) -> Address:
    """Where it lies in memory."""
    return None if array is None else array.ctypes.data
