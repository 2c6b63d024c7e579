"""Images a second of whole trainings: `anymask.fit` beside a plain loop as the scripts of papers have it, and several at once.

    python benchmarks/trainer.py                                               on a quiet machine; writes results/sparse/trainer.json
    python benchmarks/trainer.py --device cuda --out results/gpu/trainer.json  on a GPU

The plain loop: images cropped, flipped and normalised one by one in the processes of a DataLoader (as many as there is room for; on a GPU
also the four that the scripts of ToST have), weights multiplied by their mask in every forward pass (torch.nn.utils.prune), SGD,
`loss.item()` at each step; on a GPU cuDNN times its algorithms, as there. Each way trains `epochs` epochs on random images, all ways in
turns; the first epoch, in which things are compiled, measured and warmed up, is told apart.
"""

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from turns import Record, arguments, figure, say

from anymask import Mask, fit, models, prune
from anymask.data import Augment, Batches, Split
from anymask.sweep.turns import Turns, taking_turns
from anymask.train import Protocol
from anymask.train.graphs import timing_algorithms

PLAIN = "plain loop"
THEIRS = 4  # processes of the DataLoader in github.com/VITA-Group/ToST, by default
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    device: str = "cpu"
    networks: tuple[str, ...] = ("resnet18", "resnet32", "vgg16")
    sparsity: float = 0.98
    images: int = 1280
    batch: int = 128
    pixels: int = 32
    epochs: int = 3
    rounds: int = 3
    compiled: bool = True
    beside: tuple[int, ...] = (2,)
    streams: tuple[int, ...] = ()
    workers: int = 2  # of the DataLoader
    peak_size: int = 2048  # of the matrices that the machine's peak is measured with
    threads: int = 1


TINY = Plan(
    networks=("resnet8",), images=32, batch=16, pixels=16, epochs=2, rounds=1, compiled=False, streams=(2,), workers=1, peak_size=64
)


class OneByOne(Dataset[tuple[Tensor, int]]):
    """Images that are cropped, flipped and normalised on their own."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split.images.numpy(), split.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = np.pad(self.images[index], ((0, 0), (4, 4), (4, 4)))
        top, left = torch.randint(9, (2,)).tolist()
        image = image[:, top : top + image.shape[1] - 8, left : left + image.shape[2] - 8]
        if torch.rand(()) < 0.5:
            image = image[:, :, ::-1]
        pixels = torch.from_numpy(image.astype(np.float32) / 255)
        return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], self.labels[index]


def data(plan: Plan) -> Split:
    """Random images."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (plan.images, 3, plan.pixels, plan.pixels), generator=draw, dtype=torch.uint8)
    return Split(images, torch.arange(plan.images) % 10)


def network(name: str, plan: Plan) -> tuple[nn.Module, Mask]:
    """A network, not masked yet, and its mask."""
    model = models.build(name, classes=10, seed=0)
    return model.to(plan.device), prune(model, "random-erk", sparsity=plan.sparsity, seed=0)


def plainly(name: str, plan: Plan, *, compiled: bool = False, workers: int | None = None) -> list[float]:
    """Seconds of each epoch of the plain loop."""
    with timing_algorithms():
        return _plainly(name, plan, compiled=compiled, workers=workers or plan.workers)


def _plainly(name: str, plan: Plan, *, compiled: bool, workers: int) -> list[float]:
    model, mask = network(name, plan)
    for weight, kept in mask.items():
        module = model.get_submodule(weight.rpartition(".")[0])
        nn.utils.prune.custom_from_mask(module, "weight", kept.to(plan.device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
    pin = plan.device == "cuda"
    loader = DataLoader(OneByOne(data(plan)), plan.batch, shuffle=True, num_workers=workers, persistent_workers=True, pin_memory=pin)
    seconds = []
    for _ in range(plan.epochs):
        began, total = time.perf_counter(), 0.0
        for images, labels in loader:
            loss = F.cross_entropy(forward(images.to(plan.device)), labels.to(plan.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds


def by_fit(
    name: str, plan: Plan, *, sparse: str = "off", compile: str = "off", precision: str = "float32", after: Any = None, on_step: Any = None
) -> list[float]:
    """Seconds of each epoch of `anymask.fit`; `after` is called after the first."""
    model, mask = network(name, plan)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = Batches(
        data(plan), batch_size=plan.batch, device=plan.device, mean=MEAN, std=STD, shuffle=True, augment=Augment(), channels_last=True
    )
    ends: list[float] = []

    def on_epoch(epoch: int, _: dict[str, float]) -> None:  # its figures are numbers: the device has done its work
        ends.append(time.perf_counter())
        if epoch == 1 and after is not None:
            after()
            ends[0] = time.perf_counter()

    protocol = Protocol(epochs=plan.epochs, batch_size=plan.batch, precision=precision)
    began = time.perf_counter()
    how: dict[str, Any] = {"sparse": sparse, "compile": compile, "on_epoch": on_epoch, "on_step": on_step}
    fit(model, batches, mask=mask, recipe="default", protocol=protocol, **how)
    return np.diff([began, *ends]).tolist()


def ways(plan: Plan) -> dict[str, Callable[[str, Plan], list[float]]]:
    """Each way to train, by what it is called."""
    cuda = plan.device == "cuda"
    there: dict[str, Callable[[str, Plan], list[float]]] = {
        PLAIN: plainly,
        f"{PLAIN}, compiled": lambda name, p: plainly(name, p, compiled=True),
        "fit, dense": by_fit,
        "fit, dense, compiled": lambda name, p: by_fit(name, p, compile="on"),
    }
    if cuda:
        there[f"{PLAIN}, {THEIRS} loading"] = lambda name, p: plainly(name, p, workers=THEIRS)
        there["fit, dense, recorded"] = lambda name, p: by_fit(name, p, compile="graph")
        there["fit, bfloat16"] = lambda name, p: by_fit(name, p, precision="bfloat16")
        there["fit, bfloat16, compiled"] = lambda name, p: by_fit(name, p, precision="bfloat16", compile="on")
        there["fit, bfloat16, recorded"] = lambda name, p: by_fit(name, p, precision="bfloat16", compile="graph")
        there["fit, bfloat16, compiled and recorded"] = lambda name, p: by_fit(name, p, precision="bfloat16", compile="fused")
    else:
        there["fit"] = lambda name, p: by_fit(name, p, sparse="auto")
        there["fit, compiled"] = lambda name, p: by_fit(name, p, sparse="auto", compile="on")
    return {way: train for way, train in there.items() if plan.compiled or "compiled" not in way}


def together(name: str, plan: Plan, number: int) -> float:
    """Images a second of `number` trainings, each in a process of its own, after the first epoch."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(number), context.Queue()
    part = replace(plan, threads=max(1, plan.threads // number))
    processes = [context.Process(target=_one_of, args=(name, part, barrier, queue), daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    seconds = max(queue.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return number * plan.images * (plan.epochs - 1) / seconds


def _one_of(name: str, plan: Plan, barrier: Barrier, queue: Any) -> None:
    torch.set_num_threads(plan.threads)
    cuda = {"precision": "bfloat16", "compile": "graph"}
    queue.put(sum(by_fit(name, plan, **(cuda if plan.device == "cuda" else {"sparse": "auto"}), after=barrier.wait)[1:]))


def in_streams(name: str, plan: Plan, number: int) -> float:
    """Images a second of `number` trainings in this process, which take turns, after the first epoch of the last."""
    begun: list[float] = []
    ended: list[float] = []

    def work(turns: Turns) -> None:
        def wait() -> None:
            begun.append(time.perf_counter())
            while len(begun) < number:
                turns.rest(0.001)

        by_fit(name, plan, compile="graph", precision="bfloat16", after=wait, on_step=turns.step)
        ended.append(time.perf_counter())

    taking_turns(work, number, device=plan.device)
    return number * plan.images * (plan.epochs - 1) / (max(ended) - max(begun))


def peak(plan: Plan, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the device in a large matrix product or a large convolution, whichever it is faster in."""
    size, images, pixels = plan.peak_size, 32, 16
    a, b = torch.randn(2, size, size, device=plan.device, dtype=dtype)
    channels = size // 8
    x = torch.randn(images, channels, pixels, pixels, device=plan.device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device=plan.device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def rate(call: Callable[[], Tensor], work: float) -> float:
        best = math.inf
        for _ in range(20):
            began = time.perf_counter()
            float(call()[0, 0].flatten()[0])  # one number of it: to copy more would take time, too
            best = min(best, time.perf_counter() - began)
        return work / best

    return max(rate(lambda: a @ b, 2 * size**3), rate(lambda: F.conv2d(x, w, padding=1), 18 * images * (channels * pixels) ** 2))


def operations(name: str, plan: Plan) -> float:
    """Floating-point operations of a dense training step, for each image."""
    model, _ = network(name, plan)
    x, y = torch.randn(2, 3, plan.pixels, plan.pixels, device=plan.device), torch.zeros(2, dtype=torch.long, device=plan.device)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), y).backward()
    return counter.get_total_flops() / 2


def measure(name: str, plan: Plan) -> dict[str, Any]:
    """One network: every way, then several trainings at once."""
    took: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for turn in range(plan.rounds):
        there = list(ways(plan).items())
        for way, train in there if turn % 2 == 0 else there[::-1]:
            torch.compiler.reset()
            seconds = train(name, plan)
            first.setdefault(way, seconds[0])
            took.setdefault(way, []).extend(seconds[1:])
            say(f"{name}, {way}: {' '.join(f'{s:.2f}' for s in seconds)} s")
    work = operations(name, plan)
    peaks = {way: peak(plan, torch.bfloat16 if "bfloat16" in way else torch.float32) for way in took}
    rows = [_way(way, seconds, plan, first=first[way], dense=work / peaks[way], plain=took[PLAIN]) for way, seconds in took.items()]
    one = next(row["images a second"] for row in rows if row["way"] == ("fit, bfloat16, recorded" if plan.device == "cuda" else "fit"))
    beside = []
    numbers = [(number, "processes", together) for number in plan.beside] + [(number, "streams", in_streams) for number in plan.streams]
    for number, how, run in numbers:
        rate = run(name, plan, number)
        beside.append({"trainings": number, "in": how, "images a second": figure(rate), "times one": figure(rate / one)})
        say(f"{name}: {number} at once, {beside[-1]}")
    about = {"device": torch.cuda.get_device_name() if plan.device == "cuda" else "cpu", "batch": plan.batch, "images": plan.images}
    return {"name": name, **about, "sparsity": plan.sparsity, "ways": rows, "beside": beside}


def _way(way: str, seconds: Iterable[float], plan: Plan, *, first: float, dense: float, plain: list[float]) -> dict[str, Any]:
    rates = sorted(plan.images / s for s in seconds)
    made = {"way": way, "images a second": figure(median(rates)), "low": figure(rates[0]), "high": figure(rates[-1]), "epochs": len(rates)}
    return {
        **made,
        "times the plain loop": figure(median(rates) / (plan.images / median(plain))),
        "share of peak": figure(median(rates) * dense),  # as if all weights were computed: over 1 where zeros are left out
        "first epoch s": figure(first),
    }


def main(given: list[str] | None = None) -> None:
    asked = arguments(__doc__, "trainer", Plan().networks, given, devices=True)
    plan = TINY if asked.tiny else Plan()
    if asked.device == "cuda":
        full = {"images": 12_800, "beside": (4,), "streams": (2, 4, 8), "workers": min(14, os.cpu_count() or 1), "peak_size": 8192}
        plan = replace(plan, device="cuda", **({} if asked.tiny else full))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    plan = replace(plan, rounds=asked.rounds or plan.rounds, compiled=plan.compiled and asked.compile, threads=asked.threads)
    record = Record(asked.out, only=asked.only, cases=plan.networks)
    for name in record.missing():
        record.put(measure(name, plan))
    record.finish()


if __name__ == "__main__":
    main()
