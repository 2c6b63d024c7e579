"""Distillation: a trained network says what it thinks of each input, and the sparse one learns from that, too."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymask.errors import SettingError, TechniqueError
from anymask.prunables import bare
from anymask.registry import lookup
from anymask.schedules import Schedule
from anymask.surgery import logits_of
from anymask.techniques.base import LATER, Attached, Context, Technique

ASKS = ("always", "once")
PRECISIONS = ("same", "bfloat16")


@dataclass(frozen=True)
class Distillation(Technique):
    r"""The loss is shared with that of a teacher's outputs: of logits z of the network and v of the teacher, (N, C, ...),

        (1 - s * share) * loss + s * share * T^2 * KL(softmax(v / T) || softmax(z / T))

    with the temperature T and the strength s (constant 1 by default), averaged over all but the classes. The teacher computes the
    inputs that the network was last called with in training mode: in eval mode, in which it stays, and without gradients. It is not
    trained.

    Give it as `teacher=` to `Recipe.attach` or `fit`; `anymask compare` and its like train the dense network of the same seed, with the
    same protocol and the default recipe, once for all recipes.

    Args:
        share: of the loss that is the teacher's, in (0, 1].
        temperature: T > 0; the higher, the more the classes count that the teacher thinks unlikely.
        asks: "always", about each batch as the network sees it; or "once", about each image before the first step, mirrored and not,
            but not cropped: a pass over the images or two in place of one in each epoch. Only `fit`, and what is built on it, knows which
            images a batch is of; in other loops the teacher is asked always.
        precision: "same", that of the training; or "bfloat16", in which the teacher computes under autocast: two to four times as fast
            as in float32 where the hardware has it (GPUs, CPUs with AVX512-BF16 or AMX), and slower where not.

    Raises:
        SettingError: for numbers out of their range.
        TechniqueError: on attach, without a teacher; in training, where its outputs have another shape than the network's.

    Example:
        >>> import copy, torch
        >>> from anymask.techniques import Context
        >>> model, cross_entropy = torch.nn.Linear(1, 2), torch.nn.functional.cross_entropy
        >>> taught = Distillation(share=1.0).attach(Context(model, None, cross_entropy, teacher=copy.deepcopy(model)))
        >>> output, target = model(torch.ones(3, 1)), torch.tensor([0, 1, 1])
        >>> taught.loss(cross_entropy(output, target), output, target).item()  # of its like it learns nothing
        0.0

    Reference: Hinton et al. (arXiv 1503.02531); for sparse networks the precursor of ToST (arXiv 2101.03255v1), whose teacher is the dense
    network too. Share and temperature are ours. A teacher that is asked once is the "fixed teacher" of arXiv 2106.05237, which finds it the
    worse the longer the training.
    """

    name: ClassVar[str] = "distillation"
    seam: ClassVar[str] = "loss"
    about: ClassVar[str] = "a trained dense network's outputs are a part of the targets"
    paper: ClassVar[str] = "arXiv 1503.02531"
    taught: ClassVar[bool] = True

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    share: float = 0.7
    temperature: float = 4.0
    asks: str = field(default="always", metadata=LATER)
    precision: str = field(default="same", metadata=LATER)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SettingError(f"share came as {self.share}", allowed="a share in (0, 1]", fix="0.7 leaves the labels 0.3")
        if not self.temperature > 0:
            raise SettingError(f"temperature came as {self.temperature}", allowed="a number > 0", fix="4.0 is usual")
        lookup(dict.fromkeys(ASKS), self.asks, what="way to ask a teacher")
        lookup(dict.fromkeys(PRECISIONS), self.precision, what="precision of a teacher")

    def attach(self, context: Context) -> "_Taught":
        teacher = context.teacher.teacher if isinstance(context.teacher, Remembered) else context.teacher
        if context.teacher is None or teacher is None or bare(teacher) is context.model:
            raise TechniqueError(
                f"{self.name} got {'no teacher' if context.teacher is None else 'the network itself as its teacher'}",
                allowed="another, trained network that takes the same inputs and gives the same classes",
                fix=f"pass teacher=dense_model to Recipe.attach or fit, or leave {self.name} out of the recipe",
            )
        return _Taught(self, context.model, context.teacher.eval())

    def say(self, teacher: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The teacher's logits of these inputs, float32 or wider."""
        how: AbstractContextManager[Any] = nullcontext()
        if self.precision == "bfloat16":
            how = torch.autocast(next(teacher.parameters(), torch.empty(0)).device.type, torch.bfloat16)
        with torch.no_grad(), how:
            said = logits_of(teacher(*args, **kwargs))
        return said.to(torch.promote_types(said.dtype, torch.float32))


class Remembered(nn.Module):
    """A teacher that is asked about all samples when it is first called, and from then on says what it said of those that `look` names.

    Args:
        teacher: a network in eval mode.
        passes: over the samples, in their order; inputs in batches.
    """

    def __init__(self, teacher: nn.Module, passes: Sequence[Iterable[Tensor]]) -> None:
        super().__init__()
        self.teacher, self.passes = teacher, passes
        self.said: Tensor | None = None  # (passes, samples, C, ...)
        self.rows: tuple[Tensor, Tensor] | None = None

    def look(self, passes: Tensor, samples: Tensor) -> None:
        """The next batch is of these samples, in these passes: int64 (N,) each."""
        self.rows = passes, samples

    def forward(self, *_: Any) -> Tensor:
        """What was said of them, (N, C, ...)."""
        if self.said is None:
            self.said = torch.stack([torch.cat([logits_of(self.teacher(x)).float() for x in batches]) for batches in self.passes])
        return self.said[self.rows]


class _Taught(Attached):
    def __init__(self, settings: Distillation, model: nn.Module, teacher: nn.Module) -> None:
        self.settings, self.teacher = settings, teacher
        self.seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.handle = model.register_forward_pre_hook(self._look, with_kwargs=True)
        once = isinstance(teacher, Remembered)
        kind, size = type(teacher.teacher if once else teacher).__name__, sum(p.numel() for p in teacher.parameters())
        self.found = f"a {kind} of {size:,} parameters, asked {'once' if once else 'at each step'}"

    def loss(self, value: Tensor, output: Tensor, target: Tensor) -> Tensor:
        if not self.strength:
            return value
        share = self.strength * self.settings.share
        return (1 - share) * value + share * self.settings.temperature**2 * self._distance(output, target)

    def detach(self) -> None:
        self.handle.remove()
        self.seen = None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self.seen = args, kwargs

    def _distance(self, output: Tensor, target: Any) -> Tensor:
        """The mean divergence from what the teacher says of the inputs that were seen last; targets of -100 do not count."""
        if self.seen is None:
            raise TechniqueError(
                "distillation was asked for a loss before the network was called in training mode",
                allowed="recipe.loss of the output of model(inputs), after model.train()",
                fix="compute the output and its loss in turns",
            )
        (args, kwargs), self.seen = self.seen, None  # not kept: a batch may be large
        taught = self.settings.say(self.teacher, *args, **kwargs)
        if taught.dim() > 2 and taught.flatten(0, -2).shape == output.shape:  # of tokens, which a trainer's loss has in a row
            taught = taught.flatten(0, -2)
        if taught.shape != output.shape:
            raise TechniqueError(
                f"the teacher gave {tuple(taught.shape)} where the network gave {tuple(output.shape)}",
                allowed="outputs of one shape",
                fix="take a teacher of the same classes",
            )
        mine, theirs = (F.log_softmax(logits.float() / self.settings.temperature, dim=1) for logits in (output, taught))
        each = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(1)
        if isinstance(target, Tensor) and target.shape == each.shape and not target.is_floating_point():
            counts = target != -100  # summed, not picked out: a GPU would have to be waited for
            return each.masked_fill(~counts, 0).sum() / counts.sum()
        return each.mean()
