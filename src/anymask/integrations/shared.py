"""What every trainer's callback does: hold, attach, count steps, stay out of checkpoints, resume, leave."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.errors import MaskError
from anymask.formats import load_mask
from anymask.holding import held, hold
from anymask.mask import Mask
from anymask.prunables import prunable
from anymask.pruning.rewiring import packed, unpacked
from anymask.randomness import kept_random
from anymask.recipe import Recipe
from anymask.techniques import Loss

ZEROS = "zeros"  # in place of a mask: the weights that are 0 at the beginning
Batch = tuple[Any, Tensor]  # (inputs, target)


def of_zeros(model: nn.Module) -> Mask:
    """The mask of the prunable weights that are exactly 0 now: to fine-tune a pruned checkpoint without losing a zero.

    Args:
        model: any module with convolutions or linear layers.

    Raises:
        MaskError: when no weight is 0.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> of_zeros(model).sparsity
        0.5
    """
    kept = {name: weight.detach() != 0 for name, weight in prunable(model).items()}
    if all(bool(t.all()) for t in kept.values()):
        raise MaskError(
            f'mask="{ZEROS}" on a {type(model).__name__} without a single zero among its prunable weights',
            allowed="a model whose pruned weights are exactly 0",
            fix="load the pruned checkpoint first, or give a mask: anymask.prune(...), or a path",
        )
    return Mask(kept, info={"format": ZEROS})


@dataclass(frozen=True)
class Wanted:
    """What the user asked a callback for."""

    mask: Mask | str | Path | None = None
    recipe: Recipe | str | None = None
    loss: Loss = F.cross_entropy
    seed: int = 0
    teacher: nn.Module | None = None

    def mask_for(self, network: nn.Module) -> Mask | None:
        """The mask, read from its file or from the zeros of `network`."""
        if self.mask is None or isinstance(self.mask, Mask):
            return self.mask
        return of_zeros(network) if self.mask == ZEROS else load_mask(self.mask, model=network)

    def recipe_itself(self) -> Recipe:
        """The recipe; an empty one where none was asked for."""
        if self.recipe is None:
            return Recipe(name="none")
        return self.recipe if isinstance(self.recipe, Recipe) else Recipe.preset(self.recipe)

    @property
    def batches(self) -> int:
        """How many batches the techniques look at before the first step."""
        return max((getattr(t, "batches", 1) for t in self.recipe_itself().techniques), default=0)


class Session:
    """One training under a trainer's callback, from its begin to `close`.

    Checkpoints of the network and the optimiser stay those of the plain network while it lasts; what learned ghosts add to
    them is in `state_dict`. So they load with and without this package, before or after the recipe is attached.
    """

    def __init__(
        self,
        wanted: Wanted,
        network: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        steps_per_epoch: int | None,
        batches: Iterable[Batch],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.optimizer, self._whole = network, optimizer, False
        self._keys = set(network.state_dict())
        self._own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._plain, self._watched = ExitStack(), ExitStack()
        mask = wanted.mask_for(network) if state is None or state["mask"] is None else unpacked(state["mask"])
        self._hold = None
        if mask is not None and held(optimizer) is None:
            self._hold = hold(mask, network, optimizer)
        self._handles: list[Any] = [
            network.register_state_dict_post_hook(partial(self._strip_weights)),  # which sets an attribute of what it gets
            optimizer.register_state_dict_post_hook(self._strip_slots),
        ]
        try:
            self._attach(wanted, list(batches), total_steps=total_steps, steps_per_epoch=steps_per_epoch, state=state)
        except BaseException:
            self._let_go()
            raise

    def _attach(
        self, wanted: Wanted, batches: list[Batch], *, total_steps: int, steps_per_epoch: int | None, state: Mapping[str, Any] | None
    ) -> None:
        teacher = wanted.teacher
        if teacher is not None:  # the trainer has moved the network alone
            teacher = teacher.to(next(self.network.parameters()).device)
        self.running = wanted.recipe_itself().attach(
            self.network,
            self.optimizer,
            total_steps=total_steps,
            example=batches[0][0] if batches else None,
            data=batches or None,
            steps_per_epoch=steps_per_epoch,
            loss=wanted.loss,
            seed=wanted.seed,
            teacher=teacher,
            state=None if state is None else state["recipe"],
        )
        if state is not None:
            self._load_ghosts(state)

    # -- in the loop -----------------------------------------------------------------------------------------------
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of the recipe."""
        return self.running.loss(output, target)

    def step(self, line: str) -> None:
        """The optimiser made a step; `line` is what is to be added where the training does not use this loss."""
        if self.running.position >= self.running.total_steps:
            return  # some trainers finish the epoch that they are in
        self.running.check_loss(line)
        self.running.step()

    def plain(self, on: bool) -> None:
        """Make the network compute what the plain one would, until this is called with False."""
        self._plain.close()
        if on:
            self._plain.enter_context(self.running.plain())

    def watched(self, on: bool) -> None:
        """Let the techniques see what they have to see, until this is called with False."""
        self._watched.close()
        if on:
            self._watched.enter_context(self.running.watched())

    def numbers(self) -> dict[str, float]:
        """What is logged."""
        carried = held(self.optimizer)
        said = {f"anymask/strength/{name}": value for name, value in self.running.strengths.items()}
        return said if carried is None else {**said, "anymask/sparsity": carried.mask.sparsity}

    def close(self) -> bool:
        """Take everything away; True when a ghost was cut off before it had faded."""
        self.plain(False)
        self.watched(False)
        cut = any(t.seam == "model" and self.running.strengths.get(t.name, 0) > 0 for t in self.running.techniques)
        try:
            self.running.finish(early=True)
        finally:
            self._let_go()
        return cut

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._hold is not None:
            self._hold.release()

    # -- checkpoints -----------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Where this training stands: plain values and tensors, to be read with `weights_only=True`."""
        carried, self._whole = held(self.optimizer), True
        try:
            weights = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items() if k not in self._keys}
        finally:
            self._whole = False
        slots = [dict(self.optimizer.state.get(guest, {})) for guest in self._guests()]
        mask = None if carried is None else packed(carried.mask)
        return {"recipe": self.running.state_dict(), "mask": mask, "ghosts": weights, "slots": slots}

    def _load_ghosts(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["ghosts"], strict=False)
        for guest, saved in zip(self._guests(), state["slots"], strict=True):
            slots = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
            if slots:
                self.optimizer.state[guest] = {
                    k: v.to(guest.device) if isinstance(v, Tensor) and v.shape == guest.shape else v for k, v in slots.items()
                }

    def _guests(self) -> list[Tensor]:
        """The parameters of learned ghosts, in their order: in the optimiser now, and not there before."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if id(p) not in self._own]

    def _strip_weights(self, _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        if not self._whole:
            own = {prefix + key for key in self._keys}
            for key in [k for k in state if k.startswith(prefix) and k not in own]:
                del state[key]

    def _strip_slots(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups, slots = [], dict(state["state"])
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
            own = [id(p) in self._own for p in group["params"]]
            for place, mine in zip(saved["params"], own, strict=True):
                slots.pop(place, None) if not mine else None
            lists = {key: saved[key] for key in ("params", "param_names") if key in saved}
            groups.append({**saved, **{key: [x for x, mine in zip(xs, own, strict=True) if mine] for key, xs in lists.items()}})
        return {**state, "state": slots, "param_groups": groups}


# -- looking at data without being seen ----------------------------------------------------------------------------------


def taken(loader: Iterable[Any], count: int, *, split: Callable[[Any], Batch], move: Callable[[Any], Any]) -> list[Batch]:
    """The first `count` batches of a new pass over `loader`; the passes after it are the same as without this one."""
    if count < 1:
        return []
    with undisturbed(loader):
        return [split(move(batch)) for batch in islice(iter(loader), count)]


@contextmanager
def undisturbed(loader: Any) -> Iterator[None]:
    """Inside the block random numbers may be drawn and `loader` read; afterwards nobody can tell.

    Samplers and augmentations draw from the global generators of torch, numpy and Python, or from one of their own.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    generators = {id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)}
    before = [(g, g.get_state()) for g in generators.values()]
    workers = getattr(loader, "_iterator", None)  # persistent workers, in the middle of what they were asked for
    if workers is not None:
        loader._iterator = None
    try:
        with kept_random():
            yield
    finally:
        for generator, state in before:
            generator.set_state(state)
        if workers is not None:
            loader._iterator = workers
