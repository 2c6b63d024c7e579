"""The kept inputs of neurons in blocks, their covariances, and what a gradient is multiplied by: the arithmetic of `preconditioning`."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymask.kernels import native
from anymask.surgery import CONVS

Each = Callable[[Callable[[Tensor], None], list[Tensor]], Iterable[None]]
_LEAST = 1e-12  # of a mean variance: inputs that are constant have none


class Blocks:
    """The kept weights of one layer as blocks (B, W) of one neuron each: of `width` W places, of which the last may be empty.

    Args:
        dense: shape of the dense weight (O, ...).
        flat: the kept places in it, (K,), in the order of `weight` where that is compact.
        weight: as it lies now.
        groups: of a convolution.
        block: the most that a block may hold.
        compact: whether `weight` is the vector of what is kept.
    """

    def __init__(self, dense: torch.Size, flat: Tensor, weight: Tensor, *, groups: int, block: int, compact: bool) -> None:
        self.lies = weight.shape, weight.device
        fan = dense[1:].numel()
        neuron, place = flat // fan, flat % fan
        counts = torch.bincount(neuron, minlength=dense[0])
        parts = (counts + block - 1) // block
        size = -(-counts // parts.clamp(min=1))  # of each of a neuron's blocks but the last
        order = torch.argsort(flat)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[neuron[order]]
        self.blocks, self.width = int(parts.sum()), int(size.max())  # both 0 where nothing is kept
        at = (parts.cumsum(0) - parts)[neuron] + rank // size[neuron]
        slots = at * self.width + rank % size[neuron]
        inputs = torch.full((self.blocks * self.width,), fan * groups)  # which input each slot has; the last, of zeros, where it is empty
        inputs[slots] = place + (neuron // (dense[0] // groups)) * fan
        device = weight.device
        self.inputs = inputs.view(self.blocks, self.width).to(device)
        self.sizes = torch.bincount(at, minlength=self.blocks).to(device)
        self.slots, self.flat = slots.to(device), None if compact else flat.to(device)
        self._native: native.Blocks | None = None
        if native.available() and device.type == "cpu" and weight.dtype == torch.float32:
            self._native = native.Blocks(self.sizes.numpy(), torch.argsort(slots).numpy())

    def pack(self, matrices: Tensor) -> Tensor:
        """`matrices` (B, W, W) as `multiply` takes them: for the native product without what is empty, which is often half of them."""
        if self._native is None:
            return matrices
        return F.pad(matrices[self._there()].float(), (0, 16))

    def _there(self) -> Tensor:
        """Which entries of (B, W, W) are not empty."""
        there = torch.arange(self.width, device=self.sizes.device) < self.sizes[:, None]
        return there[:, :, None] & there[:, None, :]

    def lower(self, covariances: Tensor) -> Tensor:
        """What is to be saved of symmetric (B, W, W): a quarter of it, often; `symmetric` undoes it."""
        return covariances[self._there().tril()]

    def symmetric(self, lower: Tensor) -> Tensor:
        """(B, W, W) of what `lower` gave."""
        whole = lower.new_zeros(self.blocks, self.width, self.width)
        whole[self._there().tril()] = lower
        return whole + whole.tril(-1).mT

    def covariances(self, rows: Tensor) -> Tensor:
        """(B, W, W) of the inputs of each block, for samples of all inputs (M, D)."""
        columns = F.pad((rows - rows.mean(0)).T, (0, 0, 0, 1))
        found = columns.new_empty(self.blocks, self.width, self.width)
        step = max(1, 2**21 // (self.width * len(rows)))  # 8 MB at a time
        for i in range(0, self.blocks, step):
            part = columns[self.inputs[i : i + step]]
            torch.bmm(part, part.mT, out=found[i : i + step])
        return found.div_(len(rows))

    def multiply(self, gradient: Tensor, matrices: Tensor, *, strength: float) -> None:
        """`gradient` towards its product with `matrices`, as `pack` gave them, scaled to the norm that it has; in place."""
        lies = gradient.reshape(-1)
        values = lies if self.flat is None else lies[self.flat]
        if self._native is not None:
            made = values.detach().to(torch.float32).contiguous()
            self._native.multiply(made.numpy(), matrices.numpy(), strength=strength, threads=torch.get_num_threads())
        else:
            made = self._product(values.to(matrices.dtype), matrices, strength)
        if self.flat is None:
            gradient.copy_(made.view(gradient.shape))
        else:
            gradient.copy_(lies.index_copy(0, self.flat, made.to(gradient.dtype)).view(gradient.shape))

    def _product(self, values: Tensor, matrices: Tensor, strength: float) -> Tensor:
        rows = values.new_zeros(self.blocks * self.width).index_copy_(0, self.slots, values)
        # From the left, which is the same for what is symmetric and takes a sixth of the time on a CPU.
        made = torch.bmm(rows.view(self.blocks, 1, self.width), matrices).view(-1).index_select(0, self.slots)
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


def inverse_root(covariances: Tensor, sizes: Tensor, *, power: float, damping: float, each: Each = map) -> Tensor:
    """(C / v + damping) ** -power of each matrix of `covariances` (B, W, W), v the mean of its diagonal's first `sizes` (B,) entries.

    What lies outside of the first `sizes` rows and columns is not to be used. `each` calls a function for parts of the matrices.

    Example:
        >>> inverse_root(torch.diag(torch.tensor([1.0, 3.0]))[None], torch.tensor([2]), power=1.0, damping=0.5)
        tensor([[[1.0000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    level = (covariances.diagonal(dim1=1, dim2=2).sum(1) / sizes).clamp(min=_LEAST)
    scaled, made = covariances / level[:, None, None], torch.zeros_like(covariances)
    wide = ((sizes + 3) // 4 * 4).clamp(max=covariances.shape[-1])  # eigh takes 20 microseconds for a matrix of 20, and 52 for one of 32

    def root(these: Tensor) -> None:
        width = int(wide[these[0]])
        # In float32 and without damping LAPACK gives NaN or fails for one in a hundred matrices that are mostly 0, as of dead inputs.
        part = scaled[these, :width, :width].double()
        values, vectors = torch.linalg.eigh(part + damping * torch.eye(width, dtype=part.dtype, device=part.device))
        made[these, :width, :width] = ((vectors * values.clamp(min=damping)[:, None] ** -power) @ vectors.mT).to(made.dtype)

    list(each(root, [part for width in wide.unique() for part in (wide == width).nonzero()[:, 0].split(64)]))
    return made


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
