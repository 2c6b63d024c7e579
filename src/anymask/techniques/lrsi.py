"""Layer-wise re-scaled initialisation, as a technique."""

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

import torch

from anymask.durations import Duration
from anymask.errors import SettingError
from anymask.schedules import Schedule
from anymask.surgery import evaluating, logits_of, run, samples
from anymask.techniques.base import Attached, Context, Technique
from anymask.techniques.batches import cut, plain
from anymask.techniques.rescale import RescaleSettings, rescale


@dataclass(frozen=True)
class LRsI(Technique):
    """One scale per parameter tensor, learned before the first step on the *masked* network (see `rescale`).

    The batches come from `data` of `Recipe.attach`. Where only an `example` is given, its labels are drawn uniformly
    (an untrained network knows nothing of the real ones either) and `found` says so.

    Args:
        settings: iterations, look-ahead step, gradient-norm bound and the rest, by their names in `RescaleSettings`.
        batches: how many batches of `data` are used, >= 1; they are kept in memory.
        at_most: a bound of the iterations in a short training, as a duration such as "5%" of its steps; an iteration costs
            2 to 7 steps.

    Raises:
        TechniqueError: on attach, when there is neither data nor an example, or the objective becomes non-finite.

    Example:
        >>> import torch
        >>> from anymask.techniques import Context
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> data = [(torch.randn(8, 4), torch.arange(8) % 2)]
        >>> LRsI().attach(Context(model, None, torch.nn.functional.cross_entropy, data=data, total_steps=100)).found
        '4 parameters, 5 iterations on 1 batches, real labels'

    Reference: ToST (arXiv 2206.12755); the objective is GradInit's (arXiv 2102.08098). Differs from the authors' code:
    there the scales are learned on the dense network before masking.
    """

    name: ClassVar[str] = "lrsi"
    seam: ClassVar[str] = "init"
    about: ClassVar[str] = "layer-wise re-scaled initialisation of the masked network"
    paper: ClassVar[str] = "arXiv 2206.12755"

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="0%", end="0%"))
    settings: RescaleSettings = field(default_factory=RescaleSettings)
    batches: int = 16
    at_most: str = "5%"

    def __post_init__(self) -> None:
        Duration.parse(self.at_most)
        if self.batches < 1:
            raise SettingError(f"batches came as {self.batches}", allowed="an integer >= 1", fix="16 is the default")

    def attach(self, context: Context) -> Attached:
        batches, labels = self._batches(context)
        settings = self._bounded(context)
        done = rescale(context.model, batches, mask=context.mask, loss=context.loss, settings=settings)
        attached = Attached()
        attached.found = f"{len(done.scales)} parameters, {settings.iterations} iterations on {len(batches)} batches, {labels}"
        return attached

    def _bounded(self, context: Context) -> RescaleSettings:
        most = max(1, Duration.parse(self.at_most).steps(total=context.total_steps, per_epoch=context.steps_per_epoch))
        return replace(self.settings, iterations=min(most, self.settings.iterations))

    def _batches(self, context: Context) -> tuple[list[Any], str]:
        if context.data is not None:
            return list(islice(context.data, self.batches)), "real labels"
        (x,) = plain((context.needs_example(self.name),))
        many = samples(x)
        with torch.no_grad(), evaluating(context.model):  # batch norm must not count it
            logits = logits_of(run(context.model, cut(x, 0, 2, of=many)))
        generator = torch.Generator().manual_seed(context.seed)
        drawn = torch.randint(logits.shape[1], (many, *logits.shape[2:]), generator=generator)
        return [(x, drawn.to(logits.device))], "labels drawn: no data was given"
