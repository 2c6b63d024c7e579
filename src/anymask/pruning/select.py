"""Which weights to keep: the best by score, exactly as many as asked for, ties broken by lot."""

from collections.abc import Mapping

import torch
from torch import Tensor

from anymask.errors import MaskError


def keep_best(scores: Mapping[str, Tensor], count: int, *, generator: torch.Generator, floor: int = 0) -> dict[str, Tensor]:
    """Bool tensors, True at the `count` highest of all `scores` together, False elsewhere.

    A threshold (`score > t`) keeps too many or too few where scores are equal. Here all above the count-th highest score
    are kept, and as many of those equal to it as are still missing, drawn from `generator`: no position is favoured, and
    for equal generators a smaller `count` keeps a subset of what a larger one keeps.

    Args:
        scores: tensors of any shape and device; ranked on the CPU in float64. -inf = never, unless there is nothing else.
        count: how many to keep, 0 <= count <= number of scores.
        generator: of the CPU, so that the draw is the same on every device.
        floor: the best `floor` of each tensor are kept in any case, within `count`.

    Example:
        >>> import torch
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 2.0])}
        >>> kept = keep_best(scores, 2, generator=torch.Generator().manual_seed(0))
        >>> kept["a"].tolist(), int(kept["b"].sum())
        ([True, False], 1)
    """
    flat = {name: wide(tensor).reshape(-1) for name, tensor in scores.items()}
    if floor:
        flat = {name: tensor.masked_fill(_top(tensor, floor, generator), torch.inf) for name, tensor in flat.items()}
    kept = _top(torch.cat(list(flat.values())), count, generator)
    parts = kept.split([tensor.numel() for tensor in flat.values()])
    return {name: part.reshape(scores[name].shape).clone() for name, part in zip(flat, parts, strict=True)}


def keep_units(scores: Tensor, sizes: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """Which units are kept, `(units,)` bool: the best in order, as long as their sizes stay within `count` weights.

    A unit that no longer fits is passed over for the next one that does, so less than the smallest unit left out stays unused.

    Args:
        scores: `(units,)`; -inf = never, +inf = first. Equal scores by lot.
        sizes: `(units,)`, weights of each, >= 1.
        count: the most weights to keep, >= 0.

    Example:
        >>> kept = keep_units(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([4, 4, 2]), 6, generator=torch.Generator())
        >>> kept.tolist()
        [True, False, True]
    """
    lots = torch.randperm(len(scores), generator=generator)
    order = lots[scores[lots].argsort(descending=True, stable=True)]
    order = order[scores[order] > -torch.inf]
    kept = torch.zeros(len(scores), dtype=torch.bool)
    while len(order := order[sizes[order] <= count]):  # at most one turn for each distinct size
        taken = order[sizes[order].cumsum(0) <= count]
        kept[taken] = True
        count -= int(sizes[taken].sum())
        order = order[len(taken) :]
    return kept


def keep_in_windows(scores: Tensor, each: int, *, generator: torch.Generator) -> Tensor:
    """The best `each` of every line of `scores` `(windows, width)`, equal ones by lot; bool, of that shape.

    Example:
        >>> keep_in_windows(torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 6.0]]), 1, generator=torch.Generator()).int().tolist()
        [[1, 0, 0], [0, 0, 1]]
    """
    lots = torch.rand(scores.shape, generator=generator).argsort(1)
    ranked = lots.gather(1, scores.gather(1, lots).argsort(dim=1, descending=True, stable=True))
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, ranked[:, :each], True)


def wide(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU in float64, itself where it is that already. The CPU first: some devices have no float64."""
    return tensor.detach().cpu().double()


def check_finite(scores: Mapping[str, Tensor], method: str) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        MaskError: naming every parameter with a NaN or infinite score.
    """
    bad = [name for name, tensor in scores.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise MaskError(
            f"{method} gave NaN or infinite scores for {', '.join(bad)}",
            allowed="finite scores",
            fix="look for NaN, inf or very large numbers in the weights of the model, in the data and in the loss",
        )


def _top(flat: Tensor, count: int, generator: torch.Generator) -> Tensor:
    count = min(count, flat.numel())
    if count == 0:
        return torch.zeros(flat.numel(), dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values  # linear time; a sort of 11M scores takes seconds
    kept = flat > threshold
    equal = (flat == threshold).nonzero().reshape(-1)
    lots = torch.randperm(len(equal), generator=generator)
    kept[equal[lots[: count - int(kept.sum())]]] = True
    return kept
