"""Smoothed labels."""

import inspect
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anymask.errors import SettingError, TechniqueError
from anymask.schedules import Schedule
from anymask.surgery import device_of
from anymask.techniques.base import Attached, Context, Technique


@dataclass(frozen=True)
class LabelSmoothing(Technique):
    r"""Cross-entropy against labels that give a share `eps` to the other classes.

    With C classes, log-probabilities l and true class y, averaged over samples,

        (1 - s*eps) * (-l_y) + s*eps / (C - 1) * sum over c != y of (-l_c)

    where s is the strength (constant 1 by default; give another `schedule` to fade it).

    Args:
        eps: share of the label that goes to the other classes, in (0, 1).

    Raises:
        TechniqueError: on attach, when the loss is not cross-entropy.

    Example:
        >>> import torch
        >>> from anymask.techniques import Context
        >>> model, cross_entropy = torch.nn.Linear(1, 2), torch.nn.functional.cross_entropy
        >>> smooth = LabelSmoothing(eps=0.1).attach(Context(model, None, cross_entropy))
        >>> output, target = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> value = cross_entropy(output, target)
        >>> [round(float(v), 3) for v in (value, smooth.loss(value, output, target))]
        [0.127, 0.327]

    Reference: ToST (arXiv 2206.12755), eps = 0.1. Differs from `torch.nn.CrossEntropyLoss(label_smoothing=eps)`, which
    puts eps/C on every class, the true one included: this form with eps is that one with eps * C / (C - 1).
    """

    name: ClassVar[str] = "label_smoothing"
    seam: ClassVar[str] = "loss"
    about: ClassVar[str] = "a share eps of each label goes to the other classes"
    paper: ClassVar[str] = "arXiv 2206.12755"

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="100%", end="100%"))
    eps: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise SettingError(f"eps came as {self.eps}", allowed="a share in (0, 1)", fix="0.1 is the paper's")

    def attach(self, context: Context) -> "_Smoothing":
        if inspect.unwrap(context.loss) is not F.cross_entropy:
            raise TechniqueError(
                f"label_smoothing on the loss {getattr(context.loss, '__name__', context.loss)!r}",
                allowed="torch.nn.functional.cross_entropy",
                fix="leave `loss` out of Recipe.attach, or leave label_smoothing out of the recipe",
            )
        return _Smoothing(self.eps, torch.ones((), device=device_of(context.model)))


class _Smoothing(Attached):
    def __init__(self, eps: float, level: Tensor) -> None:
        self.eps, self._level = eps, level
        self.found = f"eps {eps:g}"

    @property
    def recording(self) -> Hashable:
        return ()  # its strength is a tensor

    def set_strength(self, strength: float) -> None:
        self._level.fill_(strength)

    def loss(self, value: Tensor, output: Tensor, target: Tensor) -> Tensor:
        self._level = self._level.to(output.device)
        return value + self._level * self.eps * (_others(output, target) - value)


def _others(output: Tensor, target: Tensor) -> Tensor:
    """Mean of -l_c over the classes c other than the true one; output (N, C, ...), target (N, ...), -100 ignored.

    Where the target is the probabilities of classes, (N, C, ...), the mean over which one the true one is.
    """
    logs = F.log_softmax(output, dim=1)
    if target.is_floating_point():
        return ((logs * target).sum(1) - logs.sum(1)).mean() / (output.shape[1] - 1)
    true = logs.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    each = (true - logs.sum(1)) / (output.shape[1] - 1)
    valid = target != -100
    return (each * valid).sum() / valid.sum()
