"""What `hold` and a recipe cost of a training step, at strength 1 and after the ghosts are gone: medians of alternating repeats, as ratios.

    python benchmarks/overhead.py        on a quiet machine, about 6 minutes; writes results/overhead.json

Memory is what autograd saves between forward and backward, each storage counted once, and what hold and recipe themselves keep.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import Record, arguments, in_turns

from anymask import Recipe, hold, models, prune
from anymask.holding import held

CASES: dict[str, tuple[str, int, int, bool]] = {  # network, batch, rounds, compiled
    "resnet20": ("resnet20", 128, 61, False),
    "vgg11": ("vgg11", 128, 21, False),
    "resnet20, compiled": ("resnet20", 128, 31, True),
}
TINY = {"resnet8": ("resnet8", 4, 2, False)}
VARIANTS: dict[str, tuple[bool, int | None]] = {  # name -> (held, the recipe's step out of 10^6)
    "plain": (False, None),
    "plain again": (False, None),  # how far two equal steps differ here
    "hold": (True, None),
    "hold + recipe at strength 1": (True, 0),
    "hold + recipe after its ghosts": (True, 10**6 - 10**4),
}


class Stepper:
    """One training, a step at a time."""

    def __init__(self, name: str, batch: int, *, holds: bool, at: int | None, compiled: bool) -> None:
        self.model: nn.Module = models.build(name, classes=10, seed=0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mask = prune(self.model, "random-erk", sparsity=0.95, seed=0)
        mask.apply(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        if holds:
            hold(mask, self.model, self.optimizer)
        self.x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        self.y = torch.arange(batch) % 10
        self.running = None
        if at is not None:
            recipe = Recipe.preset("tost:-lrsi")  # lrsi is before the first step
            self.running = recipe.attach(self.model, self.optimizer, total_steps=10**6, example=self.x[:2], start=at)
        # Each training has its own compiled code: with one function for all, the limit of recompilations would be met.
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if compiled else self.model

    def loss(self) -> Tensor:
        output = self.forward(self.x)
        return self.running.loss(output, self.y) if self.running else F.cross_entropy(output, self.y)

    def step(self) -> None:
        """Make one step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.running:
            self.running.step()

    def megabytes(self) -> float:
        """What autograd saves for the backward pass, and what hold and recipe keep beside it."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        loss.backward()
        self.optimizer.zero_grad()
        carried = held(self.optimizer)
        kept = sum(t.nbytes for t in carried._kept.values()) if carried else 0
        return (sum(saved.values()) + kept) / 1e6


def measure(model: str, batch: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """All variants, in turns."""
    torch._dynamo.reset()
    steppers = {kind: Stepper(model, batch, holds=holds, at=at, compiled=compiled) for kind, (holds, at) in VARIANTS.items()}
    for stepper in (*steppers.values(), *steppers.values()):  # which warms up, and compiles
        stepper.step()
    took = in_turns({kind: stepper.step for kind, stepper in steppers.items()}, rounds=rounds)
    plain = median(took["plain"])
    return {
        "model": model,
        "batch": batch,
        "compiled": compiled,
        "repeats": rounds,
        "seconds of a plain step": round(plain, 4),
        "ratios": {kind: round(median(seconds) / plain, 4) for kind, seconds in took.items()},
        "megabytes": {} if compiled else {kind: round(stepper.megabytes(), 2) for kind, stepper in steppers.items()},
    }


def main(given: list[str] | None = None) -> None:
    asked = arguments(__doc__, "../overhead", CASES, given)  # not among what is of sparse layers
    cases = TINY if asked.tiny else {name: case for name, case in CASES.items() if asked.compile or not case[-1]}
    record = Record(asked.out, only=asked.only, cases=cases)
    for name in record.missing():
        model, batch, rounds, compiled = cases[name]
        record.put({"name": name, **measure(model, batch, asked.rounds or rounds, compiled)})
    record.finish()


if __name__ == "__main__":
    main()
