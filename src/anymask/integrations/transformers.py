"""A callback for the Trainer of Hugging Face transformers: `pip install anymask[transformers]`."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from anymask.errors import FileFormatError, SettingError
from anymask.holding import innermost
from anymask.integrations.shared import Batch, Session, Wanted, taken
from anymask.mask import Mask
from anymask.prunables import bare
from anymask.recipe import Recipe
from anymask.runlog import atomic
from anymask.techniques import Loss

FILE = "anymask.pt"  # beside the trainer's own files in each checkpoint


class AnyMask(TrainerCallback):
    """Hold a mask and train with a recipe under `transformers.Trainer`; checkpoints stay those of the plain network.

    Steps are counted as the trainer counts them; outside its training steps (evaluation, checkpoints) the network is the plain
    one; a resumed training goes on where it was, from the file `anymask.pt` in the checkpoint. The same seed gives the
    same batches with and without a recipe.

    Args:
        mask: a Mask, the path of one, "zeros" (the weights that are 0 at the beginning stay 0), or None: the one that is
            held already, if any.
        recipe: a Recipe, the name of a preset such as "tost" or "tost:-lrsi", or None: the mask alone. One that changes the
            loss needs `Trainer(..., compute_loss_func=callback.loss)`.
        split: batch -> (inputs, target); by default "labels" is the target, and all else the inputs.
        loss: (logits, labels) -> mean loss, which `self.loss` begins with.
        checkpoint: the folder that is resumed from, where it is not `output_dir/checkpoint-N`.
        seed: for what techniques draw at random.
        teacher: a trained network, for recipes that learn from one (distillation); it is moved to where the network is.

    Raises:
        MaskError, TechniqueError, SettingError: when the training begins, as `anymask.hold` and `Recipe.attach` do.

    Example:
        >>> sparse = AnyMask("zeros", "tost:ghost_activation")
        >>> sparse.wanted.recipe_itself().name
        'tost:ghost_activation'
    """

    def __init__(
        self,
        mask: Mask | str | Path | None = None,
        recipe: Recipe | str | None = None,
        *,
        split: Callable[[Any], Batch] | None = None,
        loss: Loss = F.cross_entropy,
        checkpoint: str | Path | None = None,
        seed: int = 0,
        teacher: nn.Module | None = None,
    ) -> None:
        self.wanted = Wanted(mask, recipe, loss, seed, teacher)
        self.wanted.recipe_itself()  # an unknown name is refused now
        self._split, self._checkpoint = split or without_labels, checkpoint
        self.session: Session | None = None
        self._next_token = False  # whether the labels of a token are about the one after it

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """For `Trainer(compute_loss_func=callback.loss)`: the base loss as the recipe changes it.

        Args:
            outputs: the model's, with logits (N, C) or (N, T, C).
            labels: (N,) or (N, T); -100 is ignored. Those of causal language models are shifted by one token here, as their own loss
                does. Labels of numbers (N,) go with logits (N, 1), for a `loss` of regression.
            num_items_in_batch: labels of all the batches that make up one step; the loss is then this batch's share of theirs.
        """
        logits, labels = self._aligned(outputs if isinstance(outputs, Tensor) else outputs["logits"], labels)
        value = self.wanted.loss(logits, labels) if self.session is None else self.session.loss(logits, labels)
        return value if num_items_in_batch is None else value * ((labels != -100).sum() / num_items_in_batch)

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Those of tokens as (N * T, C) and (N * T,), each label about its logits; what is aligned already as it came."""
        if labels.is_floating_point() and logits.shape == (*labels.shape, 1):
            return logits.squeeze(-1), labels
        if labels.dim() < 2 or labels.dim() != logits.dim() - 1:
            return logits, labels
        if self._next_token:
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        return logits.flatten(0, -2), labels.flatten()

    def _base_loss(self) -> Loss:
        """The base loss, for techniques that ask for the loss of what the model gives by itself (LRsI)."""

        @wraps(self.wanted.loss)  # which label smoothing asks for
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return self.wanted.loss(*self._aligned(logits, labels))

        return loss

    def close(self) -> bool:
        """Leave a training that was interrupted; True when ghosts were cut off. The next training does so by itself."""
        session, self.session = self.session, None
        return False if session is None else session.close()

    # -- the trainer's events --------------------------------------------------------------------------------------
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See what the model's labels are about; it may be evaluated before it is trained."""
        model = kwargs.get("model")  # None where `model_init` is to make it
        inner = None if model is None else bare(model)
        self._next_token = isinstance(inner, PreTrainedModel) and inner.can_generate() and not inner.config.is_encoder_decoder

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hold the mask and attach the recipe: weights and optimiser are restored by now."""
        self.close()
        self.on_init_end(args, state, control, **kwargs)
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        # Accelerate's loader tells the accelerator how far it is; the one inside does not.
        base = getattr(loader, "base_dataloader", loader)
        self.session = Session(
            replace(self.wanted, loss=self._base_loss()),
            model,
            innermost(kwargs["optimizer"]),
            total_steps=state.max_steps,
            steps_per_epoch=max(1, -(-len(loader) // args.gradient_accumulation_steps)) if hasattr(loader, "__len__") else None,
            batches=taken(base, self.wanted.batches, split=self._split, move=partial(send_to_device, device=args.device)),
            state=self._resumed(args, state) if state.global_step else None,
        )
        self.session.plain(True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The ghosts act inside training steps alone: the trainer has no event before an evaluation."""
        if self.session is not None:
            self.session.plain(False)
            self.session.watched(True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimiser made a step."""
        if self.session is not None:
            self.session.watched(False)
            self.session.step("add Trainer(..., compute_loss_func=callback.loss)")
            self.session.plain(True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add strengths and sparsity to what is logged."""
        if self.session is not None:
            for place in (kwargs.get("logs"), state.log_history[-1] if state.log_history else None):
                if place is not None and "loss" in place:
                    place.update(self.session.numbers())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what a resumed training needs beside the trainer's own files."""
        folder = _folder(args, state)
        if self.session is not None and state.is_world_process_zero and folder.is_dir():
            with atomic(folder / FILE) as file:
                torch.save(self.session.state_dict(), file)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave: the model is the plain one again."""
        if self.close():
            warnings.warn("the training ended before the ghosts of the recipe had faded; they were cut off", stacklevel=2)

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        places = [Path(p) for p in (self._checkpoint, args.resume_from_checkpoint) if isinstance(p, str | Path)]
        file = next((p / FILE for p in [*places, _folder(args, state)] if (p / FILE).is_file()), None)
        if file is None:
            raise SettingError(
                f"the trainer resumed at step {state.global_step}, and no {FILE} is in {_folder(args, state)}",
                allowed="a checkpoint that was saved under this callback",
                fix="name its folder: AnyMask(..., checkpoint=path)",
            )
        saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if saved["recipe"]["position"] != state.global_step:
            raise FileFormatError(
                f"{file} is of step {saved['recipe']['position']} and the trainer resumed at {state.global_step}",
                allowed="the file of this very checkpoint",
                fix="name the folder that is resumed from: AnyMask(..., checkpoint=path)",
            )
        return saved


def without_labels(batch: Any) -> Batch:
    """(inputs, target) of a batch that is a mapping with "labels"."""
    if not hasattr(batch, "items") or "labels" not in batch:
        raise SettingError(
            f"a batch of the train dataloader came without labels, as {type(batch).__name__}",
            allowed='a mapping with "labels"',
            fix="tell which is which: AnyMask(..., split=lambda batch: (inputs, target))",
        )
    return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
