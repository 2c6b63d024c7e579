"""A callback for Lightning's Trainer: `pip install anymask[lightning]`."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.errors import MaskError, SettingError, TechniqueError
from anymask.holding import held
from anymask.integrations.shared import Batch, Session, Wanted, taken
from anymask.mask import Mask
from anymask.recipe import Recipe
from anymask.techniques import Loss


class AnyMask(Callback):
    """Hold a mask and train with a recipe under `lightning.Trainer`; checkpoints stay those of the plain network.

    Steps are counted at the optimiser, so accumulation changes nothing; validation sees the plain network; a resumed
    training goes on where it was. The same seed gives the same batches with and without a recipe.

    Args:
        mask: a Mask, the path of one, "zeros" (the weights that are 0 at the beginning stay 0), or None: the one that is
            held already, if any.
        recipe: a Recipe, the name of a preset such as "tost" or "tost:-lrsi", or None: the mask alone.
        network: name of the submodule that the mask and the recipe are for, such as "net". By default the module itself
            when it has a `forward`, else its only child with parameters.
        split: batch -> (inputs, target); by default the first two of a tuple or list.
        loss: (output, target) -> loss, which `self.loss` begins with.
        seed: for what techniques draw at random.
        teacher: a trained network, for recipes that learn from one (distillation); it is moved to where the network is.

    Raises:
        MaskError, TechniqueError, SettingError: when the training begins, as `anymask.hold` and `Recipe.attach` do.

    Example:
        >>> import anymask, torch
        >>> sparse = AnyMask("zeros", "tost:-label_smoothing")
        >>> sparse.wanted.recipe_itself().name
        'tost:-label_smoothing'
    """

    def __init__(
        self,
        mask: Mask | str | Path | None = None,
        recipe: Recipe | str | None = None,
        *,
        network: str | None = None,
        split: Callable[[Any], Batch] | None = None,
        loss: Loss = F.cross_entropy,
        seed: int = 0,
        teacher: nn.Module | None = None,
    ) -> None:
        self.wanted = Wanted(mask, recipe, loss, seed, teacher)
        self.wanted.recipe_itself()  # an unknown name is refused now
        self._network, self._split = network, split or first_two
        self.session: Session | None = None
        self._state: dict[str, Any] | None = None
        self._handle: Any = None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss to return from `training_step`: the base loss as the recipe changes it.

        Args:
            output: logits (N, C, ...).
            target: what the base loss takes.
        """
        return self.wanted.loss(output, target) if self.session is None else self.session.loss(output, target)

    # -- Lightning's hooks -----------------------------------------------------------------------------------------
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the mask and attach the recipe: weights, optimiser and this callback are restored by now."""
        self._close()
        network = _network_of(pl_module, self._network)
        optimizer = _optimizer_of(trainer, network)
        total, resumed = _total_steps(trainer), self._state if trainer.global_step else None
        loader: Any = trainer.train_dataloader
        batches = taken(loader, self.wanted.batches, split=self._split, move=trainer.strategy.batch_to_device)
        self.session = Session(
            self.wanted,
            network,
            optimizer,
            total_steps=total,
            steps_per_epoch=_per_epoch(trainer),
            batches=batches,
            state=resumed,
        )
        self._handle = optimizer.register_step_post_hook(lambda *_: self._stepped())

    def _stepped(self) -> None:
        if self.session is not None:
            self.session.step("return `callback.loss(output, target)` from training_step")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the techniques see what they have to see, of a compiled module, too."""
        if self.session is not None:
            self.session.watched(True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log strengths and sparsity."""
        if self.session is not None:
            self.session.watched(False)
            pl_module.log_dict(self.session.numbers(), on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the network is the plain one."""
        if self.session is not None:
            self.session.plain(True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The training goes on with the ghosts that live."""
        if self.session is not None:
            self.session.plain(False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave: the module is the plain one again."""
        if self._close():
            warnings.warn("the training ended before the ghosts of the recipe had faded; they were cut off", stacklevel=2)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave after an error or Ctrl-C; `state_dict` still tells where the training was."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave if nothing else did."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Part of Lightning's checkpoint."""
        if self.session is not None:
            return self.session.state_dict()
        return dict(self._state or {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Called by Lightning before the training goes on."""
        self._state = dict(state_dict) or None

    def _close(self) -> bool:
        session, self.session = self.session, None
        if session is None:
            return False
        self._state = session.state_dict()
        self._handle.remove()
        return session.close()


def first_two(batch: Any) -> Batch:
    """(inputs, target) of a batch that is a tuple or a list."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise SettingError(
            f"a batch of the train dataloader came as {type(batch).__name__}",
            allowed="a tuple or list of (inputs, target)",
            fix='tell which is which: AnyMask(..., split=lambda batch: (batch["image"], batch["label"]))',
        )
    return batch[0], batch[1]


def _network_of(module: LightningModule, name: str | None) -> nn.Module:
    if name is not None:
        return module.get_submodule(name)
    if type(module).forward is not LightningModule.forward:
        return module
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    if len(children) == 1:
        return children[0]
    raise SettingError(
        f"{type(module).__name__} has no forward, and {len(children)} submodules with parameters",
        allowed="a module with a forward, or one network in it",
        fix=f'say which: AnyMask(..., network="{next((n for n, _ in module.named_children()), "net")}")',
    )


def _optimizer_of(trainer: Trainer, network: nn.Module) -> Optimizer:
    mine = {id(p) for p in network.parameters()}
    optimizers = [getattr(o, "optimizer", o) for o in trainer.optimizers]
    found = [o for o in optimizers if held(o) is not None] or [
        o for o in optimizers if any(id(p) in mine for group in o.param_groups for p in group["params"])
    ]
    if len(found) != 1:
        raise MaskError(
            f"{len(found)} of {len(optimizers)} optimisers train the masked network",
            allowed="exactly one",
            fix='name the part that one of them trains: AnyMask(..., network="generator")',
        )
    return found[0]


def _total_steps(trainer: Trainer) -> int:
    total = trainer.estimated_stepping_batches
    if total == float("inf") or total < 1:
        raise TechniqueError(
            f"the trainer knows {total} steps", allowed="a training of known length", fix="give Trainer(max_epochs=) or max_steps="
        )
    return int(total)


def _per_epoch(trainer: Trainer) -> int | None:
    batches = trainer.num_training_batches
    return None if batches == float("inf") else max(1, -(-int(batches) // trainer.accumulate_grad_batches))
