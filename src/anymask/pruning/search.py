"""`prune`: one row of the table of methods, run on a model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anymask.errors import SettingError
from anymask.mask import Mask
from anymask.prunables import USUAL, bare, names, prunable, recurrent
from anymask.pruning import criteria
from anymask.pruning.batches import Batches, Loss, input_shape, take
from anymask.pruning.budget import at_least, keep_count, least_kept, report_collapse, report_outputs, report_recurrent, report_ties, seed_of
from anymask.pruning.lottery import Train, lottery_ticket
from anymask.pruning.methods import Method, method_of
from anymask.pruning.patterns import pattern as pattern_of
from anymask.pruning.provenance import made_with
from anymask.pruning.select import check_finite
from anymask.pruning.selector import Selector, selector
from anymask.randomness import isolated_random
from anymask.surgery import copied, device_of

HOW_TO_GIVE = {
    "data": ("data", "data=loader of (x, y) batches"),
    "example": ("the shape of an input", "example=x[:1], or data=loader"),
    "train": ("train", "train=f, where f(model, mask, first_step, last_step) trains in place; see lottery_ticket"),
    "rewind_step": ("rewind_step", "rewind_step=k, the optimiser step to rewind to"),
}


def prune(
    model: nn.Module,
    method: str | Method,
    *,
    sparsity: float | None = None,
    data: Iterable[Any] | None = None,
    example: Tensor | None = None,
    loss: Loss = F.cross_entropy,
    train: Train | None = None,
    rewind_step: int | None = None,
    seed: int = 0,
    scope: str | None = None,
    pattern: str | None = None,
    rounds: int | None = None,
    batches: int | None = None,
    floor: int = 0,
    kinds: Iterable[str] = USUAL,
    exclude: Iterable[str] = (),
    on_collapse: str = "warn",
) -> Mask:
    """Make a mask for `model` that keeps round((1 - sparsity) * total) of its prunable weights, exactly.

    After round r of n rounds round(total * (1 - sparsity) ** (r / n)) weights are left; what is pruned stays pruned (in "force" it
    may come back). Equal scores are decided by lot, by `seed`; a TieWarning says where that is more than half of the mask. Scores are
    ranked on the CPU in float64: 8 bytes a weight, several times. Patterns other than "unstructured" keep whole units, hence at most
    that many weights, and fewer by less than the largest unit; an OutputWarning says where whole outputs of the last layer go.

    `model` is only read: a copy is scored (in train mode for snip, grasp and taylor, in eval mode for synflow and wanda), and the
    global random state is put back. A loader with a generator of its own is advanced by the batches read. The same seed gives the
    same mask; random masks are the same on every device, the others up to rounding of the device's arithmetic, of which the 60 rounds
    of "snip-iterative" and "force" make much (docs/masks.md). Processes that see different data make different masks: share one by
    `mask.broadcast()`.

    Args:
        model: any module, on any device, in any mode (synflow computes in float64 there, which Apple's MPS has not).
        method: a name in `METHODS`, with another scope or pattern after a plus if wanted: "snip", "magnitude+erk", "wanda+2:4"; or
            a `Method` of your own.
        sparsity: share of zeros among the prunable weights, in [0, 1). May be left out where an N:M pattern decides it.
        data: batches (x, y), x `(N, ...)`, a tuple of positional inputs or a mapping of keyword ones; snip, grasp, taylor and wanda
            score on the first few; synflow looks at the shape of the first one, which has to be a tensor.
        example: an input `(N, ...)`, of which synflow uses the shape; instead of `data`.
        loss: `loss(logits, y)`, a scalar, for snip, grasp and taylor; the logits are the model's output, or what
            `RunningRecipe.loss` takes of it where it is a mapping, ModelOutput or tuple.
        train: trains a model, for lottery; see `lottery_ticket`, which also gives the weights to start from, and resumes.
        rewind_step: for lottery-rewind, the optimiser step to whose weights each round returns.
        seed: of random scores, ties, and the random numbers that loaders and dropout draw meanwhile.
        scope: instead of the method's own: "global", or layer by layer with densities "uniform", "er", "erk" or "balanced".
        pattern: instead of the method's own: "unstructured"; "2:4" and the like (N of every M consecutive inputs); "4x1" and the like
            (blocks of outputs x inputs); "channel" (whole outputs); "fan-in" (equally many for each output of a layer). Units are
            ranked by their mean score.
        rounds: instead of the method's own.
        batches: how many batches are looked at, instead of the method's own (grasp and taylor 8, others 1).
        floor: the least number of weights that each layer keeps, within the same count.
        kinds: which modules' weights the mask covers: "conv", "linear", "recurrent" (RNN, LSTM, GRU), "embedding"; see `prunable`.
        exclude: names of modules or parameters to leave dense and out of the count.
        on_collapse: what to do when a layer would keep no weight: "warn" (CollapseWarning; also in
            `mask.info["collapsed"]`), "raise", or "avoid" (as floor=1).

    Raises:
        UnknownName: for a method, scope, pattern or on_collapse that is not there.
        SettingError: for a number out of range, a text in place of a list of names, or when what the method needs is missing.
        DataError: for data without a batch or without labels, and for labels that are no classes where `loss` was left out.
        MaskError: for scores that are not finite, a collapse that was to be refused, a pattern that does not fit a layer, a budget
            smaller than the floors, or nothing to prune.
        TechniqueError: for an output of the model without logits, with grasp for a model that cannot be differentiated twice, and with
            synflow for one that takes token ids.

    Example:
        >>> import anymask, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> anymask.prune(net, "synflow", sparsity=0.9, example=torch.zeros(1, 16))
        Mask(2 parameters, 64 of 640 kept, sparsity 0.9000, synflow)
        >>> loader = [(torch.randn(8, 16), torch.arange(8) % 4)]
        >>> anymask.prune(net, "snip", sparsity=0.9, data=loader, scope="erk").layer_density()
        {'0.weight': 0.072265625, '2.weight': 0.2109375}
        >>> anymask.prune(net, "magnitude+2:4")
        Mask(2 parameters, 320 of 640 kept, sparsity 0.5000, magnitude)
    """
    row = method_of(method, scope=scope, pattern=pattern)
    _check_needs(row, data=data, example=example, train=train, rewind_step=rewind_step)
    scope, pattern, seed = scope or row.scope, pattern or row.pattern, seed_of(seed)
    rounds = row.rounds if rounds is None else rounds
    kinds, exclude = names("kinds", kinds), names("exclude", exclude)
    if "train" in row.needs and train is not None:
        how: dict[str, Any] = {"sparsity": sparsity, "seed": seed, "kinds": kinds, "exclude": exclude, "on_collapse": on_collapse}
        how |= {"scope": scope, "pattern": pattern, "rounds": rounds, "floor": floor, "rewind_step": rewind_step or 0}
        return lottery_ticket(model, train=train, rewinds=row.rewinds, **how).mask
    rounds = at_least("rounds", rounds, 1)
    batches = at_least("batches", row.batches if batches is None else batches, 1)
    weights = {name: weight.detach() for name, weight in prunable(model, kinds=kinds, exclude=exclude).items()}
    if kinds == USUAL:  # nobody has chosen them
        report_recurrent(weights, recurrent(model))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    form, least = pattern_of(pattern), least_kept(floor, on_collapse=on_collapse)
    # Weights in float64 that were drawn with the same seed were drawn from the very numbers that `random` ranks by: it kept the largest.
    drawn = seed ^ 0x6D61736B if any(weight.dtype == torch.float64 for weight in weights.values()) else seed
    count, generator = keep_count(shapes, sparsity, pattern=form), torch.Generator().manual_seed(drawn)
    choose = selector(model, shapes, scope=scope, pattern=form, floor=least, generator=generator)
    choose.check(count)
    with isolated_random(seed), torch.enable_grad(), torch.autocast(device_of(model).type, enabled=False):
        seen = Batches(
            generator,
            pairs=take(data, batches, device=device_of(model)) if data is not None and "data" in row.needs else (),
            loss=loss,
            shape=input_shape(data, example) if "example" in row.needs else None,
        )
        kept = _search(model, row, weights, seen, choose=choose, count=count, rounds=rounds)
    asked = 1 - count / choose.total if sparsity is None else sparsity
    info = {"method": row.name, "sparsity": asked, "seed": seed, "scope": scope, "pattern": pattern, "rounds": rounds}
    info |= {"batches": len(seen.pairs), "floor": least, "kinds": list(kinds), "exclude": list(exclude)} | made_with(model)
    return report_collapse(Mask(kept, info=info), on_collapse=on_collapse)


def _search(
    model: nn.Module,
    row: Method,
    weights: Mapping[str, Tensor],
    seen: Batches,
    *,
    choose: Selector,
    count: int,
    rounds: int,
) -> dict[str, Tensor]:
    """Score, prune, score again: after round r of n, total * (count / total) ** (r / n) weights are left."""
    kept = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    for number in range(1, rounds + 1):
        twin = copied(model)
        twin.zero_grad(set_to_none=True)
        Mask(kept).apply(twin)
        scores = row.criterion(twin, weights, seen)
        check_finite(scores, row.name)
        now = round(choose.total * (count / choose.total) ** (number / rounds))
        kept = choose.keep(scores, now, alive=None if row.regrow else kept)
    if choose.pattern.unstructured:
        report_ties(row.name, scores, kept, apart=choose.scope != "global")
    if choose.pattern.name == "channel" and (last := _last_matrix(model)) in kept:
        report_outputs(last, kept[last].reshape(-1)[choose.rows[last]])
    return kept


def _last_matrix(model: nn.Module) -> str:
    """The name of the last weight `(outputs, inputs)` in the order of the modules: one that is tied counts where it is used again."""
    weights = [module.weight for module in bare(model).modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    last = next((weight for weight in reversed(weights) if weight.ndim == 2), None)
    return next((name for name, parameter in bare(model).named_parameters() if parameter is last), "")


def _check_needs(row: Method, *, data: object, example: object, train: object, rewind_step: object) -> None:
    if "train" in row.needs and row.criterion is not criteria.magnitude:  # lottery_ticket would prune by magnitude all the same
        raise SettingError(
            f"{row.name} needs train and has a criterion of its own",
            allowed="magnitude after training, or another criterion without training",
            fix="train the model first and leave 'train' out of needs, or take criteria.magnitude",
        )
    given = {"data": data is not None, "example": data is not None or example is not None}
    given |= {"train": train is not None, "rewind_step": rewind_step is not None}
    for need in sorted(row.needs):
        if not given[need]:
            what, how = HOW_TO_GIVE[need]
            raise SettingError(f"{row.name} came without {what}", allowed=f"{row.name} with {what}", fix=f"give {how}")
