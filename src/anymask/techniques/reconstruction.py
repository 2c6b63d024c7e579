"""Reconstruction, as a technique: a training that begins with the trained dense network, pruned and refitted."""

from dataclasses import dataclass, field
from typing import ClassVar

from anymask.schedules import Schedule
from anymask.techniques.base import Attached, Context, Technique
from anymask.techniques.distillation import teacher_of
from anymask.techniques.refitting import Refit, reconstruct


@dataclass(frozen=True)
class Reconstruction(Technique):
    """The network begins as the trained dense one that is its teacher, pruned, with kept weights refitted by `reconstruct`.

    Before all else, weights and statistics become those of the teacher, whatever the network began with. Give the dense network as
    `teacher=` to `Recipe.attach` or `fit`, and `data`, or an `example` at least. `anymask compare` and its like take the network of
    `--weights`, or train the dense network of the same seed, once for all recipes.

    It is for a network that was trained and then pruned, with little time to train it again. A long training is better begun anew, or
    with the pruned weights as they are (docs/lab.md).

    Raises:
        TechniqueError: on attach: without a mask, a teacher, or data; when the teacher is another kind of network, or is pruned already.

    Example:
        >>> import copy, torch, anymask
        >>> _ = torch.manual_seed(0)
        >>> dense = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> model = copy.deepcopy(dense)
        >>> mask, optimizer = anymask.prune(model, "magnitude", sparsity=0.5), torch.optim.SGD(model.parameters(), lr=0.1)
        >>> held, recipe = anymask.hold(mask, model, optimizer), anymask.Recipe((Reconstruction(),))
        >>> recipe.attach(model, optimizer, total_steps=1, example=torch.randn(64, 8), teacher=dense).found["reconstruction"]
        '2 of 2 masked weights; of their outputs 31% was unexplained, now 20%'

    Reference: layer-wise least squares for a given mask, as in OBC (arXiv 2208.11580) and for large language models arXiv 2401.02938.
    """

    name: ClassVar[str] = "reconstruction"
    seam: ClassVar[str] = "init"
    about: ClassVar[str] = "begins as the trained dense network, each layer's kept weights refitted to its outputs"
    paper: ClassVar[str] = "arXiv 2208.11580"
    taught: ClassVar[bool] = True
    first: ClassVar[bool] = True  # ghosts would be refitted, too

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="0%", end="0%"))
    settings: Refit = field(default_factory=Refit)

    def attach(self, context: Context) -> Attached:
        mask, dense = context.needs_mask(self.name), teacher_of(context, self.name)
        data = [(context.needs_example(self.name),)] if context.data is None else context.data
        done = reconstruct(context.model, mask, dense=dense, data=data, settings=self.settings, seed=context.seed)
        attached = Attached()
        attached.found = f"{len(done.unexplained)} of {len(mask)} masked weights; {done}"
        return attached
