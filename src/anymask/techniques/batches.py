"""Batches of (inputs, targets) of any kind, cut and joined along their samples."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from anymask.errors import TechniqueError
from anymask.surgery import samples

Batch = Sequence[Any]  # (inputs, targets); inputs: a tensor, a tuple of positional ones or a mapping of keyword ones


def pairs(batches: Iterable[Batch], overlap: float) -> Iterator[tuple[Batch, Batch]]:
    """B1 and B2 of `rescale`, for ever: each batch, and one as large with the share `overlap` of it and the rest of the next."""
    stream = (plain(batch) for batch in _endless(batches))
    here = next(stream)
    for there in stream:
        yield here, _joined(here, there, round(overlap * samples(here[0])))
        here = there


def _joined(here: Batch, there: Batch, shared: int) -> Batch:
    """The first `shared` samples of `here`, then the first of `there`, as many as `here` has."""
    many, more = samples(here[0]), samples(there[0])

    def join(a: Any, b: Any) -> Any:
        if not (_by_sample(a, many) and _by_sample(b, more)):
            return a
        return torch.cat([a[:shared], b[: many - shared]]) if shared else b[:many]

    try:
        return tree_map(join, here, there)
    except (RuntimeError, ValueError, TypeError) as error:
        raise TechniqueError(
            f"two batches cannot be joined: {error}",
            allowed="batches of the same kinds and shapes but for the number of samples",
            fix='pad them to one length (a tokenizer: padding="max_length"), or set overlap = 0 in RescaleSettings',
        ) from error


def cut(tree: Any, start: int, stop: int, *, of: int) -> Any:
    """The samples `start` to `stop` of every tensor in `tree` that has `of` of them; all else as it is."""
    return tree_map(lambda t: t[start:stop] if _by_sample(t, of) else t, tree)


def _halves(batch: Batch) -> list[Batch]:
    """The two halves of a lone batch."""
    batch, many = plain(batch), samples(batch[0])
    middle = -(-many // 2)
    return [cut(batch, 0, middle, of=many), cut(batch, middle, many, of=many)] if many > 1 else [batch]


def plain(batch: Batch) -> Batch:
    """The pair with tuples for lists and dicts for other mappings (such as a tokenizer's), which torch knows how to walk."""
    return tuple(tuple(p) if isinstance(p, list) else dict(p) if isinstance(p, Mapping) else p for p in batch)


def _by_sample(value: Any, samples: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == samples


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches over and over; a lone one as its two halves."""
    source = iter(batches)
    first = list(islice(source, 2))
    if len(first) == 1:
        yield from cycle(_halves(first[0]))
    more: Iterable[Batch] = chain(first, source)
    while True:
        ended = True
        for batch in more:
            ended = False
            yield batch
        if ended:
            raise TechniqueError(
                "no batches to learn the scales on, or none left",
                allowed="a list or a loader of at least one (inputs, targets) pair that can be gone through again",
                fix="give a list or a loader, not an iterator, and check that its data set is not empty",
            )
        more = batches
