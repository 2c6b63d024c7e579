"""What the ranks of torch.distributed agree on; with one rank, or no process group, everything is as it is."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def together() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def ranks() -> int:
    """How many processes train together; 1 for one that trains alone."""
    return dist.get_world_size() if together() else 1


def leads() -> bool:
    """Whether this process is the one that writes files and decides: rank 0, or one that trains alone."""
    return not together() or dist.get_rank() == 0


def from_rank(value: T, source: int = 0) -> T:
    """The `value` of rank `source`, on every rank. It is pickled: ranks of one training trust each other."""
    if not together():
        return value
    box = [value if dist.get_rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    return box[0]  # type: ignore[return-value]


def by_rank_0(act: Callable[[], T]) -> T:
    """What `act()` gives on rank 0, where alone it is called, on every rank; an error there is raised on all of them.

    Example:
        >>> by_rank_0(lambda: 1 + 1)
        2
    """
    if not together():
        return act()
    value: T | None = None
    raised: Exception | None = None
    if leads():
        try:
            value = act()
        except Exception as error:
            raised = error
    value, raised = from_rank((value, raised))
    if raised is not None:
        raise raised
    return value  # type: ignore[return-value]


def first_of_machine(act: Callable[[bool], T]) -> T:
    """What `act(True)` gives on the first rank of each machine, and then `act(False)` on the others: they find what it has fetched.

    Example:
        >>> first_of_machine(lambda first: first)
        True
    """
    if not together():
        return act(True)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    value = act(True) if first else None
    dist.barrier()
    return value if first else act(False)  # type: ignore[return-value]


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
