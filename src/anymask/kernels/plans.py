"""The tables that turn a convolution over kept weights into gathers and a dot (core.h): which packed float each kept weight reads.

Everything a convolution can be (stride, padding, dilation, groups, 1x1 and larger) is here, as integers; the native code knows runs only.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymask.errors import SettingError

Ints = NDArray[np.int32]
Shape = tuple[int, int, int]  # channels, rows, columns
L2_FLOATS = 300_000  # of a packed copy. On cores with 1 MB of second cache 1.2 MB were faster than 0.5 MB (longer pieces), and 2 MB slower


@dataclass(frozen=True)
class Conv:
    """A convolution of kept weights, without its input.

    Args:
        weight_shape: (O, C / groups, KH, KW).
        kept: flat places of the kept weights in the dense weight, rising. Shape (K,).
        stride: of rows and columns; so are padding and dilation.
    """

    weight_shape: tuple[int, int, int, int]
    kept: NDArray[np.int64]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def channels(self) -> int:
        """Input channels."""
        return self.weight_shape[1] * self.groups

    def output_size(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of the output.

        Raises:
            SettingError: where the kernel is larger than the input with its padding.
        """
        sizes = zip((rows, cols), self.padding, self.dilation, self.weight_shape[2:], self.stride, strict=True)
        out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)
        if min(out) < 1:
            raise SettingError(
                f"an input of {rows} x {cols} came to a kernel of {self.weight_shape[2]} x {self.weight_shape[3]}",
                allowed="inputs that are, with their padding, at least as large as the dilated kernel",
                fix="give larger images",
            )
        return out[0], out[1]

    @property
    def places(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Of each kept weight: output channel, input channel (of all), row and column of the kernel."""
        outputs, per_group, kh, kw = self.weight_shape
        o, c, y, x = (a.astype(np.int32) for a in np.unravel_index(self.kept, (outputs, per_group, kh, kw)))
        return o, c + (o // (outputs // self.groups)) * np.int32(per_group), y, x


@dataclass(frozen=True)
class Job:
    """One gather or dot: the fields of `am_job`. `order` gives the place in `kept` of each entry of the tables."""

    src: Shape
    dst: Shape
    images: int
    lanes: int
    rows: int
    row_start: int
    row_step: int
    src_row_start: int
    src_row_step: int
    ring: int
    strips: int
    packed_cols: int
    run_ptr: Ints
    runs: Ints
    dst_map: Ints
    rowptr: Ints
    off: Ints
    order: Ints | None


def forward(conv: Conv, rows: int, cols: int, *, images: int, width: int, threads: int) -> Job:
    """The job of the forward pass and of the weight gradient, for an input (C, rows, cols, images) and vectors of `width` floats."""
    if images < width:
        return _flat(conv, rows, cols, images=images, threads=threads)
    o, c, ky, kx = conv.places
    outputs, _, kh, kw = conv.weight_shape
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    out_rows, out_cols = conv.output_size(rows, cols)
    channels = conv.channels
    # Columns are packed by their phase of the stride, so that a tap's columns lie side by side.
    phases = sorted({t * dw % sw for t in range(kw)})
    reach = dw * (kw - 1) // sw
    axis = _Axis(rows=out_rows, row_start=0, row_step=1, src_row_start=-ph, src_row_step=sh, span=dh * (kh - 1) + 1)
    tiles = _Tiles.choose(out_cols, reach, channels * axis.span * len(phases), images=images, width=width)
    col = np.concatenate([tiles.packed * sw + f - pw for f in phases], axis=1)
    start = np.searchsorted(phases, kx * dw % sw) * tiles.packed.shape[1] + kx * dw // sw
    src, dst = (channels, rows, cols), (outputs, out_rows, out_cols)
    entries = _Entries(o, c, ky * dh, start)
    return _job(src, dst, axis=axis, entries=entries, tiles=tiles, col=col, dst_map=tiles.cols, sizes=(images, threads))


def _flat(conv: Conv, rows: int, cols: int, *, images: int, threads: int) -> Job:
    """The same for few images: a run goes through the rows of the padded plane, and what it gives between them is not stored."""
    o, c, ky, kx = conv.places
    outputs, _, kh, kw = conv.weight_shape
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    out_rows, out_cols = conv.output_size(rows, cols)
    tall, wide = out_rows + dh * (kh - 1) // sh, out_cols + dw * (kw - 1) // sw  # of the plane of each phase of the stride
    fy, fx = (sorted({t * d % s for t in range(k)}) for k, d, s in ((kh, dh, sh), (kw, dw, sw)))
    y = np.concatenate([np.arange(tall) * sh + f - ph for f in fy])
    x = np.concatenate([np.arange(wide) * sw + f - pw for f in fx])
    inside = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < cols))[None, :]
    col = np.where(inside, y[:, None] * cols + x[None, :], -1)
    col = np.concatenate([part for band in np.split(col, len(fy)) for part in np.split(band, len(fx), axis=1)], axis=None)[None, :]
    plane = np.searchsorted(fy, ky * dh % sh) * len(fx) + np.searchsorted(fx, kx * dw % sw)
    start = (plane * tall + ky * dh // sh) * wide + kx * dw // sw
    to = np.full((out_rows, wide), -1)
    to[:, :out_cols] = np.arange(out_rows * out_cols).reshape(out_rows, out_cols)
    to = to.ravel()[: (out_rows - 1) * wide + out_cols][None, :]
    axis = _Axis(rows=1, row_start=0, row_step=1, src_row_start=0, src_row_step=1, span=1)
    src, dst = (conv.channels, 1, rows * cols), (outputs, 1, out_rows * out_cols)
    tiles = _Tiles(images, _ints(to), _ints(col))
    entries = _Entries(o, c, np.zeros_like(c), start)
    return _job(src, dst, axis=axis, entries=entries, tiles=tiles, col=col, dst_map=tiles.cols, sizes=(images, threads))


def backward(conv: Conv, rows: int, cols: int, *, images: int, width: int, threads: int) -> Iterator[Job]:
    """The jobs of the input gradient, one for each phase of the stride: together they write all of (C, rows, cols, images)."""
    o, c, ky, kx = conv.places
    outputs, channels = conv.weight_shape[0], conv.channels
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    out_rows, out_cols = conv.output_size(rows, cols)
    for fy, fx in product(range(min(sh, rows)), range(min(sw, cols))):
        y, x = fy + ph - ky * dh, fx + pw - kx * dw
        mine = np.flatnonzero((y % sh == 0) & (x % sw == 0))
        mine = mine[np.argsort(c[mine], kind="stable")]
        shift_y, shift_x = y[mine] // sh, x[mine] // sw
        low_y, low_x = (int(s.min()) if len(s) else 0 for s in (shift_y, shift_x))
        high_y, high_x = (int(s.max()) if len(s) else 0 for s in (shift_y, shift_x))
        n_rows, n_cols = (rows - fy + sh - 1) // sh, (cols - fx + sw - 1) // sw
        axis = _Axis(rows=n_rows, row_start=fy, row_step=sh, src_row_start=low_y, src_row_step=1, span=high_y - low_y + 1)
        tiles = _Tiles.choose(n_cols, high_x - low_x, outputs * axis.span, images=images, width=width)
        entries = _Entries(c[mine], o[mine], shift_y - low_y, shift_x - low_x, order=_ints(mine))
        dst_map = np.where(tiles.cols < 0, -1, tiles.cols * sw + fx)
        src, dst = (outputs, out_rows, out_cols), (channels, rows, cols)
        col = tiles.packed + low_x
        yield _job(src, dst, axis=axis, entries=entries, tiles=tiles, col=col, dst_map=dst_map, sizes=(images, threads))


@dataclass(frozen=True)
class _Axis:
    """The rows of a job."""

    rows: int
    row_start: int
    row_step: int
    src_row_start: int
    src_row_step: int
    span: int


@dataclass(frozen=True)
class _Tiles:
    """Column ranges: for each its destination columns (-1 beyond the end) and its packed ones, and how many images go together."""

    lanes: int
    cols: Ints
    packed: Ints

    @classmethod
    def choose(cls, cols: int, reach: int, rows: int, *, images: int, width: int) -> "_Tiles":
        """`rows` rows of `cols` + `reach` positions are packed at a time: long pieces of memory first, then what fits the cache."""
        if images < width:
            return cls._of(cols, reach, images, size=cols)
        lanes = width
        while lanes * 2 * rows * (min(cols, 8) + reach) <= L2_FLOATS and lanes < images:
            lanes *= 2
        return cls._of(cols, reach, lanes, size=max(1, min(cols, max(8, L2_FLOATS // (lanes * rows) - reach))))

    @classmethod
    def _of(cls, cols: int, reach: int, lanes: int, *, size: int) -> "_Tiles":
        size = -(-cols // -(-cols // size))  # even ranges rather than full ones and a rest
        start = np.arange(0, cols, size)[:, None]
        at = start + np.arange(size)
        return cls(lanes, np.where(at < cols, at, -1).astype(np.int32), start + np.arange(size + reach))


@dataclass(frozen=True)
class _Entries:
    """Of each kept weight: the channel that it gives to, the channel, row and first packed column that it reads."""

    target: NDArray[Any]
    channel: NDArray[Any]
    row: NDArray[Any]
    start: NDArray[Any]
    order: Ints | None = None


def _job(src: Shape, dst: Shape, *, axis: _Axis, entries: _Entries, tiles: _Tiles, col: Ints, dst_map: Ints, sizes: tuple[int, int]) -> Job:
    """`col` are the source columns of the packed ones, outside of the source where zeros stand."""
    images, threads = sizes
    run_ptr, runs = _runs(np.where((col >= 0) & (col < src[2]), col, -1))
    plane = col.shape[1] * tiles.lanes
    rotations = (entries.row[None, :] + np.arange(axis.span)[:, None]) % axis.span
    if src[0] * axis.span * plane >= 2**31 or dst[1] * dst[2] * images >= 2**31:
        raise SettingError(
            f"{images} images of {src[0]} x {src[1]} x {src[2]} came at once",
            allowed="less than 2^31 numbers in a tile, and in an output channel",
            fix="give fewer images at a time",
        )
    off = (entries.channel[None, :].astype(np.int64) * axis.span + rotations) * plane + entries.start * tiles.lanes
    tasks = -(-images // tiles.lanes) * len(col)
    rowptr = np.searchsorted(entries.target, np.arange(dst[0] + 1))
    strips = 1 if tasks >= 8 * threads else threads // math.gcd(tasks, threads)
    if strips > 1 and axis.span <= axis.src_row_step:
        # Many, so that nobody waits: none packs rows that another needs, too. Where they do, 8 strips took 6% of a resnet32's step.
        strips = 4 * threads
    return Job(
        src=src, dst=dst, images=images, lanes=tiles.lanes, rows=axis.rows, row_start=axis.row_start, row_step=axis.row_step,
        src_row_start=axis.src_row_start, src_row_step=axis.src_row_step, ring=axis.span, strips=min(axis.rows, strips),
        packed_cols=col.shape[1], run_ptr=run_ptr, runs=runs, dst_map=_ints(dst_map), rowptr=_ints(rowptr),
        off=_ints(off), order=entries.order,
    )  # fmt: skip


def _runs(col: Ints) -> tuple[Ints, Ints]:
    """Each row of `col` as runs (first, step, how many) of columns with equal steps, or of -1: (pointers (T + 1,), runs (R, 3))."""
    runs: list[tuple[int, int, int]] = []
    ends = [0]
    for row in col:
        at = 0
        while at < len(row):
            first = int(row[at])
            step = int(row[at + 1]) - first if at + 1 < len(row) and first >= 0 and row[at + 1] >= 0 else 1
            step = 0 if first < 0 else max(step, 1)
            alike = row[at:] == first + step * np.arange(len(row) - at)
            many = len(alike) if alike.all() else int(np.argmin(alike))
            runs.append((first, step, many))
            at += many
        ends.append(len(runs))
    return _ints(np.array(ends)), _ints(np.array(runs).reshape(-1, 3))


def _ints(values: NDArray[Any]) -> Ints:
    return np.ascontiguousarray(values, dtype=np.int32)
