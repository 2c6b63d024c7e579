"""Lottery tickets: train, prune the smallest weights, rewind, again."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from anymask.errors import MaskError, SettingError
from anymask.mask import Mask
from anymask.prunables import prunable
from anymask.pruning.budget import at_least, keep_count, report_collapse
from anymask.pruning.isolation import isolated_random, masked_copy
from anymask.pruning.lottery_folder import LotteryFolder
from anymask.pruning.select import check_finite, keep_best

Train = Callable[[nn.Module, Mask | None, int, int | None], None]


@dataclass(frozen=True, eq=False)  # tensors have no plain ==
class Ticket:
    """A mask and where to start training it from.

    Args:
        mask: which weights are kept.
        weights: the whole state dict at the rewinding step, on the CPU, not yet masked.
    """

    mask: Mask
    weights: dict[str, Tensor]


def lottery_ticket(
    model: nn.Module,
    *,
    sparsity: float,
    train: Train,
    rewind_step: int = 0,
    rate: float = 0.2,
    folder: str | PathLike[str] | None = None,
    seed: int = 0,
    kinds: Iterable[str] = ("conv", "linear"),
    exclude: Iterable[str] = (),
    on_collapse: str = "warn",
) -> Ticket:
    """Find a lottery ticket: iterative magnitude pruning with rewinding to step k.

    Train to step k and remember w_k; then, round by round, train w_k * mask to the end and prune the share `rate` of the
    weights left, those of smallest |w|, over all layers together. The last round prunes less, so that exactly
    round((1 - sparsity) * total) are kept: n = ceil(log(1 - sparsity) / log(1 - rate)) trainings, and one of k steps.

    `model` is only read: copies are trained. Before each call of `train` the global random state is set by `seed`, and
    put back after it.

    Args:
        model: as initialised.
        sparsity: share of zeros among the prunable weights, in [0, 1).
        train: `train(model, mask, first_step, last_step)` trains `model` in place, holding its pruned weights at 0 (mask
            None: dense), from optimiser step `first_step` up to, not including, `last_step`; None = to the end.
        rewind_step: k >= 0; 0 rewinds to the initial weights.
        rate: share of the weights left that a round prunes, in (0, 1).
        folder: each finished round is kept there (`rewind.safetensors`, `round-01.mask`, ...), and a second call with the
            same settings and model goes on with the next round. A round cut off is trained again from its start.
        seed: of ties and of the global random state in `train`.
        kinds: as in `prune`.
        exclude: as in `prune`.
        on_collapse: as in `prune`.

    Raises:
        SettingError: for a number out of range, and for a folder made with other settings or another model.
        MaskError: when `train` did not hold the mask, or left weights that are not finite; see also `prune`.
        FileFormatError: for a damaged file in the folder.

    Reference: Frankle and Carbin 2019, arXiv 1803.03635; rewinding: Frankle et al. 2019, arXiv 1903.01611.

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
    kinds, exclude = tuple(kinds), tuple(exclude)
    shapes = {name: tuple(weight.shape) for name, weight in prunable(model, kinds=kinds, exclude=exclude).items()}
    count = keep_count(shapes, sparsity, on_collapse=on_collapse)
    plan = _plan(sum(math.prod(shape) for shape in shapes.values()), count, _check_rate(rate))
    start = _state(model)
    info = {"method": "lottery", "sparsity": sparsity, "seed": seed, "scope": "global", "rounds": len(plan), "rate": rate}
    info |= {"rewind_step": at_least("rewind_step", rewind_step, 0), "kinds": list(kinds), "exclude": list(exclude)}
    settings = info | {"on_collapse": on_collapse, "model": hashlib.sha256(to_bytes(start)).hexdigest()}
    place = LotteryFolder(folder, settings)

    weights = place.weights()
    if weights is None:
        weights = _train(model, None, weights=start, train=train, steps=(0, rewind_step), seed=seed) if rewind_step else start
        place.write_weights(weights)
    mask, done = place.last_round(plan) or (Mask({name: torch.ones(shape) for name, shape in shapes.items()}), 0)
    for number, left in list(enumerate(plan, 1))[done:]:
        held = mask if number > 1 else None
        trained = _train(model, held, weights=weights, train=train, steps=(rewind_step, None), seed=seed)
        mask = Mask(_smallest_out(mask, trained, left, seed=seed, floor=int(on_collapse == "avoid")), info=info)
        place.write_round(number, mask)
    return Ticket(report_collapse(Mask(mask, info=info), on_collapse=on_collapse), weights)


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
    twin = masked_copy(model, {})
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


def _smallest_out(mask: Mask, trained: dict[str, Tensor], left: int, *, seed: int, floor: int) -> dict[str, Tensor]:
    scores = {name: trained[name].abs().double() for name in mask}
    check_finite(scores, "lottery")
    alive = {name: score.masked_fill(~mask[name], -torch.inf) for name, score in scores.items()}
    return keep_best(alive, left, generator=torch.Generator().manual_seed(seed), floor=floor)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU; tied tensors twice, contiguous, as safetensors asks for."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}


def _check_rate(rate: float) -> float:
    if not 0 < rate < 1:
        raise SettingError(f"rate came as {rate!r}", allowed="a number in (0, 1)", fix="give 0.2 to prune 20% of what is left a round")
    return rate
