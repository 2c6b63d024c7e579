"""What `hold`, and a recipe whose ghosts are gone, cost of a training step: medians of alternating repeats, as ratios.

python benchmarks/hold.py            on a quiet machine; writes results/hold.json
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from anymask import Recipe, hold, models, prune
from anymask.sweep.compare import machine

NETS = (("resnet20", 128, 31), ("vgg11", 128, 15), ("resnet18", 64, 9))  # name, batch, repeats
OUT = Path(__file__).resolve().parent.parent / "results" / "hold.json"


def stepper(name: str, batch: int, *, held: bool, recipe: bool) -> Callable[[], float]:
    """A function that makes one training step and gives its seconds."""
    model = models.build(name, classes=10, seed=0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mask = prune(model, "random-erk", sparsity=0.95, seed=0)
    mask.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if held:
        hold(mask, model, optimizer)
    x, y = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(batch) % 10
    running = Recipe.preset("tost:ghost_activation").attach(model, optimizer, total_steps=10**6, start=10**6 - 10**4) if recipe else None

    def step() -> float:
        began = time.perf_counter()
        loss = running.loss(model(x), y) if running else F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if running:
            running.step()
        return time.perf_counter() - began

    return step


def main() -> None:
    results = []
    for name, batch, repeats in NETS:
        steppers = {
            "plain": stepper(name, batch, held=False, recipe=False),
            "plain again": stepper(name, batch, held=False, recipe=False),  # how far two equal steps differ here
            "hold": stepper(name, batch, held=True, recipe=False),
            "hold + recipe after its ghosts": stepper(name, batch, held=True, recipe=True),
        }
        times: dict[str, list[float]] = {key: [] for key in steppers}
        for repeat in range(repeats + 1):
            for key, step in steppers.items():
                seconds = step()
                if repeat:  # the first warms up
                    times[key].append(seconds)
        plain = statistics.median(times["plain"])
        ratios = {key: round(statistics.median(values) / plain, 4) for key, values in times.items()}
        results.append({"model": name, "batch": batch, "repeats": repeats, "seconds of a plain step": round(plain, 4), "ratios": ratios})
        print(results[-1], flush=True)
    OUT.write_text(json.dumps({"machine": machine("cpu"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
