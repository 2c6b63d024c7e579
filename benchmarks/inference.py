"""Shipped networks beside PyTorch and ONNX Runtime in float32, batch by batch, in turns; and how large the files are.

    python benchmarks/inference.py       on a quiet machine; writes results/sparse/inference.json

Dense networks (batch norm folded into the layers, as in ours) take the same time whatever their zeros are: one runs beside all of ours.
"""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from turns import Record, arguments, figure, in_turns, say, summary

from anymask import load, models, prune, ship
from anymask.errors import AnymaskError
from anymask.shipping import timing
from anymask.shipping.rebuild import Rebuilt

GROUPS = {name: names for name, names in timing.GROUPS.items() if name != "ONNX Runtime int8"}
SIZES = "file sizes"


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    networks: tuple[str, ...] = ("resnet18", "vgg16", "resnet20")
    masks: tuple[str, ...] = ("random-uniform", "random-erk")
    sparsities: tuple[float, ...] = (0.90, 0.95, 0.98)
    batches: tuple[int, ...] = (1, 32, 128)
    against: tuple[str, ...] = ("eager", "channels-last", "compiled", "onnx")
    shape: tuple[int, int, int] = (3, 32, 32)
    rounds: int = 7
    sizes: tuple[str, tuple[float, ...]] = ("resnet18", (0.95, 0.98))

    @property
    def cases(self) -> list[str]:
        """Names of what is written one by one."""
        return [f"{name}, batch {batch}" for name in self.networks for batch in self.batches] + [SIZES]


TINY = Plan(("resnet8",), ("random-erk",), (0.9, 0.98), (1, 4), ("eager", "channels-last"), (3, 16, 16), 2, ("resnet8", (0.95, 0.98)))


def shipped(name: str, method: str, sparsity: float, shape: tuple[int, ...], path: Path, *, values: str) -> dict[str, Any]:
    """Write a network with random weights and statistics of random images, as float32 or float16."""
    model: nn.Module = models.build(name, classes=10, seed=0)
    mask = prune(model, method, sparsity=sparsity, seed=0)
    mask.apply(model)
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        model.train()(x)
    done = ship(model.eval(), mask, example=x, to=path, values=values)
    with torch.no_grad():
        largest = float(model(x).abs().max())
    return {
        "mask": method,
        "sparsity": sparsity,
        "values": values,
        "bytes": done.bytes,
        "dense bytes": done.dense_bytes,
        "kept": done.kept,
        "difference": figure(done.difference or 0.0),  # from the model's outputs, at most
        "largest output": figure(largest),
    }


class Network:
    """A network shipped with each mask, and the dense one for the others; made once for all batch sizes."""

    def __init__(self, name: str, plan: Plan, threads: int, folder: Path) -> None:
        self.name, self.about, self.programs = name, {}, {}
        for method in plan.masks:
            for sparsity in plan.sparsities:
                key = f"{method} {sparsity}"
                say(f"{name}: ships {key}")
                path = folder / f"{name}-{key}.anymask"
                self.about[key] = shipped(name, method, sparsity, plan.shape, path, values="float32")
                self.programs[key] = load(path, threads=threads)
        self.bench = timing._Bench(next(iter(self.programs.values())), threads, folder)


def measure(network: Network, batch: int, plan: Plan) -> dict[str, Any]:
    """One network at one batch size: ours for each mask, and the others."""
    name, images = network.name, np.random.default_rng(0).standard_normal((batch, *plan.shape), dtype=np.float32)
    calls: dict[str, Callable[[], object]] = {key: partial(program, images) for key, program in network.programs.items()}
    cases = {key: {**about, "difference from PyTorch": _difference(network.programs[key], images)} for key, about in network.about.items()}
    others, notes = {}, []
    for other in plan.against:
        say(f"{name}, batch {batch}: prepares {other}")
        try:
            others[other] = timing.OTHERS[other](network.bench, images)
        except AnymaskError as error:
            notes.append(f"{other} is left out: {error.came}")
    calls |= others
    for call in calls.values():
        call()
        call()
    say(f"{name}, batch {batch}: in turns")
    times = {key: summary(seconds) for key, seconds in in_turns(calls, rounds=plan.rounds, may_drop=others, factor=4).items()}
    best = min(others, key=lambda other: times[other]["ms"])
    for key, case in cases.items():
        ratio = {other: figure(times[other]["ms"] / times[key]["ms"]) for other in others}
        groups = {group: _least(ratio, names) for group, names in GROUPS.items()}
        case |= {"time": times[key], "speedup": ratio[best], "against each": ratio, "against the best of": groups}
        say(f"{name}, batch {batch}, {key}: {times[key]['ms']} ms, {ratio[best]} times as fast as {best}; {ratio}")
    dense = {other: times[other] for other in others}
    return {"name": f"{name}, batch {batch}", "network": name, "batch": batch, "dense": dense, "fastest": best, "notes": notes,
            "cases": list(cases.values())}  # fmt: skip


def _difference(program: Any, images: Any) -> float:
    with torch.inference_mode():
        return figure(float(np.abs(program(images) - Rebuilt(program.plan)(torch.from_numpy(images)).numpy()).max()))


def _least(ratio: dict[str, float], names: tuple[str, ...]) -> float | None:
    """The speedup over the fastest of `names`, where any of them is here."""
    return min((ratio[name] for name in names if name in ratio), default=None)


def sizes(plan: Plan, folder: Path) -> dict[str, Any]:
    """Files in float16."""
    name, sparsities = plan.sizes
    rows = [
        shipped(name, method, sparsity, plan.shape, folder / "size.anymask", values="float16")
        for method in plan.masks
        for sparsity in sparsities
    ]
    say(f"{name}: {rows}")
    return {"name": SIZES, "network": name, "cases": rows}


def main(given: list[str] | None = None) -> None:
    asked = arguments(__doc__, "inference", Plan().cases, given)
    plan = TINY if asked.tiny else Plan()
    against = tuple(other for other in plan.against if asked.compile or other != "compiled")
    plan = Plan(**{**vars(plan), "rounds": asked.rounds or plan.rounds, "against": against})
    record = Record(asked.out, only=asked.only, cases=plan.cases)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and exporters
        network = None
        for case in record.missing():
            name, _, batch = case.partition(", batch ")
            if batch and (network is None or network.name != name):
                network = Network(name, plan, asked.threads, Path(folder))
            record.put(measure(network, int(batch), plan) if batch else sizes(plan, Path(folder)))
    record.finish()


if __name__ == "__main__":
    main()
