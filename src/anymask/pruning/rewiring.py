"""`rewire`: a held mask that moves while somebody else trains."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anymask.errors import MaskError, SettingError, TechniqueError
from anymask.holding import Hold, held
from anymask.mask import Mask
from anymask.prunables import trained
from anymask.pruning.budget import keep_count, seed_of
from anymask.pruning.distribution import layer_counts
from anymask.pruning.dynamic import Dynamic, Times, cosine, cubic, dynamic_of, exchange, lots, thin
from anymask.pruning.gradients import DenseGradients
from anymask.pruning.patterns import pattern
from anymask.ranks import on_any_rank
from anymask.sparse import Pause


@dataclass(frozen=True)
class Move:
    """One update of a mask that moves."""

    step: int  # optimiser steps done by then
    dropped: int  # weights that were kept before and are not now
    grown: int  # weights that were not kept before and are now
    fraction: float  # the share of the kept weights that was to go


@dataclass(frozen=True)
class Group:
    """Layers that shrink together: what they keep at first and in the end, in all."""

    names: tuple[str, ...]
    first: int
    last: int


class Rewiring:
    """A mask that moves, step by step of its optimiser. Made by `anymask.rewire`; undone by `release`, its own or the hold's.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> hold = anymask.hold(anymask.prune(model, "random", sparsity=0.5), model, optimizer)
        >>> rewiring = anymask.rewire(hold, "set", total_steps=9, every="3it", end="100%")
        >>> for _ in range(9):
        ...     model(torch.randn(4, 8)).sum().backward(); optimizer.step(); optimizer.zero_grad()
        >>> [move.step for move in rewiring.history], rewiring.mask.kept, rewiring.settled
        ([3, 6], 32, True)
    """

    def __init__(self, hold: Hold, row: Dynamic, *, times: Times, seed: int, groups: tuple[Group, ...], start: int) -> None:
        self.hold, self.row, self.seed, self.position = hold, row, seed, start
        self.history: list[Move] = []
        self._times, self._groups, self._waiting = times, groups, False
        self._gradients: DenseGradients | None = None
        self._pause: Pause | None = None  # of sparse layers, which know nothing of other weights than theirs
        self._handle: Any = hold.optimizer.register_step_post_hook(self)
        hold.release_with(self)
        self._listen()

    @property
    def mask(self) -> Mask:
        """The mask as it is now."""
        return self.hold.mask

    @property
    def settled(self) -> bool:
        """Whether the mask moves no more: `end` is over, or one that shrinks has its final sparsity."""
        if self.row.shrinks:
            return self.mask.kept == sum(group.last for group in self._groups)
        return self.position >= self._times.end

    def release(self) -> None:
        """Move the mask no more; it stays held."""
        self._handle.remove()
        self._hear(False)
        if self._pause is not None:
            self._pause.resume(self.mask)
            self._pause = None

    def act_last(self) -> None:
        """Move the mask after all that hears of the optimiser's steps by now, such as a recipe that changes what they make."""
        self.hold.optimizer._optimizer_step_post_hooks.move_to_end(self._handle.id)  # type: ignore[attr-defined]

    remove = release  # what a hold calls when it is released itself

    def state_dict(self) -> dict[str, Any]:
        """Where this rewiring stands, its mask included, as tensors and plain values; see `state` of `anymask.rewire`."""
        first = [group.first for group in self._groups]
        where = {"position": self.position, "waiting": self._waiting, "first": first, "history": [asdict(m) for m in self.history]}
        return {**where, "settings": self._settings(), "mask": packed(self.mask)}

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Count a step of the optimiser, after which the hold has zeroed, and move the mask where that is due."""
        self.position += 1
        if self._due(self.position):
            self._pause = self._pause or Pause(self.hold.model, optimizer)
            self._waiting = not self._update(optimizer)
        self._listen()

    # -- inside ----------------------------------------------------------------------------------------------------
    def _due(self, step: int) -> bool:
        late = self._waiting and (self.row.shrinks or step < self._times.end)
        return late or self._times.due(step)

    def _update(self, optimizer: Optimizer) -> bool:
        """Move the mask; False where what it goes by is NaN, or the step was none: then after the next step."""
        gradients = self._gradients.mean() if self._gradients is not None else {}
        if self._unreadable(optimizer, gradients):
            return False
        passed, generator = self._times.passed(self.position), lots(self.seed, self.position)
        if self.row.shrinks:
            kept, fraction = self._shrunk(passed, generator)
        else:
            fraction = cosine(self.row.fraction, passed)
            kept = self._exchanged(fraction, gradients, generator)
        self._move(kept, fraction)
        return True

    def _exchanged(self, fraction: float, gradients: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Layer by layer; frozen layers, and those that got no gradient where it is asked for, are left alone."""
        self._check_heard(gradients)
        kept = dict(self.mask.items())
        for name, parameter in self.hold.parameters.items():
            there, gradient = kept[name], gradients.get(name)
            count = round(fraction * int(there.sum()))
            if count and parameter.requires_grad and not there.all() and (gradient is not None or not self._looks):
                kept[name] = exchange(self.row, parameter, there, count=count, gradient=gradient, generator=generator)
        return kept

    def _shrunk(self, passed: float, generator: torch.Generator) -> tuple[dict[str, Tensor], float]:
        """The largest of what is left in each group, at least one of each layer; and the share that goes."""
        kept = dict(self.mask.items())
        before = sum(int(t.sum()) for t in kept.values())
        for group in self._groups:
            weights = {name: self.hold.parameters[name] for name in group.names}
            count = cubic(group.first, group.last, passed)
            kept |= thin(weights, kept, count=count, generator=generator)
        return kept, 1 - sum(int(t.sum()) for t in kept.values()) / before

    def _move(self, kept: Mapping[str, Tensor], fraction: float) -> None:
        before = self.mask
        info = {**before.info, "rewire": self.row.name, "rewire_step": self.position}
        if self.row.shrinks:
            left = sum(int(t.sum()) for t in kept.values())
            info |= {"method": self.row.name, "scope": self.row.scope, "sparsity": 1 - left / before.total}
        after = Mask(kept, info=info).broadcast()
        self.hold.move(after)
        dropped = sum(int((before[name] & ~after[name]).sum()) for name in before)
        grown = sum(int((after[name] & ~before[name]).sum()) for name in before)
        self.history.append(Move(self.position, dropped, grown, fraction))

    @property
    def _looks(self) -> bool:
        return self.row.grow == "gradient"

    def _listen(self) -> None:
        """Hear gradients of the coming step alone, and only where the mask moves after it."""
        on = self._looks and self._due(self.position + 1)
        if self._pause is not None and not on:
            self._pause.resume(self.mask)
            self._pause = None
        if on:
            self._pause = self._pause or Pause(self.hold.model, self.hold.optimizer)
        self._hear(on)

    def _hear(self, on: bool) -> None:
        if self._gradients is not None:
            self._gradients.remove()
        self._gradients = DenseGradients(self.hold.parameters, self.mask) if on else None

    def _unreadable(self, optimizer: Optimizer, gradients: Mapping[str, Tensor]) -> bool:
        # Infinite gradients are the largest ones: at pruned places no GradScaler sees them, and they would come again and again.
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimiser is called for steps that GradScaler skips
        skipped = found_inf is not None and bool(found_inf)
        ranked = [*self.hold.parameters.values(), *gradients.values()]
        return on_any_rank([skipped or any(bool(t.isnan().any()) for t in ranked)], device=ranked[0].device)[0]

    def _check_heard(self, gradients: Mapping[str, Tensor]) -> None:
        if self._looks and not gradients:
            raise TechniqueError(
                f"{self.row.name} saw no gradient before optimiser step {self.position}",
                allowed="gradients that backward() brings to the parameters",
                fix="call backward() before each optimizer.step(), or choose 'set', which needs none",
            )

    def _settings(self) -> dict[str, Any]:
        last = [[list(group.names), group.last] for group in self._groups]
        return {**asdict(self.row), "times": asdict(self._times), "seed": self.seed, "last": last}

    def _resume(self, state: Mapping[str, Any]) -> None:
        mine, theirs = self._settings(), state["settings"]
        other = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        if other:
            raise SettingError(
                f"the state is of a rewiring with other {' and '.join(other)}",
                allowed="the method, settings, seed and total_steps that the state was saved with",
                fix="give the same ones, or begin anew without `state`",
            )
        if self._pause is not None:
            self._pause.resume(self.mask)
        self._pause = Pause(self.hold.model, self.hold.optimizer)
        self.hold.move(unpacked(state["mask"]))
        self.position, self._waiting = int(state["position"]), bool(state["waiting"])
        self.history = [Move(**move) for move in state["history"]]
        self._groups = tuple(Group(g.names, first, g.last) for g, first in zip(self._groups, state["first"], strict=True))
        self._listen()


def rewire(
    hold: Hold,
    method: str | Dynamic,
    *,
    total_steps: int,
    steps_per_epoch: int | None = None,
    sparsity: float | None = None,
    seed: int = 0,
    start: int = 0,
    state: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Rewiring:
    """Let the mask of `hold` move while any loop trains: the loop needs no further line, and a recipe may be attached before or after.

    After every `every`-th step of the optimiser, "set" and "rigl" drop in each layer the round(f * kept) smallest of its kept weights
    and grow as many others, at random or where the gradient of the loss is largest; f falls along a cosine from `fraction` to 0 at
    `end`. A weight that is grown begins at 0 with optimiser slots of 0; one that is dropped and at once grown again stays as it was.
    Each layer keeps as many weights as it had, exactly; full and frozen layers are left alone. "gmp" begins with a mask that keeps
    (nearly) all and drops the smallest until `sparsity` is reached at `end`, s = s_f + (s_i - s_f) (1 - t / t_end)^3, one weight of
    each layer being kept in any case. Equal scores are decided by lot, by `seed` and step, on the CPU.

    Where torch.distributed is initialised, gradients are averaged over ranks, and all take the mask of rank 0. An update that meets
    NaN in weights or gradients, or a step that GradScaler skipped, comes after the next step instead.

    Args:
        hold: of the mask to begin with; holds the mask as it moves (`hold.mask`). Its optimiser's steps are counted.
        method: a name in `DYNAMIC` ("set", "rigl", "gmp"), or a `Dynamic`.
        total_steps: optimiser steps of the whole training, >= 1.
        steps_per_epoch: needed when `every`, `begin` or `end` count epochs.
        sparsity: for gmp, which needs it, in [0, 1): of all weights of the mask together. The others keep what the mask has.
        seed: of random growth and of ties.
        start: the optimiser step that the training is at, in [0, total_steps); `state` knows its own.
        state: `state_dict()` of an earlier Rewiring, to go on from there, with its mask. Then load the model's and the optimiser's
            state dicts, after this call.
        settings: `every`, `fraction`, `end` ..., instead of the method's own; see `Dynamic`.

    Raises:
        UnknownName: for a method or setting that is not there.
        SettingError: for a number out of range, a sparsity too many or too few, no update at all, or a state of other settings.
        MaskError: for a hold that is released or rewired already, a mask with a pattern, one that covers a tensor twice or a
            parameter that another optimiser trains, one with nothing to move, or a budget that the mask cannot shrink to.

    Example:
        >>> import torch, anymask
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> hold = anymask.hold(anymask.prune(model, "random-erk", sparsity=0.75), model, optimizer)
        >>> rewiring = anymask.rewire(hold, "rigl", total_steps=20, every="5it")
        >>> for _ in range(20):
        ...     model(torch.randn(4, 8)).square().sum().backward(); optimizer.step(); optimizer.zero_grad()
        >>> [(move.step, round(move.fraction, 3)) for move in rewiring.history], int((model.weight != 0).sum())
        ([(5, 0.225), (10, 0.075)], 16)

    Reference: SET (arXiv 1707.04780), RigL (arXiv 1911.11134), gradual magnitude pruning (arXiv 1710.01878). Differs from the papers:
    RigL moves the mask instead of making the optimiser's step, here it moves after the step, by the gradient of that step. SET drops
    the smallest positive and the largest negative ones apart, as large a share at every epoch, and grows random values; here it is
    RigL with another grow score, as in RigL's own comparison.
    """
    row, seed = dynamic_of(method, settings), seed_of(seed, least=0)  # refused now, and not at the first update
    if not 0 <= start < total_steps:
        came = f"total_steps came as {total_steps} and start as {start}"
        raise SettingError(came, allowed="0 <= start < total_steps", fix="give total_steps=epochs * len(loader)")
    _check_hold(hold)
    _check_covered(hold)
    times = Times.of(row, total=total_steps, per_epoch=steps_per_epoch, start=start if state is None else 0)
    if not row.shrinks:
        _check_can_exchange(hold.mask, row, sparsity)
    groups = _groups(hold.mask, row, sparsity, going_on=state is not None) if row.shrinks else ()
    rewiring = Rewiring(hold, row, times=times, seed=seed, groups=groups, start=start)
    if state is not None:
        try:
            rewiring._resume(state)
        except BaseException:
            rewiring.release()
            raise
    return rewiring


def packed(mask: Mask) -> dict[str, Any]:
    """`mask` as tensors and a text, which `torch.load(weights_only=True)` reads.

    Example:
        >>> unpacked(packed(Mask({"w": torch.eye(2)}, info={"seed": 1}))).info
        {'seed': 1}
    """
    return {"kept": dict(mask.items()), "info": json.dumps(mask.info, default=str)}


def unpacked(state: Mapping[str, Any]) -> Mask:
    """The mask that `packed` took apart."""
    return Mask(state["kept"], info=json.loads(state["info"]))


def rewired(optimizer: Optimizer) -> Rewiring | None:
    """The rewiring that moves the mask which `optimizer` carries, if any."""
    hooks = optimizer._optimizer_step_post_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Rewiring)), None)


def _groups(mask: Mask, row: Dynamic, sparsity: float | None, *, going_on: bool) -> tuple[Group, ...]:
    """The layers that shrink together, and to what."""
    if sparsity is None:
        raise SettingError(f"{row.name} came without sparsity", allowed="a number in [0, 1)", fix="give sparsity=0.9 for 90% zeros")
    shapes, kept = {name: tuple(mask[name].shape) for name in mask}, {name: int(mask[name].sum()) for name in mask}
    count = keep_count(shapes, sparsity, pattern=pattern("unstructured"))
    alive = tuple(name for name in mask if kept[name])
    if count < len(alive):
        raise MaskError(
            f"sparsity {sparsity} keeps {count} weights in {len(alive)} layers",
            allowed="at least one weight a layer",
            fix="lower the sparsity, or leave layers out of the mask",
        )
    groups: tuple[Group, ...] = (Group(alive, mask.kept, count),)
    if row.scope != "global":
        last = layer_counts(shapes, count, distribution=row.scope, floor=1)
        groups = tuple(Group((name,), kept[name], last[name]) for name in mask)
    if not going_on:
        _check_can_shrink(groups, row, sparsity)
    return groups


def _check_can_shrink(groups: tuple[Group, ...], row: Dynamic, sparsity: float) -> None:
    short = [f"{', '.join(g.names)} ({g.first} of {g.last})" for g in groups if g.first < g.last]
    if short:
        raise MaskError(
            f"the mask keeps fewer weights than sparsity {sparsity} with scope {row.scope!r} leaves: {'; '.join(short)}",
            allowed="a mask that only has to lose weights",
            fix="begin with a denser mask, raise the sparsity, or give scope='global'",
        )
    if all(group.first == group.last for group in groups):
        raise MaskError(
            f"{row.name} finds nothing to drop at sparsity {sparsity}", allowed="a sparsity above the mask's", fix="raise the sparsity"
        )


def _check_can_exchange(mask: Mask, row: Dynamic, sparsity: float | None) -> None:
    if sparsity is not None:
        raise SettingError(
            f"sparsity came as {sparsity} with {row.name}",
            allowed=f"none: {row.name} keeps as many weights as its mask",
            fix="leave it out, and make the mask at that sparsity",
        )
    counts = {name: (int(mask[name].sum()), math.prod(mask[name].shape)) for name in mask}
    if not any(0 < kept < size and round(row.fraction * kept) for kept, size in counts.values()):
        raise MaskError(
            f"{row.name} finds nothing to move: each of the {len(mask)} layers is full, or round({row.fraction} * kept) is 0",
            allowed="a mask with pruned weights, and kept ones to exchange",
            fix="begin with a sparse mask, or raise `fraction`",
        )


def _check_hold(hold: Hold) -> None:
    if held(hold.optimizer) is not hold:
        raise MaskError("this hold was released", allowed="a hold that holds", fix="call anymask.hold again")
    if rewired(hold.optimizer) is not None:
        raise MaskError("this mask is rewired already", allowed="one rewiring for each hold", fix="call release() on the first one")
    form = hold.mask.info.get("pattern") or "unstructured"
    if form != "unstructured":
        raise MaskError(
            f"the mask has the pattern {form!r}, which single weights that move would break",
            allowed="an unstructured mask",
            fix="make the mask without a pattern, or hold it without rewiring it",
        )


def _check_covered(hold: Hold) -> None:
    names = defaultdict(list)
    for name, parameter in hold.parameters.items():
        names[id(parameter)].append(name)
    twice = [" and ".join(found) for found in names.values() if len(found) > 1]
    if twice:
        raise MaskError(f"the mask covers one tensor as {'; '.join(twice)}", allowed="each tensor once", fix="leave one of the names out")
    here = trained(hold.optimizer)
    others = [name for name, parameter in hold.parameters.items() if parameter.requires_grad and id(parameter) not in here]
    if others:
        raise MaskError(
            f"the optimiser of this hold does not train {', '.join(others)}",
            allowed="one optimiser for all parameters of the mask",
            fix="make the mask of this optimiser's parameters alone, or freeze the others",
        )
