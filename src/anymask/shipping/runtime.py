"""What runs a shipped network: NumPy in and out, with neither torch nor any code of training."""

import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from anymask.errors import SettingError
from anymask.shipping import file
from anymask.shipping.arithmetic import CHANNELWISE, INPLACE, RUN
from anymask.shipping.ops import Conv, Layer, MaxPool, Reshape, Shape, Slice, Step
from anymask.shipping.plan import Array, Arrays, Plan, weights

_BYTES = 1 << 30  # of activations at once; larger batches go through in parts
_LINE = 64  # bytes of a cache line, where each buffer begins
_PARTED = 1 << 17  # numbers of an activation that are worth several threads
_FEW = 8  # images: for fewer one thread is tried, too
_SIZES = 8  # batch sizes for which all is kept ready
_VIEWS = (Reshape, Slice)  # what they make lies where their input does, and nothing is called


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> "Program":
    """The network in a file of `anymask.ship`, ready to be called.

    Args:
        path: a file `.anymask`.
        threads: how many threads it uses; None for as many as this process has processors, or one for a few images where that is
            measured to be faster, once for each such number: cores that share no cache take as long to exchange a small map as to
            compute it. After a fork (multiprocessing's "fork", a preforking server) the child always uses one: OpenMP's are gone there.

    Raises:
        MissingFile, IsFolder: when there is no such file; a FileNotFoundError and an IsADirectoryError, too.
        FileFormatError: when it is damaged or another kind of file.

    Example:
        >>> import tempfile, anymask, numpy, torch
        >>> path = tempfile.mkdtemp() + "/linear.anymask"
        >>> _ = anymask.ship(torch.nn.Linear(2, 1), None, example=torch.ones(1, 2), to=path)
        >>> load(path)(numpy.ones((3, 2), numpy.float32)).shape
        (3, 1)
    """
    return Program(file.read(path), threads=threads)


class _Bound(NamedTuple):
    """What a batch size needs: where images (N, ...) go, where outputs (N, ...) are, and what is called in between."""

    input: Array
    output: Array
    calls: "list[Call]"


class Program:
    """A network that takes batches (N, C, H, W) or (N, D), float32, of any N; see `load`.

    Calls from several threads wait for each other: the buffers are kept from one call to the next. A copy, in another process too, has its
    own.
    """

    def __init__(self, plan: Plan, *, threads: int | None = None) -> None:
        self.plan = plan
        self.threads = _checked(threads)
        self._free = threads is None
        self._chosen: dict[int, int] = {}  # for a few images: the number of threads that was faster
        self._shapes = plan.shapes()
        self._binds = [
            None if isinstance(step.op, _VIEWS) else _bind_of(step, arrays) for step, arrays in zip(plan.steps, plan.arrays, strict=True)
        ]
        self._places, self._sizes = _places(plan, self._shapes)
        self._buffers: list[Array] = [np.empty(0, np.float32)] * len(self._sizes)
        self._bound: dict[tuple[int, int | None], _Bound] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        p = self.plan
        sparsity = 1 - p.kept / p.total if p.total else 0.0
        return f"Program({self.input} -> {self.output}, {p.kept:,} of {p.total:,} weights, sparsity {sparsity:.4f}, {p.values})"

    def __reduce__(self) -> Any:  # neither a lock nor addresses can be copied
        return partial(Program, threads=None if self._free else self.threads), (self.plan,)

    @property
    def input(self) -> Shape:
        """Shape of one sample of the input, (C, H, W) or (D,)."""
        return self._shapes[0]

    @property
    def output(self) -> Shape:
        """Shape of one sample of the output."""
        return self._shapes[-1]

    def __call__(self, batch: Any, *, threads: int | None = None) -> Array:
        """The output for `batch`, float32 (N, ...), in a new array.

        Args:
            batch: (N, C, H, W) or (N, D), as the network was shipped for; taken as float32.
            threads: other than those of `load`, for this call.

        Raises:
            SettingError: for a batch of another shape, or of something else than numbers.
        """
        batch = _numbers(batch)
        if batch.shape[1:] != self.input or batch.ndim < 2:
            raise SettingError(
                f"a batch of shape {batch.shape}", allowed=f"(N, {', '.join(map(str, self.input))})", fix="give images of that size"
            )
        number = _checked(threads) if threads is not None else None if self._free else self.threads
        out = np.empty((len(batch), *self.output), np.float32)
        part = max(1, _BYTES // (4 * sum(self._sizes)))
        with self._lock:
            for begin in range(0, len(batch), part):
                out[begin : begin + part] = self._run(batch[begin : begin + part], threads=number)
        return out

    def _run(self, batch: Array, *, threads: int | None) -> Array:
        """(N, ...): a view of a buffer that the next call writes into."""
        threads = 1 if _Team.lost else threads
        bound = self._bound.get((len(batch), threads)) or self._bind(len(batch), threads)
        np.copyto(bound.input, batch)
        for call in bound.calls:
            call()
        return bound.output

    def _bind(self, images: int, threads: int | None) -> "_Bound":
        """What a batch of that size needs, kept for the next one; with the faster number of threads where they are None."""
        if threads is None and images < _FEW and self.threads > 1 and images not in self._chosen:
            tried = (self.threads, 1)
            self._chosen[images] = tried[_fastest([self._calls(images, number) for number in tried])]
        bound = self._calls(images, threads or self._chosen.get(images, self.threads))
        if len(self._bound) >= _SIZES:
            self._bound.pop(next(iter(self._bound)))
        self._bound[images, threads] = bound
        return bound

    def _calls(self, images: int, threads: int) -> "_Bound":
        """All calls for a batch of that size, on arrays in the buffers, which grow as needed."""
        for place, size in enumerate(self._sizes):
            if len(self._buffers[place]) < size * images:
                self._buffers[place] = _aligned(size * images)
                self._bound.clear()  # whose arrays lie in the smaller one
        values, calls = [self._array(0, images)], list[Call]()
        for number, (step, bind) in enumerate(zip(self.plan.steps, self._binds, strict=True), 1):
            given = [values[value] for value in step.inputs]
            if bind is None:
                values.append(_view(step, given[0], self._shapes[number]))
            else:
                values.append(self._array(number, images))
                calls.append(bind(given, values[number], threads))
        return _Bound(np.moveaxis(values[0], -1, 0), np.moveaxis(values[-1], -1, 0), calls)

    def _array(self, value: int, images: int) -> Array:
        """The array of a value, (*shape, N), in its buffer."""
        shape = (*self._shapes[value], images)
        return self._buffers[self._places[value]][: math.prod(shape)].reshape(shape)


def _fastest(ready: "list[_Bound]") -> int:
    """Which of them takes least; each is run five times."""
    seconds = [math.inf] * len(ready)
    for _ in range(5):
        for number, bound in enumerate(ready):
            bound.input.fill(0)  # its buffer holds later values by now, which would grow from round to round until they overflow
            began = time.perf_counter()
            for call in bound.calls:
                call()
            seconds[number] = min(seconds[number], time.perf_counter() - began)
    return seconds.index(min(seconds))


def _numbers(batch: Any) -> Array:
    """`batch` as float32."""
    try:
        given = np.asarray(batch)
        if given.dtype.kind == "c":
            raise TypeError(f"{given.dtype}, whose imaginary parts would be lost")
        return np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # the last of tensors that take gradients
        why = " ".join(str(error).split())[:150]
        raise SettingError(
            f"a batch that cannot be taken as numbers ({why})",
            allowed="an array of real numbers",
            fix="give float32, tensors by .detach().numpy()",
        ) from error


def _checked(threads: int | None) -> int:
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(threads, (int, np.integer)) or threads < 1:
        raise SettingError(f"threads came as {threads!r}", allowed="a whole number from 1", fix="leave it out for all processors")
    return int(threads)


def _aligned(numbers: int) -> Array:
    raw = np.empty(4 * numbers + _LINE, np.uint8)
    skip = -raw.ctypes.data % _LINE
    return raw[skip : skip + 4 * numbers].view(np.float32)


def _view(step: Step, given: Array, shape: Shape) -> Array:
    if isinstance(step.op, Slice):
        return given[step.op.start : step.op.stop]
    return given.reshape(*shape, given.shape[-1])


# -- each step, with its weights ready -----------------------------------------------------------------------------
Call = Callable[[], object]
Bind = Callable[[list[Array], Array, int], Call]  # (inputs, out, threads) -> what computes out, as often as it is called


def _bind_of(step: Step, arrays: Arrays) -> Bind:
    op, own = step.op, dict(arrays)
    if isinstance(op, Layer):
        return _layer(op, own)
    function: Any = RUN[type(op)]
    native = _native()

    def bind(given: list[Array], out: Array, threads: int) -> Call:
        if native is not None and isinstance(op, MaxPool) and op.dilation == (1, 1):
            x = given[0]
            sizes = (x.shape[3], *x.shape[:3], *out.shape[1:3], *op.kernel, *op.stride, *op.padding)
            return native.Pool(*sizes, 0).bind(x, out, threads=threads)
        apart = isinstance(op, CHANNELWISE) and {len(out)} == {len(array) for array in given}
        if threads == 1 or out.size < _PARTED or not apart:
            return partial(function, op, given, own, out)
        threads = min(threads, len(out))
        ends = [len(out) * i // threads for i in range(threads + 1)]
        parts = [slice(begin, end) for begin, end in pairwise(ends)]
        cut = [([array[part] for array in given], {name: array[part] for name, array in own.items()}, out[part]) for part in parts]
        return lambda: list(_pool(threads).map(lambda part: function(op, *part), cut))

    return bind


class _Team:
    """Threads do not survive a fork (a preforking server, multiprocessing): the child would wait for OpenMP's for ever.

    Whoever made them in the parent: PyTorch, the kernels and other packages share them, so that one cannot tell whether there were some.
    """

    lost = False

    @classmethod
    def forked(cls) -> None:
        cls.lost = True
        _pool.cache_clear()  # of threads that the child does not have


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Team.forked)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for what NumPy computes; it lets others run meanwhile."""
    return ThreadPoolExecutor(threads, thread_name_prefix="anymask")


def _layer(op: Layer, own: dict[str, Array]) -> Bind:
    values = np.ascontiguousarray(weights(op, own))
    bias = own["bias"].astype(np.float32) if op.bias else None
    how = {name: getattr(op, name) for name in ("stride", "padding", "dilation", "groups")} if isinstance(op, Conv) else {}
    gather = gather_class()(weight_shape=op.weight_shape, kept=own["positions"], **how)
    start: Any = getattr(gather, "bind", None) or partial(partial, gather.forward)  # bind takes the arrays' addresses once

    def bind(given: list[Array], out: Array, threads: int) -> Call:
        x, *rest = map(_map, given)
        call: Call = start(x, values, bias=bias, add=rest[0] if op.add else None, relu=op.relu, out=_map(out), threads=threads)
        return call

    return bind


def _map(array: Array) -> Array:
    """(C, H, W, N), for vectors (D, N) as (D, 1, 1, N)."""
    return array if array.ndim == 4 else array.reshape(len(array), 1, 1, -1)


def gather_class() -> Any:
    """The native convolution over kept weights where this machine has it, else the one in NumPy and SciPy."""
    native = _native()
    if native is not None:
        return native.Gather
    from anymask.shipping.portable import Gather

    return Gather


def _native() -> Any:
    """The native kernels where this machine has them, else None."""
    try:
        from anymask import kernels
    except ImportError:
        return None
    return kernels if kernels.available() else None


# -- where values lie ----------------------------------------------------------------------------------------------
def _places(plan: Plan, shapes: list[Shape]) -> tuple[list[int], list[int]]:
    """The buffer of each value, and the size of each buffer in numbers per sample: buffers are used again when nobody reads them."""
    roots, last = _lives(plan)
    places, sizes, free = [0], [math.prod(shapes[0])], list[int]()
    for number, step in enumerate(plan.steps, 1):
        needed = math.prod(shapes[number])
        if roots[number] != number:
            places.append(places[roots[number]])
        elif _over_its_input(step, number, roots=roots, last=last, shapes=shapes):
            places.append(places[step.inputs[0]])
            last[roots[step.inputs[0]]] = -1  # its buffer goes on with this value
        else:
            best = min(free, key=lambda buffer: (sizes[buffer] < needed, abs(sizes[buffer] - needed)), default=None)
            if best is None:
                best = len(sizes)
                sizes.append(0)
            else:
                free.remove(best)
            sizes[best] = max(sizes[best], needed)
            places.append(best)
        ended = sorted({roots[value] for value in (*step.inputs, number)})
        free += [places[root] for root in ended if last[root] == number]
    return places, sizes


def _lives(plan: Plan) -> tuple[list[int], list[int]]:
    """For each value the one whose memory it is a view of, and the step after which nobody reads that memory."""
    roots, last = [0], [0] * (len(plan.steps) + 1)
    for number, step in enumerate(plan.steps, 1):
        roots.append(roots[step.inputs[0]] if isinstance(step.op, _VIEWS) else number)
        for value in (*step.inputs, number):
            last[roots[value]] = number
    last[roots[-1]] = len(plan.steps) + 1
    return roots, last


def _over_its_input(step: Step, number: int, *, roots: list[int], last: list[int], shapes: list[Shape]) -> bool:
    """Whether what `step` makes can lie where its first input does: the input is whole, and read by nobody after."""
    first = step.inputs[0]
    whole = math.prod(shapes[roots[first]]) == math.prod(shapes[number])
    alone = all(roots[other] != roots[first] for other in step.inputs[1:])
    return isinstance(step.op, INPLACE) and shapes[first] == shapes[number] and last[roots[first]] == number and whole and alone
