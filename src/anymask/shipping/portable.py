"""Convolution over kept weights in NumPy and SciPy: for machines that have no native kernels, and to compare those with."""

from typing import Any

import numpy as np

from anymask.shipping.arithmetic import needed, padded, taps

Array = np.ndarray[Any, np.dtype[Any]]


class Gather:
    """A convolution of which only some weights are kept; the same face as `anymask.kernels.Gather`.

    Args:
        weight_shape: (O, C / groups, KH, KW) of the dense weight; a linear layer has KH = KW = 1.
        kept: int64 (kept,), ascending: positions in the flat dense weight.
        stride, padding, dilation: (rows, columns); padding is by zeros.
        groups: as in PyTorch.

    Example:
        >>> double = Gather(weight_shape=(1, 2, 1, 1), kept=np.array([1]))
        >>> double.forward(np.ones((2, 1, 1, 1), np.float32), np.array([2.0], np.float32)).ravel()
        array([2.], dtype=float32)
    """

    def __init__(
        self,
        *,
        weight_shape: tuple[int, int, int, int],
        kept: Array,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        self.weight_shape, self.stride, self.padding, self.dilation, self.groups = weight_shape, stride, padding, dilation, groups
        outputs, inner, _, wide = weight_shape
        row, channel, y, x = np.unravel_index(kept, weight_shape)
        columns = channel + row // (outputs // groups) * inner
        self._taps: list[tuple[tuple[int, int], Array, Array, Array]] = []  # place in the kernel; which values; columns and rows of CSR
        place = y * wide + x
        order = np.argsort(place, kind="stable")  # of each place ascending, and so row by row
        for chosen in np.split(order, np.flatnonzero(np.diff(place[order])) + 1) if len(kept) else ():
            at = int(y[chosen[0]]), int(x[chosen[0]])
            self._taps.append((at, chosen, columns[chosen], np.searchsorted(row[chosen], np.arange(outputs + 1))))

    def forward(
        self,
        x: Array,
        values: Array,
        *,
        bias: Array | None = None,
        add: Array | None = None,
        relu: bool = False,
        out: Array | None = None,
        threads: int = 1,
    ) -> Array:
        """(O, OH, OW, N) of `x` (C, H, W, N) with the `values` (kept,), float32; then plus `bias` (O,), plus `add`, then ReLU.

        `out` is written into where it is given; `threads` has no effect here.
        """
        from scipy.sparse import csr_array  # here: who has the native kernels does not need it

        kernel = self.weight_shape[2:]
        sides = zip(x.shape[1:3], self.padding, self.dilation, kernel, self.stride, strict=True)
        high, wide = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sides)
        total = np.zeros((self.weight_shape[0], high, wide, x.shape[3]), np.float32)
        x = padded(x, self.padding, needed(total, kernel, self.stride, self.dilation), 0.0)
        under, flat = taps(x, total, kernel=kernel, stride=self.stride, dilation=self.dilation), total.reshape(len(total), -1)
        for (i, j), chosen, columns, begins in self._taps:
            weight = csr_array((values[chosen], columns, begins), shape=(len(total), len(x)))
            flat += weight @ under[i * kernel[1] + j].reshape(len(x), -1)
        return _finish(total, bias=bias, add=add, relu=relu, out=out)


def _finish(total: Array, *, bias: Array | None, add: Array | None, relu: bool, out: Array | None) -> Array:
    if bias is not None:
        total += bias[:, None, None, None]
    if add is not None:
        total += add
    if relu:
        np.maximum(total, 0, out=total)
    if out is None:
        return total
    np.copyto(out, total)
    return out
