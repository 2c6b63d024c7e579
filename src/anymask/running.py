"""A recipe in a training: its strengths, its loss, where it stands, and how it leaves."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from anymask.errors import SettingError, TechniqueError
from anymask.holding import evaluated, held
from anymask.interrupts import uninterrupted
from anymask.mask import Mask
from anymask.pauses import arrive
from anymask.prunables import bare, how_spread
from anymask.surgery import Cost, changes, check_targets, form, logits_of
from anymask.techniques import Attached, Context, Technique
from anymask.techniques.base import refusal, settings_of

_STATE_HOOKS = re.compile(r"'_(load_)?state_dict_\w+': \d+(, )?")  # in a fingerprint
FORGOTTEN: Counter[str] = Counter()  # how often all "graphs" that torch.compile made in this process were
PATIENCE = 20  # steps in a row that a GradScaler may skip: it begins at 2**16 and halves
MARK = "_anymask_recipe"  # an attribute of the model while a recipe is attached to it; empty in copies, which carry none


class _Name(str):
    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return str, ()


class RunningRecipe:
    """A recipe in a training: call `loss` and `step` in the loop, and `finish` after it. Made by `Recipe.attach`."""

    def __init__(
        self,
        techniques: tuple[Technique, ...],
        context: Context,
        *,
        name: str,
        remedy: Callable[[Iterable[str]], str],
        state: Mapping[str, Any] | None,
    ) -> None:
        self.techniques, self.total_steps, self.per_epoch = techniques, context.total_steps, context.steps_per_epoch
        self.position = context.start if state is None else self._resumed(state)
        self.found: dict[str, str] = dict(state["found"]) if state else {}  # those that are gone already are not found again
        self.added = Cost()
        self.model = context.model  # as it was given (within torch.compile or DistributedDataParallel), with its ghosts while they live
        context = replace(context, model=bare(context.model))
        self._context, self._before = context, form(context.model, dense=True)
        self._hold, self._remedy = held(context.optimizer), remedy
        self._live: dict[str, tuple[Technique, Attached]] = {}
        self._handles: list[Any] = []  # of the optimiser's hooks
        self._settled = False  # while the model is as `plain` gives it
        self._asked = False  # whether anybody has called `loss`
        self._waits: int | None = 0  # steps that were told of while none was heard; None once one was
        self._strengths = {t.name: self.strength(t, self.position) for t in techniques if t.seam != "init"}
        weights: list[tuple[nn.Parameter, Tensor]] = []
        try:
            vars(context.model)[MARK] = _Name(name)
            if state is None and any(t.seam == "init" for t in techniques):
                weights = [(parameter, parameter.detach().clone()) for parameter in context.model.parameters()]
            self._join_all(fresh=state is None)
            self._live = dict(sorted(self._live.items(), key=lambda item: item[1][0].depth))
            self._listen()
            if state is not None:
                self.added = Cost(**state["added"])
                for technique, part in state.get("parts", {}).items():
                    attached = self._live[technique][1]
                    attached.load_state_dict(part)
                    self.found[technique] = attached.found
            _forget_graphs()
        except BaseException:
            self.leave()
            for parameter, value in weights:
                parameter.detach().copy_(value)
            raise

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of each technique that fades, at this step."""
        return dict(self._strengths)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the forward pass of a step in a loop that compiles: where a technique has to see it, torch.compile stays out inside.

        Example:
            >>> import torch, anymask
            >>> model = torch.nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> running = anymask.Recipe.preset("tost").only("label_smoothing").attach(model, optimizer, total_steps=9)
            >>> with running.watched():  # where `torch.compile(model)` may be called
            ...     model(torch.ones(1, 1)).shape
            torch.Size([1, 1])
        """
        seen = any(attached.looks for _, attached in self._live.values())
        if seen:
            arrive()  # a look waits for the device; and the stance is one of the process, so nobody else goes on inside
        with torch.compiler.set_stance("force_eager") if seen and _compiles() else nullcontext():
            yield

    @property
    def recording(self) -> Hashable | None:
        """What a recorded step (a CUDA graph of all that the device does in one) is good for: for as long as this stays the same.

        None where the next step cannot be a recorded one. Call `replayed` in place of what a recording stands for.
        """
        kinds = [(name, None if attached.looks else attached.recording) for name, (_, attached) in self._live.items()]
        return None if any(kind is None for _, kind in kinds) else tuple(kinds)

    def replayed(self) -> None:
        """A recording was replayed: forward, backward and the optimiser's step, of which no technique has heard. `step` follows."""
        self._waits = None
        for _, attached in self._live.values():
            attached.replayed()

    def strength(self, technique: Technique, step: int) -> float:
        """The strength, in [0, 1], of `technique` at optimiser step `step`."""
        return technique.schedule.strength(step, total=self.total_steps, per_epoch=self.per_epoch)

    def loss(self, output: Any, target: Any) -> Tensor:
        """The loss to train with: the base loss as the techniques change it.

        Args:
            output: the model's output, (N, C, ...) logits for cross-entropy; or a mapping or ModelOutput with `logits`, or a
                tuple that begins with them.
            target: what the base loss takes.

        Raises:
            DataError: at the first call, when `attach` was left with cross entropy and the targets are no classes.
        """
        output = logits_of(output)
        if not torch.compiler.is_compiling() and not self._asked:
            check_targets(self._context.loss, output, target)
        self._asked = True
        value = self._context.loss(output, target)
        for _, attached in self._live.values():
            value = attached.loss(value, output, target)
        return value

    def step(self) -> None:
        """Tell the recipe that the optimiser made a step.

        Raises:
            TechniqueError: when called more often than `total_steps`, or when the recipe has no part in the training: what changes the
                loss, where nobody asked `loss` before the first step; what works on the optimiser's steps, where none of 20 was heard.
        """
        if self.position >= self.total_steps:
            raise TechniqueError(
                f"step() was called more than total_steps = {self.total_steps} times",
                allowed="one call after each step of the optimiser",
                fix="give the true total_steps to attach",
            )
        self.check_loss("call backward() on what `recipe.loss(output, target)` gives")
        if self._waits is not None and self._handles:
            self._waits += 1
            self._check_heard(PATIENCE)
        self.position += 1
        for technique in sorted(self.techniques, key=lambda technique: technique.depth):
            self._move(technique)

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        """Inside the block the model computes what the plain one would: for evaluation in the middle of training.

        Example:
            >>> import torch, anymask
            >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU())
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> running = anymask.Recipe.preset("tost").only("ghost_activation").attach(model, optimizer, total_steps=9)
            >>> with running.plain():
            ...     bool((model(torch.randn(5, 1)) >= 0).all())
            True
        """
        if self._settled:  # within another such block
            yield self.model
            return
        self._settled = True
        for _, attached in self._live.values():
            attached.settle()
        try:
            yield self.model
        finally:
            self._settled = False
            for technique, attached in reversed(self._live.values()):
                attached.unsettle()
                attached.set_strength(self._strengths[technique.name])

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the model inside its wrappers, without what ghosts add to it."""
        ghosts = tuple(f"{name}." if name else "" for name in self._ghost_names())
        with self.plain():
            state = {key: value for key, value in self._context.model.state_dict().items() if not key.startswith(ghosts or ("\0",))}
            if any(technique.seam == "step" for technique, _ in self._live.values()):  # which may train other weights than these
                state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        return state

    def finish(self, *, early: bool = False) -> nn.Module:
        """Take away what is left of the recipe and return the plain model.

        Args:
            early: allow it before the ghosts have faded (they are cut off at the strength they have).

        Raises:
            TechniqueError: when ghosts have not faded yet, when anything of the recipe is left behind, when the zeros of the model
                are not the mask's, or when no step of the optimiser was heard of.
        """
        ghosts = [t.name for t, _ in self._live.values() if t.seam == "model" and self._strengths[t.name] > 0]
        if ghosts and not early:
            raise TechniqueError(
                f"finish() at step {self.position} of {self.total_steps}, where {', '.join(ghosts)} still act",
                allowed="finish() after the ghosts have faded",
                fix="call step() after each optimiser step, give the true total_steps, or finish(early=True) to cut them off",
            )
        try:
            if not early:
                self._check_heard(2)
        finally:
            self.leave()
        self._check_plain()
        return self.model

    def leave(self) -> None:
        """Take away what is left of the recipe, whatever there is: for a training that ends by an error. `finish` also checks."""
        with uninterrupted():
            for _, attached in self._live.values():  # perturbations leave before averages, which are left in the model
                attached.detach()
            if any(technique.seam == "model" for technique, _ in self._live.values()):
                _forget_graphs()
            for handle in self._handles:
                handle.remove()
            self._live, self._handles = {}, []
            vars(self._context.model).pop(MARK, None)

    def check_loss(self, fix: str) -> None:
        """Refuse a training in which what changes the loss does nothing, after its first step; `fix` mends it."""
        names = () if self._asked else [name for name, (technique, _) in self._live.items() if technique.seam == "loss"]
        if names:
            raise TechniqueError(
                f"{', '.join(names)} changes the loss, and the first step did not ask for it",
                allowed="a training that uses the loss of the recipe",
                fix=f"{fix}; or {self._remedy(names)}",
            )

    def state_dict(self) -> dict[str, Any]:
        """Where this recipe stands, as plain values; see `state` of `Recipe.attach`."""
        where = {"position": self.position, "total_steps": self.total_steps, "techniques": settings_of(self.techniques)}
        parts = {name: part for name, (_, attached) in self._live.items() if (part := attached.state_dict())}
        return {**where, "found": dict(self.found), "added": asdict(self.added), **({"parts": parts} if parts else {})}

    # -- inside ----------------------------------------------------------------------------------------------------
    def _resumed(self, state: Mapping[str, Any]) -> int:
        mine = {"total_steps": self.total_steps, "techniques": settings_of(self.techniques)}
        if other := [key for key, value in mine.items() if state.get(key) != value]:
            raise SettingError(
                f"the state is of a recipe with other {' and '.join(other)}",
                allowed="the recipe and total_steps that the state was saved with",
                fix="attach the same recipe, or begin anew without `state`",
            )
        return int(state["position"])

    def _join_all(self, *, fresh: bool) -> None:
        """Attach each technique in order; what they refuse is said at once, of all of them."""
        refused: dict[str, TechniqueError] = {}
        for technique in self.techniques:
            try:
                self._join(technique, fresh=fresh)
            except TechniqueError as error:
                refused[technique.name] = error
        if refused:
            raise refusal(refused, of=len(self.techniques), remedy=self._remedy(refused))

    def _join(self, technique: Technique, *, fresh: bool) -> None:
        if technique.seam == "init" and not fresh:
            return  # its work is in the weights that are loaded next
        strength = self._strengths.get(technique.name)
        if strength == 0:
            return
        self._context.needs_real(technique)
        with nullcontext() if technique.seam == "init" else uninterrupted():  # rescaling takes its time, and leaves nothing but weights
            attached = technique.attach(self._context)
            self.found[technique.name] = attached.found
            self.added = self.added + attached.added
            if strength is not None:
                self._live[technique.name] = (technique, attached)
                attached.set_strength(strength)
        if attached.added.parameters and (how := how_spread(self.model)):
            raise TechniqueError(
                f"{technique.name} adds parameters to a model {how}, which does not know of them",
                allowed="techniques without parameters of their own on a model that is spread already",
                fix='attach before wrapping, or take kind = "free" where there is one',
            )

    def _listen(self) -> None:
        """Hear of the optimiser's steps, for as long as a technique works on them."""
        optimizer = self._context.optimizer
        names = [technique.name for technique, _ in self._live.values() if technique.seam == "step"]
        if optimizer is None or not names:
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TechniqueError(
                f"{', '.join(names)} got LBFGS, which looks at several gradients within one step",
                allowed="optimisers that make one step from one gradient",
                fix=f"take another optimiser, or {self._remedy(names)}",
            )
        self._handles = [optimizer.register_step_pre_hook(self._stepping), optimizer.register_step_post_hook(self._stepped)]
        carried = held(optimizer)
        if carried is not None:  # a mask moves by the weights that the whole step has made of them
            carried.act_last()
        self._handles.append(optimizer.register_step_post_hook(self._moved))

    def _check_heard(self, patience: int) -> None:
        if self._handles and (self._waits or 0) >= patience:
            names = [technique.name for technique in self.techniques if technique.seam == "step"]
            kind = type(self._context.optimizer).__name__
            raise TechniqueError(
                f"{', '.join(names)} heard of no step of this {kind}, and step() was called {self._waits} times",
                allowed="the optimiser whose own step() changes the weights",
                fix="call step() once after each step of the optimiser, not for each batch; where steps have other names (first_step of "
                "SAM), give hold and attach the optimiser inside",
            )

    def _stepping(self, _optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Tell techniques of the step to come; its closure (Lightning gives one) is run first, for they work on the gradients."""
        self._waits = None
        given = evaluated(args, kwargs)
        for technique, attached in list(self._live.values()):
            if technique.seam == "step":
                attached.before_update()
        return given

    def _stepped(self, *_: Any) -> None:
        """After a step in the reverse order, as brackets close."""
        for technique, attached in reversed(list(self._live.values())):
            if technique.seam == "step" and technique.depth > 0:
                attached.after_update()

    def _moved(self, *_: Any) -> None:
        """After a mask has moved that was rewired before: what perturbs weights until the next step."""
        for technique, attached in reversed(list(self._live.values())):
            if technique.seam == "step" and technique.depth == 0:
                attached.after_update()

    def _move(self, technique: Technique) -> None:
        strength = self.strength(technique, self.position)
        if strength == self._strengths.get(technique.name, strength):
            return
        self._strengths[technique.name] = strength
        if technique.name in self._live:
            _, attached = self._live[technique.name]
            attached.set_strength(strength)
            if strength == 0:
                with uninterrupted():
                    attached.detach()
                    del self._live[technique.name]
                if technique.seam == "model":
                    _forget_graphs()

    def _check_plain(self) -> None:
        before, after = self._before, form(self._context.model, dense=True)
        if how_spread(self.model).startswith("cut"):  # fully_shard adds its hooks to state dicts in the first forward pass
            before, after = ({key: _STATE_HOOKS.sub("", line) for key, line in found.items()} for found in (before, after))
        if changed := changes(before, after):
            raise TechniqueError(
                f"the model is not what it was before attach: {', '.join(changed[:8])}",
                allowed="the same modules, parameters, buffers and hooks",
                fix="undo what the loop changed in between, if it did; the recipe has left, and the weights are as they were trained",
            )
        mask = self._mask_now()
        if revived := [] if mask is None else mask.revived(self.model):
            raise TechniqueError(
                f"pruned weights are not 0 in {', '.join(revived)}",
                allowed="exact zeros wherever the mask says so",
                fix="call anymask.hold(mask, model, optimizer) before the loop",
            )

    def _mask_now(self) -> Mask | None:
        """The mask that is held, which may have moved since `attach`, and may have been released; else the one that was given."""
        carried = held(self._context.optimizer) or self._hold
        return self._context.mask if carried is None else carried.mask

    def _ghost_names(self) -> set[str]:
        before = {key.removeprefix("module ") for key in self._before if key.startswith("module ")}
        return {name for name, _ in self._context.model.named_modules(remove_duplicate=False)} - before


def _forget_graphs() -> None:
    """Let torch.compile look again: its graphs do not notice a hook that came or went (skip_nnmodule_hook_guards)."""
    if _compiles():
        torch.compiler.reset()
        FORGOTTEN["graphs"] += 1


def _compiles() -> bool:
    return "torch._dynamo.eval_frame" in sys.modules
