"""What the ranks of torch.distributed agree on; with one rank, or no process group, everything is as it is."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def together() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_rank(value: T, source: int = 0) -> T:
    """The `value` of rank `source`, on every rank. It is pickled: ranks of one training trust each other."""
    if not together():
        return value
    box = [value if dist.get_rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    return box[0]  # type: ignore[return-value]


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous and of equal shape on all ranks, averaged over them in place."""
    if together():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def on_any_rank(flags: list[bool], *, device: torch.device) -> list[bool]:
    """Each of `flags`, equally many on all ranks, True where it is on any of them.

    Args:
        device: one that the process group can send from, such as that of the parameters.

    Example:
        >>> on_any_rank([True, False], device=torch.device("cpu"))
        [True, False]
    """
    if not together():
        return flags
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(counts)
    return (counts > 0).tolist()
