"""What `hold` and a recipe cost of a training step, at strength 1 and after the ghosts are gone: medians of alternating repeats, as ratios.

    python benchmarks/overhead.py        on a quiet machine, about 6 minutes; writes results/overhead.json

Memory is what autograd saves between forward and backward, each storage counted once, and what hold and recipe themselves keep.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymask import Recipe, hold, models, prune
from anymask.sweep.compare import machine

NETS = (("resnet20", 128, 61, False), ("vgg11", 128, 21, False), ("resnet20", 128, 31, True))
OUT = Path(__file__).resolve().parent.parent / "results" / "overhead.json"
VARIANTS: dict[str, tuple[bool, int | None]] = {  # name -> (held, the recipe's step out of 10^6)
    "plain": (False, None),
    "plain again": (False, None),  # how far two equal steps differ here
    "hold": (True, None),
    "hold + recipe at strength 1": (True, 0),
    "hold + recipe after its ghosts": (True, 10**6 - 10**4),
}


class Stepper:
    """One training, a step at a time."""

    def __init__(self, name: str, batch: int, *, held: bool, at: int | None, compiled: bool) -> None:
        self.model: nn.Module = models.build(name, classes=10, seed=0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mask = prune(self.model, "random-erk", sparsity=0.95, seed=0)
        mask.apply(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        if held:
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

    def seconds(self) -> float:
        """Make one step; how long it took."""
        began = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.running:
            self.running.step()
        return time.perf_counter() - began

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
        held = self.running._hold if self.running else next((h for h in self.optimizer._optimizer_step_post_hooks.values()), None)
        kept = sum(t.nbytes for t in held._kept.values()) if held else 0
        return (sum(saved.values()) + kept) / 1e6


def measure(name: str, batch: int, repeats: int, compiled: bool) -> dict:
    """All variants, alternating."""
    torch._dynamo.reset()
    steppers = {kind: Stepper(name, batch, held=held, at=at, compiled=compiled) for kind, (held, at) in VARIANTS.items()}
    times: dict[str, list[float]] = {kind: [] for kind in steppers}
    for repeat in range(repeats + 2):
        for kind, stepper in steppers.items():
            seconds = stepper.seconds()
            if repeat > 1:  # the first ones warm up, and compile
                times[kind].append(seconds)
    plain = statistics.median(times["plain"])
    memory = {} if compiled else {kind: round(stepper.megabytes(), 2) for kind, stepper in steppers.items()}
    return {
        "model": name,
        "batch": batch,
        "compiled": compiled,
        "repeats": repeats,
        "seconds of a plain step": round(plain, 4),
        "ratios": {kind: round(statistics.median(values) / plain, 4) for kind, values in times.items()},
        "megabytes": memory,
    }


def main() -> None:
    results = []
    for net in NETS:
        results.append(measure(*net))
        print(results[-1], flush=True)
        OUT.write_text(json.dumps({"machine": machine("cpu"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
