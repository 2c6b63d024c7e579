"""Lottery tickets: train, prune the smallest weights, rewind, again."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from anymask.errors import MaskError, SettingError
from anymask.mask import Mask
from anymask.prunables import USUAL, names, prunable
from anymask.pruning.budget import at_least, keep_count, least_kept, report_collapse, seed_of
from anymask.pruning.lottery_folder import LotteryFolder
from anymask.pruning.patterns import pattern as pattern_of
from anymask.pruning.provenance import made_with
from anymask.pruning.select import check_finite
from anymask.pruning.selector import Selector, selector
from anymask.randomness import isolated_random
from anymask.surgery import copied

Train = Callable[[nn.Module, Mask | None, int, int | None], None]


@dataclass(frozen=True, eq=False)  # tensors have no plain ==
class Ticket:
    """A mask and where to start training it from.

    Args:
        mask: which weights are kept.
        weights: the whole state dict to start from, on the CPU, not yet masked: that of the rewinding step, or the last trained one.
        step: the optimiser step to go on from.
    """

    mask: Mask
    weights: dict[str, Tensor]
    step: int = 0


def lottery_ticket(
    model: nn.Module,
    *,
    sparsity: float | None,
    train: Train,
    rewind_step: int = 0,
    rewinds: bool = True,
    rate: float = 0.2,
    rounds: int | None = None,
    scope: str = "global",
    pattern: str = "unstructured",
    folder: str | PathLike[str] | None = None,
    training: Mapping[str, Any] | None = None,
    seed: int = 0,
    floor: int = 0,
    kinds: Iterable[str] = USUAL,
    exclude: Iterable[str] = (),
    on_collapse: str = "warn",
) -> Ticket:
    """Find a lottery ticket: iterative magnitude pruning with rewinding to step k.

    Train to step k and remember w_k; then, round by round, train w_k * mask to the end and prune the share `rate` of the
    weights left, those of smallest |w|, over all layers together. The last round prunes less, so that exactly
    round((1 - sparsity) * total) are kept: n = ceil(log(1 - sparsity) / log(1 - rate)) trainings, and one of k steps.

    With `rewinds=False` (learning-rate rewinding) each round goes on from the weights that the last one trained, and only the
    schedule starts at step k again. `rounds=1` prunes once, after one training.

    `model` is only read: copies are trained. Before each call of `train` the global random state is set by `seed`, and
    put back after it.

    Several ranks of torch.distributed, of which each has to call this, find one ticket: `train` trains on all of them, masks are those
    of rank 0, which alone reads and writes `folder`.

    Args:
        model: as initialised.
        sparsity: share of zeros among the prunable weights, in [0, 1); None where an N:M pattern decides it.
        train: `train(model, mask, first_step, last_step)` trains `model` in place, holding its pruned weights at 0 (mask
            None: dense), from optimiser step `first_step` up to, not including, `last_step`; None = to the end.
        rewind_step: k >= 0; 0 rewinds to the initial weights.
        rewinds: whether weights are rewound, or the schedule alone.
        rate: share of the weights left that a round prunes, in (0, 1).
        rounds: instead of `rate`: prune in this many rounds, each the same share of what is left.
        scope, pattern, floor: as in `prune`.
        folder: each finished round is kept there (`rewind.safetensors`, `round-01.mask`, ...), and a second call with the
            same settings and model goes on with the next round. A round cut off is trained again from its start.
        training: what decides how `train` trains (epochs, learning rate, data ...), as plain values; rounds of others are not gone on with.
        seed: of ties and of the global random state in `train`.
        kinds, exclude, on_collapse: as in `prune`.

    Raises:
        SettingError: for a number out of range, and for a folder made with other settings or another model.
        MaskError: when `train` did not hold the mask, or left weights that are not finite; see also `prune`.
        FileFormatError: for a damaged file in the folder.

    Reference: Frankle and Carbin 2019, arXiv 1803.03635; rewinding: Frankle et al. 2019, arXiv 1903.01611; learning-rate
    rewinding: Renda et al. 2020, arXiv 2003.02389.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> def train(model, mask, first, last):  # stands for a training
        ...     with torch.no_grad():
        ...         model.weight.mul_(2)
        >>> ticket = lottery_ticket(nn.Linear(10, 10), sparsity=0.5, train=train)
        >>> ticket.mask, sorted(ticket.weights)
        (Mask(1 parameters, 50 of 100 kept, sparsity 0.5000, lottery), ['bias', 'weight'])
    """
    kinds, exclude, form, seed = names("kinds", kinds), names("exclude", exclude), pattern_of(pattern), seed_of(seed)
    shapes = {name: tuple(weight.shape) for name, weight in prunable(model, kinds=kinds, exclude=exclude).items()}
    count, least = keep_count(shapes, sparsity, pattern=form), least_kept(floor, on_collapse=on_collapse)
    how: dict[str, Any] = {"scope": scope, "pattern": form, "floor": least}
    choose = selector(model, shapes, generator=torch.Generator(), **how)
    choose.check(count)
    rate = _rate(rate, rounds, count / choose.total)
    plan = _plan(choose.total, count, rate)
    start = _state(model)
    info: dict[str, Any] = {
        "method": _name(rewind_step, rewinds, rounds),
        "sparsity": sparsity,
        "seed": seed,
        "scope": scope,
        "pattern": pattern,
    }
    info |= {"rounds": len(plan), "rate": rate, "rewind_step": at_least("rewind_step", rewind_step, 0), "rewinds": rewinds}
    info |= {"floor": least, "kinds": list(kinds), "exclude": list(exclude)}
    made_by = {f"training {key}": value for key, value in (training or {}).items()}
    place = LotteryFolder(folder, info | made_by | {"on_collapse": on_collapse, "model": hashlib.sha256(to_bytes(start)).hexdigest()})
    info |= made_with(model)

    weights = place.weights()
    if weights is None:
        weights = _train(model, None, weights=start, train=train, steps=(0, rewind_step), seed=seed) if rewind_step else start
        place.write_weights(weights)
    mask, done = place.last_round(plan if form.unstructured else None) or (Mask({n: torch.ones(shape) for n, shape in shapes.items()}), 0)
    weights = weights if rewinds or not done else place.trained(done)
    for number, left in list(enumerate(plan, 1))[done:]:
        trained = _train(model, mask if number > 1 else None, weights=weights, train=train, steps=(rewind_step, None), seed=seed)
        choose = selector(model, shapes, generator=torch.Generator().manual_seed(seed), **how)
        mask = Mask(_smallest_out(choose, mask, trained, left), info=info).broadcast()
        weights = weights if rewinds else trained
        place.write_round(number, mask, trained=None if rewinds else trained)
    return Ticket(report_collapse(Mask(mask, info=info), on_collapse=on_collapse), weights, step=rewind_step)


def _name(rewind_step: int, rewinds: bool, rounds: int | None) -> str:
    """The row of METHODS that this is."""
    if not rewinds:
        return "lottery-lr"
    return "lottery-rewind" if rewind_step else "lottery-oneshot" if rounds == 1 else "lottery"


def _rate(rate: float, rounds: int | None, density: float) -> float:
    """The share that each round prunes; with `rounds` such that the last one ends at `density`."""
    if rounds is None:
        return _check_rate(rate)
    return 1 - max(density, 1e-12) ** (1 / at_least("rounds", rounds, 1))


def _plan(total: int, count: int, rate: float) -> list[int]:
    """How many weights are left after each round, down to `count`."""
    plan: list[int] = []
    left = total
    while left > count:
        # total * (1 - rate)^r, not left * (1 - rate): rounding does not add up; always at least one weight goes
        left = max(count, min(left - 1, round(total * (1 - rate) ** (len(plan) + 1))))
        plan.append(left)
    return plan


def _train(
    model: nn.Module, mask: Mask | None, *, weights: dict[str, Tensor], train: Train, steps: tuple[int, int | None], seed: int
) -> dict[str, Tensor]:
    """The state dict after training a copy of `model` from `weights` under `mask`."""
    twin = copied(model)
    twin.zero_grad(set_to_none=True)
    twin.load_state_dict(weights)
    if mask is not None:
        mask.apply(twin)
    with isolated_random(seed), torch.enable_grad():
        train(twin, mask, *steps)
    state = _state(twin)
    loose = [name for name, kept in (mask or {}).items() if bool(state[name][~kept].any())]
    if loose:
        raise MaskError(
            f"train left pruned weights that are not 0 in {', '.join(loose)}",
            allowed="a training that holds the mask it is given",
            fix="call anymask.hold(mask, model, optimizer) in it",
        )
    return state


def _smallest_out(choose: Selector, mask: Mask, trained: Mapping[str, Tensor], left: int) -> dict[str, Tensor]:
    scores = {name: trained[name].abs().double() for name in mask}
    check_finite(scores, "lottery")
    return choose.keep(scores, left, alive=mask)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU; tied tensors twice, contiguous, as safetensors asks for."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}


def _check_rate(rate: float) -> float:
    if not 0 < rate < 1:
        raise SettingError(f"rate came as {rate!r}", allowed="a number in (0, 1)", fix="give 0.2 to prune 20% of what is left a round")
    return rate
