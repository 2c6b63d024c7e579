"""What a criterion may look at besides the model: a few batches, the loss, the input's shape, a source of lots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from anymask.errors import DataError

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batches:
    """The part of the data that a criterion sees.

    Args:
        generator: of the CPU; the only source of random numbers of a criterion.
        pairs: a bounded number of (x, y) batches, on the model's device; x as `surgery.run` takes it. Empty for data-free methods.
        loss: `loss(logits, y)` is a scalar, with the logits of the model's output as `logits_of` finds them.
        shape: of one input, without the batch dimension, such as `(C, H, W)`; None where no input is known.
    """

    generator: torch.Generator
    pairs: Sequence[tuple[Any, Any]] = ()
    loss: Loss = F.cross_entropy
    shape: tuple[int, ...] | None = None


def take(data: Iterable[Any], count: int, *, device: torch.device) -> list[tuple[Any, Any]]:
    """The first `count` (x, y) batches of `data`, or all if there are fewer; no more than these are read or held.

    Raises:
        DataError: when there is no batch, or one without labels.
    """
    pairs = [_pair(batch, device) for batch in islice(data, count)]
    if not pairs:
        raise _empty()
    return pairs


def input_shape(data: Iterable[Any] | None, example: Tensor | None) -> tuple[int, ...]:
    """The shape of one input, from `example` `(N, ...)` or else from the first batch of `data`, with or without labels.

    Raises:
        DataError: when there is no batch, or it does not begin with a tensor.
    """
    if example is None:
        batch = next(iter(data or ()), None)
        if batch is None:
            raise _empty()
        example = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(example, Tensor) or example.ndim < 2:
        raise DataError(
            f"the input came as {type(example).__name__}",
            allowed="a tensor (N, ...) with at least two dimensions, alone or first in a pair (x, y)",
            fix="give example=x[:1]; for a model of several inputs take another method, such as snip or magnitude",
        )
    return tuple(example.shape[1:])


def _pair(batch: Any, device: torch.device) -> tuple[Any, Any]:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    x = dict(batch[0]) if pair and isinstance(batch[0], Mapping) else batch[0] if pair else None  # a tokenizer's is no dict
    if not any(isinstance(part, Tensor) for part in tree_leaves(x)):
        parts = [type(part).__name__ for part in batch] if isinstance(batch, (tuple, list)) else []
        raise DataError(
            f"a batch came as {type(batch).__name__}" + (f" of {', '.join(parts)}" if parts else ""),
            allowed="pairs (x, y) of inputs x (a tensor (N, ...), a tuple of several or a mapping of named ones) and their labels y",
            fix="give a loader of labelled batches, or a data-free method such as synflow or magnitude",
        )
    inputs: Any = tree_map_only(Tensor, lambda tensor: tensor.to(device), x)
    return inputs, batch[1].to(device) if isinstance(batch[1], Tensor) else batch[1]


def _empty() -> DataError:
    return DataError("data holds no batch", allowed="at least one batch", fix="check drop_last, the batch size and the dataset's length")
