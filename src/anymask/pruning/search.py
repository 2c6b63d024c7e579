"""`prune`: one row of the table of methods, run on a model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anymask.errors import SettingError
from anymask.mask import Mask
from anymask.prunables import prunable
from anymask.pruning.batches import Batches, Loss, device_of, input_shape, take
from anymask.pruning.budget import at_least, keep_count, report_collapse
from anymask.pruning.distribution import DISTRIBUTIONS, Shapes, layer_counts
from anymask.pruning.isolation import isolated_random, masked_copy
from anymask.pruning.lottery import Train, lottery_ticket
from anymask.pruning.methods import METHODS, Method
from anymask.pruning.select import check_finite, keep_best
from anymask.registry import lookup, unknown

SCOPES = ("global", *DISTRIBUTIONS)
HOW_TO_GIVE = {
    "data": ("data", "data=loader of (x, y) batches"),
    "example": ("the shape of an input", "example=x[:1], or data=loader"),
    "train": ("train", "train=f, where f(model, mask, first_step, last_step) trains in place; see lottery_ticket"),
}


def prune(
    model: nn.Module,
    method: str,
    *,
    sparsity: float,
    data: Iterable[Any] | None = None,
    example: Tensor | None = None,
    loss: Loss = F.cross_entropy,
    train: Train | None = None,
    seed: int = 0,
    scope: str | None = None,
    rounds: int | None = None,
    batches: int | None = None,
    kinds: Iterable[str] = ("conv", "linear"),
    exclude: Iterable[str] = (),
    on_collapse: str = "warn",
) -> Mask:
    """Make a mask for `model` that keeps round((1 - sparsity) * total) of its prunable weights, exactly.

    After round r of n rounds round(total * (1 - sparsity) ** (r / n)) weights are left; what is pruned stays pruned. Equal
    scores are decided by lot, by `seed`. Scores are ranked on the CPU in float64: 8 bytes a weight.

    `model` is only read: a copy is scored (in train mode for snip and grasp, in eval mode for synflow), and the global
    random state is put back. A loader with a generator of its own is advanced by the batches read. The same seed gives
    the same mask; random masks are the same on every device, the others up to rounding of the device's arithmetic.

    Args:
        model: any module, on any device, in any mode (synflow computes in float64 there, which Apple's MPS has not).
        method: a name in `METHODS`: random, random-uniform, random-er, random-erk, magnitude, snip, grasp, synflow, lottery.
        sparsity: share of zeros among the prunable weights, in [0, 1).
        data: batches (x, y), x `(N, ...)`; snip and grasp score on the first few; synflow looks at the first one's shape.
        example: an input `(N, ...)`, of which synflow uses the shape; instead of `data`.
        loss: `loss(model(x), y)`, a scalar, for snip and grasp.
        train: trains a model, for lottery; see `lottery_ticket`, which also rewinds and resumes.
        seed: of random scores, ties, and the random numbers that loaders and dropout draw meanwhile.
        scope: instead of the method's own: "global", or layer by layer with densities "uniform", "er" or "erk".
        rounds: instead of the method's own; not for lottery.
        batches: how many batches are looked at, instead of the method's own (snip 1, grasp 8).
        kinds: "conv", "linear": which modules' weights the mask covers.
        exclude: names of modules or parameters to leave dense and out of the count.
        on_collapse: what to do when a layer would keep no weight: "warn" (CollapseWarning; also in
            `mask.info["collapsed"]`), "raise", or "avoid" (each layer keeps its best weight, within the same count).

    Raises:
        UnknownName: for a method, scope or on_collapse that is not there.
        SettingError: for a number out of range, or when what the method needs is missing.
        DataError: for data without a batch or without labels.
        MaskError: for scores that are not finite, a collapse that was to be refused, or nothing to prune.

    Example:
        >>> import anymask, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> anymask.prune(net, "synflow", sparsity=0.9, example=torch.zeros(1, 16))
        Mask(2 parameters, 64 of 640 kept, sparsity 0.9000, synflow)
        >>> loader = [(torch.randn(8, 16), torch.arange(8) % 4)]
        >>> anymask.prune(net, "snip", sparsity=0.9, data=loader, scope="erk").layer_density()
        {'0.weight': 0.072265625, '2.weight': 0.2109375}
    """
    row = lookup(METHODS, method, what="mask method")
    _check_needs(row, data=data, example=example, train=train)
    if train is not None and "train" in row.needs:
        _check_lottery(scope=scope, rounds=rounds)
        how: dict[str, Any] = {"sparsity": sparsity, "seed": seed, "kinds": kinds, "exclude": exclude, "on_collapse": on_collapse}
        return lottery_ticket(model, train=train, **how).mask
    scope = _check_scope(scope or row.scope)
    rounds = at_least("rounds", row.rounds if rounds is None else rounds, 1)
    batches = at_least("batches", row.batches if batches is None else batches, 1)
    kinds, exclude = tuple(kinds), tuple(exclude)
    weights = {name: weight.detach() for name, weight in prunable(model, kinds=kinds, exclude=exclude).items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    count = keep_count(shapes, sparsity, on_collapse=on_collapse)
    floor = int(on_collapse == "avoid")
    with isolated_random(seed), torch.enable_grad(), torch.autocast(device_of(model).type, enabled=False):
        seen = Batches(
            torch.Generator().manual_seed(seed),
            pairs=take(data, batches, device=device_of(model)) if data is not None and "data" in row.needs else (),
            loss=loss,
            shape=input_shape(data, example) if "example" in row.needs else None,
        )
        kept = _search(model, row, weights, seen, groups=_groups(shapes, count, scope=scope, floor=floor), rounds=rounds, floor=floor)
    info = {"method": row.name, "sparsity": sparsity, "seed": seed, "scope": scope, "rounds": rounds}
    info |= {"batches": len(seen.pairs), "kinds": list(kinds), "exclude": list(exclude)}
    return report_collapse(Mask(kept, info=info), on_collapse=on_collapse)


def _search(
    model: nn.Module,
    row: Method,
    weights: Mapping[str, Tensor],
    seen: Batches,
    *,
    groups: Mapping[tuple[str, ...], int],
    rounds: int,
    floor: int,
) -> dict[str, Tensor]:
    """Score, prune, score again: after round r of n, each group keeps size * (count / size) ** (r / n)."""
    kept = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    for number in range(1, rounds + 1):
        scores = row.criterion(masked_copy(model, kept), weights, seen)
        check_finite(scores, row.name)
        alive = {name: score.masked_fill(~kept[name], -torch.inf) for name, score in scores.items()}
        for names, count in groups.items():
            size = sum(kept[name].numel() for name in names)
            now = round(size * (count / size) ** (number / rounds))
            kept |= keep_best({name: alive[name] for name in names}, now, generator=seen.generator, floor=floor)
    return kept


def _groups(shapes: Shapes, count: int, *, scope: str, floor: int) -> dict[tuple[str, ...], int]:
    """The sets of parameters whose scores compete, and how many each set keeps in the end."""
    if scope == "global":
        return {tuple(shapes): count}
    return {(name,): kept for name, kept in layer_counts(shapes, count, distribution=scope, floor=floor).items()}


def _check_scope(scope: str) -> str:
    if scope not in SCOPES:
        raise unknown(scope, SCOPES, what="scope")
    return scope


def _check_needs(row: Method, *, data: object, example: object, train: object) -> None:
    given = {"data": data is not None, "example": data is not None or example is not None, "train": train is not None}
    for need in sorted(row.needs):
        if not given[need]:
            what, how = HOW_TO_GIVE[need]
            raise SettingError(f"{row.name} came without {what}", allowed=f"{row.name} with {what}", fix=f"give {how}")


def _check_lottery(*, scope: str | None, rounds: int | None) -> None:
    if scope not in (None, "global") or rounds is not None:
        raise SettingError(
            f"lottery came with scope={scope!r}, rounds={rounds!r}",
            allowed="scope 'global' and no rounds: it takes as many as its rate needs",
            fix="leave them out, or call lottery_ticket with another rate",
        )
