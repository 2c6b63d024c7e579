"""The kept inputs of neurons in blocks, their covariances, and what a gradient is multiplied by: the arithmetic of `preconditioning`."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymask.kernels import library, native
from anymask.surgery import CONVS

Each = Callable[[Callable[[Any], None], list[Any]], Iterable[None]]
_TOGETHER = 2**22  # numbers of matrices that are inverted at once: 32 MB, seven times
_LEAST = 1e-12  # of a mean variance: inputs that are constant have none


class Blocks:
    """The kept weights of one layer as blocks of one neuron each, those of a size next to each other.

    What each of them has a matrix in lies without gaps, block after block: (sum of n^2,), which is `flat` below.

    Args:
        dense: shape of the dense weight (O, ...).
        places: the kept places in it, (K,), in the order of `weight` where that is compact.
        weight: as it lies now.
        groups: of a convolution.
        block: the most that a block may hold.
        compact: whether `weight` is the vector of what is kept.
    """

    def __init__(self, dense: torch.Size, places: Tensor, weight: Tensor, *, groups: int, block: int, compact: bool) -> None:
        self.lies = weight.shape, weight.device
        fan = dense[1:].numel()
        neuron, place = places // fan, places % fan
        counts = torch.bincount(neuron, minlength=dense[0])
        parts = (counts + block - 1) // block
        size = -(-counts // parts.clamp(min=1))  # of each of a neuron's blocks but the last
        by_place = torch.argsort(places)
        rank = torch.empty_like(by_place)
        rank[by_place] = torch.arange(len(places)) - (counts.cumsum(0) - counts)[neuron[by_place]]
        at = (parts.cumsum(0) - parts)[neuron] + rank // size[neuron]
        sizes = torch.bincount(at, minlength=int(parts.sum()))
        order = torch.argsort((sizes[at] * len(sizes) + at) * size.max() + rank % size[neuron])  # of sizes, blocks and places
        device = weight.device
        self.sizes, self.order = sizes.sort().values, order.to(device)
        self.inputs = (place + (neuron // (dense[0] // groups)) * fan)[order].to(device)  # of the values in this order
        self.blocks, self.width, self._length = len(sizes), int(size.max()), int((sizes**2).sum())
        self._flat = None if compact else places.to(device)
        first = self.sizes.cumsum(0) - self.sizes
        places_of = torch.arange(len(order)) + (torch.arange(self.blocks) * self.width - first).repeat_interleave(self.sizes)
        self._slots = torch.empty_like(order).index_copy_(0, order, places_of).to(device)  # in the rows that `_product` makes; known before
        self._native: native.Blocks | None = None
        if library.available() and device.type == "cpu" and weight.dtype == torch.float32:
            self._native = native.Blocks(self.sizes.numpy(), order.numpy())

    def covariances(self, rows: Tensor) -> Tensor:
        """Flat, of the inputs of each block, for samples of all inputs (M, D)."""
        columns = (rows - rows.mean(0)).T.contiguous()
        flat, first = columns.new_empty(self._length), 0
        for made in self._by_size(flat, most=2**21 // len(rows)):  # 8 MB at a time
            count, n, _ = made.shape
            part = columns.index_select(0, self.inputs[first : first + count * n]).view(count, n, -1)
            torch.bmm(part, part.mT, out=made)
            first += count * n
        return flat.div_(len(rows))

    def roots(self, flat: Tensor, *, power: float, damping: float, each: Each = map) -> Tensor:
        """The `inverse_root` of each matrix, as `multiply` takes them; `each` calls a function for parts of them."""
        made = F.pad(torch.empty_like(flat), (0, 16))

        def root(part: tuple[Tensor, Tensor]) -> None:
            part[1].copy_(inverse_root(part[0], power=power, damping=damping))

        list(each(root, list(zip(self._by_size(flat, most=2048), self._by_size(made, most=2048), strict=True))))
        return made.float() if self._native is not None else self._padded(made)

    def square_roots(self, flat: Tensor, *, damping: float) -> Tensor:
        """`roots` of power 0.5 by products alone, of all blocks at once: for a GPU, which is slow with eigenvalues of small matrices."""
        whole = self._padded(flat)
        whole = whole.tril() + whole.tril(-1).mT  # as a checkpoint has them: products are symmetric but for rounding
        level = (whole.diagonal(dim1=1, dim2=2).sum(1) / self.sizes.to(flat.device)).clamp(min=_LEAST)[:, None, None]
        many = max(1, _TOGETHER // self.width**2)
        for part, its in zip(whole.split(many), level.split(many), strict=True):
            part.copy_(inverse_square_root((part / its).double(), damping=damping))
        return whole

    def lower(self, flat: Tensor) -> Tensor:
        """What is to be saved of symmetric matrices: half of them; `symmetric` undoes it."""
        return torch.cat([m[:, i, j].view(-1) for m in self._by_size(flat) for i, j in [torch.tril_indices(*m.shape[1:])]])

    def symmetric(self, lower: Tensor) -> Tensor:
        """Flat, of what `lower` gave."""
        flat, first = lower.new_empty(self._length), 0
        for made in self._by_size(flat):
            count, n, _ = made.shape
            i, j = torch.tril_indices(n, n)
            made[:, i, j] = made[:, j, i] = lower[first : first + count * len(i)].view(count, -1)
            first += count * len(i)
        return flat

    def multiply(self, gradient: Tensor, matrices: Tensor, *, strength: float) -> None:
        """`gradient` towards its product with `matrices`, as `roots` gave them, scaled to the norm that it has; in place."""
        lies = gradient.reshape(-1)
        values = lies if self._flat is None else lies[self._flat]
        if self._native is not None:
            made = values.detach().to(torch.float32).contiguous()
            self._native.multiply(made.numpy(), matrices.numpy(), strength=strength, threads=torch.get_num_threads())
        else:
            made = self._product(values.to(matrices.dtype), matrices, strength)
        if self._flat is None:
            if made.data_ptr() != gradient.data_ptr():
                gradient.copy_(made.view(gradient.shape))
        else:
            gradient.copy_(lies.index_copy(0, self._flat, made.to(gradient.dtype)).view(gradient.shape))

    def _by_size(self, flat: Tensor, *, most: int | None = None) -> Iterator[Tensor]:
        """Matrices (B, n, n) in `flat`, of which each has about `most` rows at most."""
        first = 0
        for n, count in zip(*(t.tolist() for t in self.sizes.unique_consecutive(return_counts=True)), strict=True):
            step = count if most is None else max(1, most // n)
            for b in range(0, count, step):
                some = min(step, count - b)
                yield flat[first : first + some * n * n].view(some, n, n)
                first += some * n * n

    def _padded(self, flat: Tensor) -> Tensor:
        """(B, W, W) with W the largest size: one product for all is faster than one for each size, where kernels are launched."""
        made, first = flat.new_zeros(self.blocks, self.width, self.width), 0
        for part in self._by_size(flat):
            made[first : first + len(part), : part.shape[1], : part.shape[1]] = part
            first += len(part)
        return made

    def _product(self, values: Tensor, matrices: Tensor, strength: float) -> Tensor:
        rows = values.new_zeros(self.blocks * self.width).index_copy_(0, self._slots, values)
        # From the left, which is the same for what is symmetric and takes a sixth of the time on a CPU.
        made = torch.bmm(rows.view(self.blocks, 1, self.width), matrices).view(-1).index_select(0, self._slots)
        made *= strength * values.norm() / made.norm().clamp(min=torch.finfo(made.dtype).tiny)
        if strength < 1:
            made += (1 - strength) * values
        return made


def inputs_of(layer: Any, x: Tensor, *, samples: int, draws: torch.Generator) -> Tensor:
    """What `samples` drawn outputs of `layer` see of `x`: (samples, D), D = all inputs of a linear layer; those of a convolution's kernel,
    one group after the other.

    Example:
        >>> x = torch.arange(4.0).view(1, 1, 4)
        >>> seen = inputs_of(torch.nn.Conv1d(1, 1, 3, padding=1), x, samples=50, draws=torch.Generator().manual_seed(0))
        >>> sorted({tuple(row) for row in seen.tolist()})
        [(0.0, 0.0, 1.0), (0.0, 1.0, 2.0), (1.0, 2.0, 3.0), (2.0, 3.0, 0.0)]
    """
    if not isinstance(layer, CONVS):
        rows = x.reshape(-1, x.shape[-1])
        return rows[torch.randint(len(rows), (samples,), generator=draws).to(x.device)]
    dims = len(layer.kernel_size)
    x = x if x.ndim == dims + 2 else x[None]
    margins = layer._reversed_padding_repeated_twice
    if any(margins):
        x = F.pad(x, margins, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    index = [torch.randint(len(x), (samples,), generator=draws).view(-1, *[1] * dims)]
    for d in range(dims):
        kernel, dilation, stride = layer.kernel_size[d], layer.dilation[d], layer.stride[d]
        starts = torch.randint((x.shape[2 + d] - dilation * (kernel - 1) - 1) // stride + 1, (samples,), generator=draws) * stride
        offsets = torch.arange(kernel).view(*[-1 if e == d else 1 for e in range(dims)]) * dilation
        index.append(starts.view(-1, *[1] * dims) + offsets)
    seen = x.movedim(1, -1)[tuple(i.to(x.device) for i in index)]  # (samples, *kernel, channels)
    return seen.movedim(-1, 1).reshape(samples, -1)


def inverse_root(covariances: Tensor, *, power: float, damping: float) -> Tensor:
    """(C / v + damping) ** -power of each matrix of `covariances` (B, n, n), v the mean of its diagonal.

    Example:
        >>> inverse_root(torch.diag(torch.tensor([1.0, 3.0]))[None], power=1.0, damping=0.5)
        tensor([[[1.0000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    level = covariances.diagonal(dim1=1, dim2=2).mean(1).clamp(min=_LEAST)[:, None, None]
    # In float32 and without damping LAPACK gives NaN or fails for one in a hundred matrices that are mostly 0, as of dead inputs.
    scaled = (covariances / level).double()
    values, vectors = torch.linalg.eigh(scaled + damping * torch.eye(scaled.shape[1], dtype=scaled.dtype, device=scaled.device))
    return ((vectors * values.clamp(min=damping)[:, None] ** -power) @ vectors.mT).to(covariances.dtype)


def inverse_square_root(matrices: Tensor, *, damping: float) -> Tensor:
    """(A + damping) ** -0.5 of each positive matrix A of `matrices` (B, n, n) with a trace of n at most.

    By the coupled Newton-Schulz iteration (Higham, Functions of Matrices, 2008), which waits for nothing: how often is known before.

    Example:
        >>> inverse_square_root(torch.diag(torch.tensor([0.5, 1.5], dtype=torch.float64))[None], damping=2.5).round(decimals=6)
        tensor([[[0.5774, 0.0000],
                 [0.0000, 0.5000]]], dtype=torch.float64)
    """
    n = matrices.shape[1]
    eye = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
    damped = matrices + damping * eye
    largest = damped.abs().sum(2).amax(1)[:, None, None]  # n^1.5 + damping at most
    y, z = damped / largest, eye.expand_as(damped)
    for _ in range(math.ceil(math.log((n**1.5 + damping) / damping, 2.25)) + 6):  # the smallest eigenvalue grows by 2.25, then squares
        step = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ step, step @ z
    return z / largest.sqrt()


_ONE_THREAD = Lock()


@contextmanager
def threads_of_one() -> Iterator[Each]:
    """`map` on as many threads as PyTorch's, which has one in each: eigh of a small matrix takes up to 9 times as long on several."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield map
        return
    with _ONE_THREAD, ThreadPoolExecutor(threads) as pool:
        torch.set_num_threads(1)  # which new threads take over
        try:
            yield pool.map
        finally:
            torch.set_num_threads(threads)
