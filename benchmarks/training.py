"""Whole training steps over kept weights alone, beside dense PyTorch in one run: forward, loss, backward, SGD with momentum, zero_grad.

    python benchmarks/training.py        on a quiet machine; writes results/sparse/training.json

All networks of one name live beside each other and take turns: the dense ones in each setting, and a sparse one for each mask. The dense
ones have the same memory settings (anymask.sparse.memory); channels_last without them is measured in a process of its own.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from counting import Count, peaks, where
from torch import Tensor, nn
from turns import Record, arguments, figure, in_turns, say, summary

from anymask import models, prune, to_sparse
from anymask.mask import Mask
from anymask.sparse import layers, memory

ALONE = "channels_last, ANYMASK_MALLOC=0"


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    networks: tuple[str, ...] = ("resnet18", "vgg16", "resnet32")
    masks: tuple[str, ...] = ("random-uniform", "random-erk")
    sparsities: tuple[float, ...] = (0.90, 0.95, 0.98, 0.99)
    batch: int = 128
    pixels: int = 32
    rounds: int = 7
    compiled: bool = True
    alone: bool = True  # channels_last in a process without the memory settings, too
    peak_channels: int = 512


TINY = Plan(("resnet8",), ("random-erk",), (0.9, 0.98), batch=4, pixels=16, rounds=2, compiled=False, alone=False, peak_channels=32)


class Training:
    """One training, a step at a time."""

    def __init__(self, model: nn.Module, x: Tensor, *, compiled: bool = False) -> None:
        self.model, self.x, self.y = model, x, torch.arange(len(x)) % 10
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model

    def step(self) -> None:
        """Everything from the images to the next weights."""
        F.cross_entropy(self.forward(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        memory.follow()  # the dense ones' memory lies in huge pages, too

    def held(self) -> dict[str, int]:
        """Bytes of weights, gradients and slots after a backward pass, and of the tables of sparse layers."""
        F.cross_entropy(self.model(self.x), self.y).backward()
        parameters = list(self.model.parameters())
        slots = [slot for state in self.optimizer.state.values() for slot in state.values() if isinstance(slot, Tensor)]
        gathers = [layer.gather for layer in self.model.modules() if isinstance(layer, layers.SparseWeight)]
        found = {
            "weights": sum(p.nbytes for p in parameters),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "slots": sum(slot.nbytes for slot in slots),
            "tables": sum(_size(vars(gather)) for gather in gathers),
        }
        self.optimizer.zero_grad()
        return found


def _size(thing: Any) -> int:
    """Bytes of all arrays in `thing`, however deep."""
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(_size(value) for value in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(_size(value) for value in thing)
    return _size(vars(thing)) if is_dataclass(thing) else 0


def dense(name: str, setting: str, plan: Plan) -> Training:
    """A plain model in one of PyTorch's settings."""
    model: Any = models.build(name, classes=10, seed=0)
    x = images(plan)
    if setting != "NCHW":
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return Training(model, x, compiled=setting == "compiled, channels_last")


def images(plan: Plan) -> Tensor:
    """A batch as a loader gives it, NCHW."""
    return torch.randn(plan.batch, 3, plan.pixels, plan.pixels, generator=torch.Generator().manual_seed(0))


def sparse(name: str, method: str, sparsity: float, plan: Plan) -> tuple[Training, Mask, dict[str, Any]]:
    """A sparse model, its mask, and what `to_sparse` did."""
    model = models.build(name, classes=10, seed=0)
    mask = prune(model, method, sparsity=sparsity, seed=0)
    mask.apply(model)
    x, began = images(plan), time.perf_counter()
    to_sparse(model, mask, x)
    seconds = time.perf_counter() - began
    converted = sum(isinstance(layer, layers.SparseWeight) for layer in model.modules())
    made = {"density": round(mask.kept / mask.total, 5), "sparse layers": converted, "masked layers": len(mask)}
    return Training(model, x), mask, {**made, "measuring s": round(seconds, 1)}


def alone(name: str, plan: Plan, threads: int) -> dict[str, Any]:
    """The dense step in a process whose memory is left as it comes."""
    command = [sys.executable, __file__, "--alone", name, str(plan.rounds), str(threads)]
    done = subprocess.run(command, env={**os.environ, "ANYMASK_MALLOC": "0"}, capture_output=True, text=True, check=True)
    return summary([float(word) for word in done.stdout.split()])


def _alone(name: str, rounds: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    step = dense(name, "channels_last", Plan()).step
    step()
    print(*in_turns({"": step}, rounds=int(rounds))[""])


def measure(name: str, plan: Plan, threads: int) -> dict[str, Any]:
    """One network: every setting and every mask."""
    memory.prepare()
    torch._dynamo.reset()
    peak = peaks(channels=plan.peak_channels, megabytes=256 if plan.alone else 4, threads=threads)
    say(f"{name}: {peak}")
    trainings, about = {}, {}
    for method in plan.masks:
        for sparsity in plan.sparsities:
            key = f"{method} {sparsity}"
            trainings[key], mask, about[key] = sparse(name, method, sparsity, plan)
            about[key] |= {"mask": method, "sparsity": sparsity}
            trainings[key].step()
            with Count(trainings[key].model, mask) as count:
                trainings[key].step()
            about[key]["limit"] = count.limit(peak)
            say(f"{name}, {key}: {about[key]}")
    settings = ["NCHW", "channels_last", *(["compiled, channels_last"] if plan.compiled else [])]
    for setting in settings:
        say(f"{name}, dense {setting}: warms up")
        trainings[setting] = dense(name, setting, plan)
        for _ in range(2):
            trainings[setting].step()
    say(f"{name}: in turns")
    steps = {key: training.step for key, training in trainings.items()}
    took = in_turns(steps, rounds=plan.rounds, may_drop=settings)
    times = {key: summary(seconds) for key, seconds in took.items()}
    return _row(name, plan, peak, settings, trainings, about, times, threads)


def _row(  # noqa: PLR0917
    name: str, plan: Plan, peak: dict[str, float], settings: list[str], trainings: dict[str, Training], about: dict[str, dict[str, Any]],
    times: dict[str, Any], threads: int,
) -> dict[str, Any]:  # fmt: skip
    best = min(settings, key=lambda setting: times[setting]["ms"])
    cases = []
    for key, case in about.items():
        case |= {"time": times[key], "speedup": figure(times[best]["ms"] / times[key]["ms"])}
        case["limit"]["reached"] = figure(case["limit"]["limit ms"] / times[key]["ms"])
        case |= {"where ms": where(trainings[key].step), "bytes": trainings[key].held()}
        say(f"{name}, {key}: {case['speedup']} times as fast as {best}, {times[key]['ms']} ms, {case['limit']['reached']:.0%} of the limit")
        cases.append(case)
    plain = {setting: times[setting] for setting in settings}
    if plan.alone:
        plain[ALONE] = alone(name, plan, threads)
    eager = best if "compiled" not in best else "channels_last"
    return {
        "name": name, "batch": plan.batch, "pixels": plan.pixels, "peak": peak, "dense": plain, "fastest": best,
        "dense where": {"setting": eager, "ms": where(trainings[eager].step)}, "dense bytes": trainings[eager].held(), "cases": cases,
    }  # fmt: skip


def main(given: list[str] | None = None) -> None:
    asked = arguments(__doc__, "training", Plan().networks, given)
    plan = TINY if asked.tiny else Plan()
    plan = Plan(**{**vars(plan), "rounds": asked.rounds or plan.rounds, "compiled": plan.compiled and asked.compile})
    record = Record(asked.out, only=asked.only, cases=plan.networks)
    before = os.environ.get("ANYMASK_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ANYMASK_CACHE"] = folder  # every layer is measured anew
        try:
            for name in record.missing():
                record.put(measure(name, plan, asked.threads))
        finally:
            os.environ.pop("ANYMASK_CACHE")
            os.environ.update({"ANYMASK_CACHE": before} if before else {})
    record.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        _alone(*sys.argv[2:])
    else:
        main()
