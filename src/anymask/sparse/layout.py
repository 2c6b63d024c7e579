"""Tensors as the kernels have them: (N, C, H, W) to whoever looks, and batch-last in memory, (C, H, W, N), contiguous.

Elementwise operators of PyTorch keep that layout.
"""

from typing import Any

import torch
from torch import Tensor

from anymask.sparse import memory


def batch_last(x: Tensor) -> Tensor:
    """`x` (N, C, H, W) as the contiguous tensor (C, H, W, N); copied only where memory is laid out otherwise.

    Example:
        >>> batch_last(torch.ones(2, 3, 4, 5)).shape
        torch.Size([3, 4, 5, 2])
    """
    if x.is_contiguous():  # a transposed matrix is copied in blocks, in less than half the time for images
        return x.flatten(1).t().contiguous().view(*x.shape[1:], len(x))
    return x.permute(1, 2, 3, 0).contiguous()


def is_batch_last(x: Tensor) -> bool:
    """Whether `x` lies in memory as the kernels have it: (C, H, W, N), float32, on the CPU."""
    if x.ndim != 4 or x.dtype is not torch.float32 or not x.is_cpu:
        return False
    n, c, h, w = x.shape
    return n * c * h * w > 0 and (x.stride() == (1, h * w * n, w * n, n) or x.permute(1, 2, 3, 0).is_contiguous())


def array(x: Tensor | None) -> Any:
    """`x` as a NumPy array of the same memory."""
    return None if x is None else x.detach().numpy()


def empty(like: Tensor, shape: Any, *, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor (N, C, H, W) that lies batch-last; of its own and no view, so that it may be written in place."""
    n, c, h, w = shape
    memory.follow()
    return like.new_empty_strided((n, c, h, w), (1, h * w * n, w * n, n), dtype=dtype)


def into(out: Tensor) -> Any:
    """The memory of what `empty` gave, (C, H, W, N)."""
    return out.permute(1, 2, 3, 0).numpy()
