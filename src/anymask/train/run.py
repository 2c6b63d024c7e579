"""One training: its moving parts, how they are saved and brought back, and what it gave."""

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anymask.data.batches import Batches, Fixed
from anymask.diagnostics import Diagnostics, sharpness
from anymask.errors import SettingError, TechniqueError
from anymask.holding import hold
from anymask.mask import Mask, digest
from anymask.pauses import arrive
from anymask.prunables import bare
from anymask.pruning import rewiring
from anymask.pruning.dynamic import Dynamic
from anymask.ranks import by_rank_0, leads, on_any_rank, ranks
from anymask.recipe import Recipe
from anymask.running import FORGOTTEN
from anymask.techniques.distillation import Distillation, Remembered
from anymask.train import checkpoint
from anymask.train.computing import Computing, compiled, compiling
from anymask.train.graphs import Recorder, rates_on_device
from anymask.train.settings import Protocol, autocast_dtype, set_lr
from anymask.train.sparsity import SparseLayers, slots_loaded, slots_stored, sparse_possible
from anymask.train.spread import Spread


@dataclass(frozen=True)
class Result:
    """What a training gave. Accuracies are shares in [0, 1]."""

    validation: float | None  # accuracy of the chosen checkpoint on validation data
    test: float | None  # accuracy of the chosen checkpoint on test data
    best_epoch: int  # the epoch (from 1) whose checkpoint was chosen: highest validation accuracy, the later one of equals
    last_validation: float | None
    last_test: float | None
    curves: dict[str, Any]
    """One value an epoch: train_loss, validation_accuracy, lr, strength; density, moved where the mask moves; diagnostics if asked."""
    seconds: float  # of training and validation, over all resumed parts
    found: dict[str, str] = field(default_factory=dict)  # what each technique applied to
    added: dict[str, int] = field(default_factory=dict)  # what ghosts added while they lived
    mask: Mask | None = None  # of the chosen checkpoint, whose zeros are the model's; None when it was trained dense
    sparse_layers: int = 0  # how many layers computed their kept weights alone while it trained; 0 for dense arithmetic

    def accuracies(self) -> dict[str, Any]:
        """The accuracies as plain values, for the ledger."""
        names = ("validation", "test", "best_epoch", "last_validation", "last_test")
        return {name: getattr(self, name) for name in names}


class Run:
    """The moving parts of one training, and how they are saved and brought back."""

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        *,
        mask: Mask | None,
        protocol: Protocol,
        first_step: int,
        file: str | Path | None,
    ) -> None:
        self.model, self.protocol = model, protocol
        self.file = None if file is None else Path(file)
        self.spread, self.probe = Spread(model), _cloned(next(train.epoch(0)))
        self.example, _, _ = self.spread.part(*self.probe)
        self.device = str(self.example.device)
        self.dtype = autocast_dtype(protocol.precision)
        self.per_epoch = math.ceil(len(train) / protocol.accumulate)
        self.total = protocol.epochs * self.per_epoch
        self.loss = torch.zeros((), device=self.device)  # summed on the device: nothing waits for it inside an epoch; on each rank its part
        self.progress: dict[str, Any] = {"step": first_step, "seconds": 0.0, "added": 0, "best": None}
        self.progress["curves"] = {"epoch": [], "train_loss": [], "validation_accuracy": [], "lr": [], "strength": {}}
        self.optimizer, self.rate = protocol.make_optimizer(model), protocol.lr
        self.hold = None if mask is None else hold(mask, model, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device, enabled=protocol.precision == "float16")
        self.layers = SparseLayers(model, self.optimizer)
        self.saved = 0.0, 0.0, -1  # when, what it took, after which step
        # Whatever stops a training (Ctrl-C in a forward pass, too), the model is plain and dense after it, without a hook.
        self.leaving = ExitStack()
        if self.hold is not None:
            self.leaving.callback(self.hold.release)
        self.leaving.callback(self.layers.leave)

    def begin(
        self,
        train: Batches,
        *,
        recipe: Recipe,
        teacher: nn.Module | None,
        moving: Dynamic | None,
        sparsity: float | None,
        seed: int,
        first_step: int,
        computing: Computing,
    ) -> None:
        """Convert the layers, attach the recipe, and go on from the checkpoint, if there is one. Within `leaving`."""
        moves, diagnose, p = moving is not None, computing.diagnose, self.protocol
        computing.check(device=self.device, precision=p.precision, accumulate=p.accumulate, masked=self.hold is not None, moves=moves)
        self.begun = {"mask": None if self.hold is None else digest(self.hold.mask), "seed": seed, "protocol": p.plain()}
        saved = None if self.file is None else checkpoint.load(self.file, device=self.device, begun=self.begun)
        # Before the recipe: its ghosts would hide which ReLU follows which norm, and LRsI makes the layers dense by itself.
        self._convert(computing.sparse, moves=moves, known=saved.get("sparse") if saved else None)
        self.remembered = _remembered(recipe, teacher, train)
        torch.manual_seed(seed)
        self.recipe = recipe.attach(
            self.model,
            self.optimizer,
            total_steps=self.total,
            steps_per_epoch=self.per_epoch,
            start=first_step,
            example=self.example[:2],
            data=Fixed(train),
            teacher=self.remembered or teacher,
            seed=seed,
            state=saved["recipe"] if saved else None,
        )
        self.leaving.callback(self.recipe.leave)
        self.rewiring = self._rewire(moving, sparsity=sparsity, seed=seed, start=first_step, saved=saved)
        if saved is not None:
            self._restore(saved)
        self.diagnose, self.watch = diagnose, self._watched(diagnose, saved)
        self.spread.begin()
        network = self.spread.network
        # CUDA graphs of PyTorch's own write each gradient where the last one is, which is wrong where several are added up.
        graphs = not computing.records and p.accumulate == 1
        self.forward = compiled(network, whole=len(self.example), graphs=graphs) if computing.compiles else network
        self.compiling = compiling if computing.compiles else nullcontext
        self.recorder = Recorder(self._make, device=self.device, compiled=lambda: FORGOTTEN["graphs"]) if computing.records else None
        self.leaving.callback(self._forget)
        if self.recorder is not None:
            rates_on_device(self.optimizer)  # after a checkpoint, which has numbers; ghosts join groups that are there
        self.seed = seed
        self.spread.draw(seed, self.step)
        self.strengths = self.recipe.strengths
        self.began = time.monotonic() - self.progress["seconds"]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.progress["step"])

    @property
    def first_batch(self) -> int:
        """Of its epoch, the batch that comes next before a step."""
        return self.step % self.per_epoch * self.protocol.accumulate

    def autocast(self) -> Any:
        """Mixed precision, where the protocol asks for it."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.split(":")[0], self.dtype)

    def look(self, train: Batches, epoch: int, batch: int) -> None:
        """Say which images the next batch is of, where a teacher was asked about them before."""
        if self.remembered is not None:
            samples, mirrored, _ = self.spread.part(*train.samples(epoch, batch))
            self.remembered.look(mirrored.long(), samples)

    def take(self, x: Tensor, y: Tensor, *, last: bool) -> None:
        """Add the gradients of one batch, and make a step if it is the `last` before one."""
        self.rate = self.protocol.lr_at(self.step, total=self.total, per_epoch=self.per_epoch)
        set_lr(self.optimizer, self.rate)
        if self.recorder is not None:
            if self.recorder.make(x, y, phase=self.recipe.recording):
                self.recipe.replayed()
        else:
            self._make(x, y, last=last)
        self.progress["added"] += 1
        if last:
            self._count()

    def _forget(self) -> None:
        """Let go of what was recorded; nothing that holds this one is left."""
        if self.recorder is not None:
            self.recorder.forget()
            self.recorder = None

    def _make(self, x: Tensor, y: Tensor, *, last: bool = True) -> None:
        """All that the device does."""
        self._add(x, y, last=last)
        if last:
            self._update()

    def _add(self, x: Tensor, y: Tensor, *, last: bool) -> None:
        x, y, weight = self.spread.part(x, y)
        with self.spread.adding(last=last), self.compiling():
            with self.autocast():
                with self.recipe.watched():
                    output = self.forward(x)
                loss = self.recipe.loss(output, y) * weight
            self.loss += loss.detach()
            self.scaler.scale(loss / self.protocol.accumulate).backward()

    def _update(self) -> None:
        if self.protocol.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.protocol.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _count(self) -> None:
        """A step was made."""
        self.strengths = self.recipe.strengths  # of the step that was just made
        self.recipe.step()
        self.progress["step"] += 1
        self.spread.draw(self.seed, self.step)

    def end_epoch(self, epoch: int, *, validation: Batches | None) -> None:
        """Evaluate and diagnose the plain network, remember the best one, and save."""
        curves = self.progress["curves"]
        self.spread.agree(self.loss)
        arrive()
        loss = float(self.loss) / self.progress["added"]
        if not math.isfinite(loss):
            raise TechniqueError(
                f"the training loss became {loss} in epoch {epoch + 1}",
                allowed="a finite loss",
                fix="lower lr, set clip=1, or leave out the techniques you added last",
            )
        self.loss.zero_()
        self.progress["added"] = 0
        with self.recipe.plain() as plain:
            score = None if validation is None else self.spread.accuracy(plain, validation)
            more = {} if self.watch is None else {"diagnostics": self._diagnosed(self.watch)}
        self._remember(score, epoch=epoch + 1)
        figures = {"epoch": epoch + 1, "train_loss": loss, "validation_accuracy": score, "lr": self.rate}
        _record(curves, {**figures, "strength": self.strengths, **more})
        if self.rewiring is not None:
            moved = sum(move.dropped for move in self.rewiring.history) - sum(curves.setdefault("moved", []))
            curves["moved"].append(moved)
            curves.setdefault("density", []).append(self.rewiring.mask.density)
        if not self._dear():
            self.save()

    def _remember(self, score: float | None, *, epoch: int) -> None:
        """Keep the weights, and a mask that moves, where they are the best so far; not before a mask that shrinks has its sparsity."""
        best = self.progress["best"]
        if self.rewiring is not None and self.rewiring.row.shrinks and not self.rewiring.settled:
            return
        if score is None or best is None or score >= best["validation"]:
            state = {k: v.detach().clone() for k, v in self.recipe.plain_state_dict().items()}
            mask = None if self.rewiring is None else rewiring.packed(self.rewiring.mask)
            self.progress["best"] = {"validation": score, "epoch": epoch, "model": state, "mask": mask}

    def finish(self, *, stop: int, test: Batches | None) -> Result:
        """The plain model with the chosen checkpoint's weights, and what it is worth."""
        self.spread.end()
        self._forget()
        self.recipe.finish(early=stop < self.total)
        self.layers.leave()
        self._check_shrunk(whole=stop == self.total)
        self.progress["seconds"] = time.monotonic() - self.began
        best, curves = self.progress["best"], self.progress["curves"]
        last_test = None if test is None else self.spread.accuracy(self.model, test)
        if best is not None:
            if self.hold is not None and best.get("mask") is not None:
                self.hold.move(rewiring.unpacked(best["mask"]))
            bare(self.model).load_state_dict(best["model"])
        if self.hold is not None:
            self.hold.release()
        return Result(
            validation=best["validation"] if best else None,
            test=None if test is None else self.spread.accuracy(self.model, test),
            best_epoch=best["epoch"] if best else 0,
            last_validation=curves["validation_accuracy"][-1] if curves["validation_accuracy"] else None,
            last_test=last_test,
            curves=curves,
            seconds=self.progress["seconds"],
            found=dict(self.recipe.found),
            added={"extra_parameters": self.recipe.added.parameters, "extra_flops": self.recipe.added.flops},
            mask=None if self.hold is None else self.hold.mask,
            sparse_layers=self.layers.count,
        )

    def _dear(self) -> bool:
        """Whether to save now would take over a twentieth of the time, as on a GPU, where an epoch may take less than its checkpoint."""
        at, took, _ = self.saved
        return self.device.startswith("cuda") and ranks() == 1 and time.monotonic() - at < 20 * took

    def save_what_is_new(self) -> None:
        """After an epoch that was too short to be saved, and after which the training stops."""
        if ranks() == 1 and self.saved[2] != self.step:
            self.save()

    def save(self) -> None:
        """Write the checkpoint file, if there is one: the same one for any number of ranks."""
        if self.file is None:
            return
        self.spread.agree(self.loss)
        if not leads():
            return
        began = time.monotonic()
        self.progress["seconds"] = time.monotonic() - self.began
        parts: dict[str, Any] = {"model": self.model, "scaler": self.scaler, "recipe": self.recipe}
        if self.rewiring is not None:
            parts["rewiring"] = self.rewiring
        if self.watch is not None:
            parts["diagnostics"] = self.watch
        state = {name: part.state_dict() for name, part in parts.items()}
        state["optimizer"] = slots_stored(self.model, self.optimizer)
        how = {"sparse": self.layers.names, "diagnose": self.diagnose, "begun": self.begun}
        checkpoint.save(self.file, {**state, "loss": self.loss, "progress": self.progress, **how})
        self.saved = time.monotonic(), time.monotonic() - began, self.step

    def _convert(self, sparse: str, *, moves: bool, known: list[str] | None) -> None:
        where: dict[str, Any] = {"device": self.device, "precision": self.protocol.precision, "model": self.model}
        possible = sparse_possible(sparse, **where, masked=self.hold is not None, moves=moves)
        if self.hold is None or on_any_rank([not possible], device=self.example.device)[0]:
            return
        how: dict[str, Any] = {"mask": self.hold.mask, "example": self.example, "measure": sparse == "auto"}
        chosen = by_rank_0(lambda: self.layers.enter(**how, known=known))  # each rank would measure something else
        if not leads():
            self.layers.enter(**how, known=chosen)

    def _rewire(
        self, moving: Dynamic | None, *, sparsity: float | None, seed: int, start: int, saved: dict[str, Any] | None
    ) -> rewiring.Rewiring | None:
        state = saved.get("rewiring") if saved is not None else None
        if saved is not None and (moving is None) != (state is None):
            raise SettingError(
                f"the checkpoint {self.file} is of a training {'without' if state is None else 'with'} rewire",
                allowed="the rewire that it was begun with",
                fix="give the same one, or remove the file to train from the start",
            )
        if moving is None or self.hold is None:
            return None
        how: dict[str, Any] = {"total_steps": self.total, "steps_per_epoch": self.per_epoch, "start": start}
        return rewiring.rewire(self.hold, moving, **how, sparsity=sparsity, seed=seed, state=state)

    def _watched(self, diagnose: str, saved: dict[str, Any] | None) -> Diagnostics | None:
        begun = diagnose if saved is None else saved["diagnose"]
        if begun != diagnose:
            raise SettingError(
                f"the checkpoint {self.file} is of a training with diagnose={begun!r}, and {diagnose!r} came",
                allowed="the diagnose that it was begun with, whose start and curves it holds",
                fix="give the same one, or remove the file to train from the start",
            )
        if diagnose == "off":
            return None
        watch = Diagnostics(self.model, self.optimizer, self.probe[0])  # of the whole batch on every rank
        self.leaving.callback(watch.remove)
        if saved is not None:
            watch.load_state_dict(saved["diagnostics"])
        return watch

    def _diagnosed(self, watch: Diagnostics) -> dict[str, Any]:
        """What there is to say of this epoch; the sharpness is that of the plain loss, whatever techniques do to it."""
        found = watch.epoch()
        if self.diagnose == "sharpness":
            mask = None if self.hold is None else self.hold.mask
            value = sharpness(self.model, *self.probe, mask=mask)
            found["sharpness"] = value if math.isfinite(value) else None
        return found

    def _check_shrunk(self, *, whole: bool) -> None:
        if whole and self.rewiring is not None and self.rewiring.row.shrinks and not self.rewiring.settled:
            raise TechniqueError(
                f"{self.rewiring.row.name} ended at sparsity {self.rewiring.mask.sparsity:.4f}, before its last update",
                allowed="an end that leaves room for steps which GradScaler skips",
                fix="give an earlier `end`, such as '75%'",
            )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        slots_loaded(self.model, self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.loss, self.progress = saved["loss"], saved["progress"]
        checkpoint.restore_random(saved)


def _remembered(recipe: Recipe, teacher: nn.Module | None, train: Batches) -> Remembered | None:
    """The teacher, to be asked about the images once; None where no technique wants that."""
    if teacher is None or not any(isinstance(t, Distillation) and t.asks == "once" for t in recipe.techniques):
        return None
    return Remembered(teacher, [train.plain(mirrored=mirrored) for mirrored in (False, True)[: 1 + train.mirrors]])


def _cloned(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`batch` by itself: it may be a part of many."""
    return batch[0].clone(), batch[1].clone()


def _record(curves: dict[str, Any], values: dict[str, Any]) -> None:
    """Append each value to the curve of its name; names may be within names."""
    for name, value in values.items():
        if isinstance(value, dict):
            _record(curves.setdefault(name, {}), value)
        else:
            curves.setdefault(name, []).append(value)
