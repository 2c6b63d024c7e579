"""How fast a shipped network is here, beside PyTorch and ONNX Runtime: the same numbers through each, in turns."""

import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from anymask.errors import AnymaskError, SettingError
from anymask.registry import lookup
from anymask.shipping import onnxfile
from anymask.shipping.plan import Array
from anymask.shipping.rebuild import Rebuilt
from anymask.shipping.runtime import Program
from anymask.version import __version__

OURS = "anymask"
Call = Callable[[], object]
_MOST_ROUNDS, _LEAST_ROUNDS, _CALIBRATION = 200, 5, 32


@dataclass(frozen=True)
class Timing:
    """How long one batch took.

    Args:
        name: who ran it.
        batch: number of images.
        ms: milliseconds for the whole batch, the median of `rounds`.
        low, high: the quartiles.
        rounds: how often it ran, in turns with the others.
        difference: largest difference of its outputs from ours.
    """

    name: str
    batch: int
    ms: float
    low: float
    high: float
    rounds: int
    difference: float


@dataclass(frozen=True)
class Result:
    """All timings, and what is to be said of those that are missing."""

    timings: tuple[Timing, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    def of(self, batch: int) -> dict[str, Timing]:
        """The timings of one batch size, by name."""
        return {timing.name: timing for timing in self.timings if timing.batch == batch}

    def verdicts(self) -> list[str]:
        """For each batch size and group of others a line: how much faster ours is than the fastest of them, or how much slower."""
        lines = []
        for batch in dict.fromkeys(timing.batch for timing in self.timings):
            found = self.of(batch)
            for group, names in GROUPS.items():
                there = [found[name] for name in names if name in found]
                if there:
                    best = min(there, key=lambda timing: timing.ms)
                    lines.append(_verdict(batch, group, best, ours=found[OURS]))
        return lines


def _verdict(batch: int, group: str, best: Timing, *, ours: Timing) -> str:
    ratio = best.ms / ours.ms
    said = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"SLOWER, {1 / ratio:.2f} times as long as"
    return f"batch {batch}: {said} {group} ({best.name}, {best.ms:.2f} ms)"


def measured(
    program: Program, batches: Sequence[int], *, threads: int, against: Sequence[str], seconds: float, tell: Callable[[str], None]
) -> Result:
    """Time `program` and the others on random images.

    Args:
        program: the network.
        batches: numbers of images.
        threads: how many threads each of them has.
        against: names in `OTHERS`.
        seconds: how long each of them runs for each batch size, warming up and compiling apart.
        tell: told what is done now.

    Raises:
        UnknownName: for a name that is not in `OTHERS`.
        SettingError: for a batch or seconds out of range.
    """
    for name in against:
        lookup(OTHERS, name, what="runtime to compare with")
    if min(batches, default=0) < 1 or not 0 < seconds < math.inf:
        raise SettingError(f"batches came as {tuple(batches)}, seconds as {seconds}", allowed="numbers over 0", fix="give 1 32 128")
    load = os.getloadavg()[0]  # before we add to it
    notes: dict[str, None] = {}
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory() as folder, _torch_threads(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and exporters
        bench = _Bench(program, threads, Path(folder))
        for batch in batches:
            images = np.random.default_rng(0).standard_normal((batch, *program.input), dtype=np.float32)
            calls: dict[str, Call] = {OURS: partial(program, images, threads=threads)}
            for name in against:
                tell(f"batch {batch}: {name}")
                try:
                    calls[name] = OTHERS[name](bench, images)
                except AnymaskError as error:
                    notes[f"{name} is left out: {error.came}. To do: {error.fix}."] = None
            tell(f"batch {batch}: in turns")
            timings += _in_turns(calls, batch, seconds=seconds)
    return Result(tuple(timings), (*notes, *_busy(timings, load=load, threads=threads)), _versions())


def _busy(timings: Sequence[Timing], *, load: float, threads: int) -> list[str]:
    """A line where others used the processors: threads that wait for each other take a hundred times as long then."""
    spread = max(timings, key=lambda timing: timing.high / timing.low)
    processors, signs = os.cpu_count() or 1, []
    if processors - load < threads / 2:
        signs.append(f"load {load:.1f} on {processors} processors before")
    if spread.high > 2 * spread.low:
        signs.append(f"quartiles of {spread.name} at batch {spread.batch}: {spread.low:.2f} and {spread.high:.2f} ms")
    return [f"The machine was busy ({'; '.join(signs)}): do not trust these figures, measure again on a quiet one."] if signs else []


def _in_turns(calls: Mapping[str, Call], batch: int, *, seconds: float) -> list[Timing]:
    outputs = {name: np.asarray(call()) for name, call in calls.items()}  # warms up, too
    for call in calls.values():
        call()
    slowest = max(_time(call) for call in calls.values())
    rounds = int(min(_MOST_ROUNDS, max(_LEAST_ROUNDS, 1000 * seconds / slowest)))
    took: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls) if number % 2 else list(calls)[::-1]  # nobody is always after the same one
        for name in names:
            took[name].append(_time(calls[name]))
    off = {name: float(np.abs(output - outputs[OURS]).max()) for name, output in outputs.items()}
    return [Timing(name, batch, *_quartiles(times), rounds=rounds, difference=off[name]) for name, times in took.items()]


def _time(call: Call) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def _quartiles(times: list[float]) -> tuple[float, float, float]:
    low, high = np.percentile(times, [25, 75]).tolist()
    return median(times), low, high


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the others ----------------------------------------------------------------------------------------------------
class _Bench:
    """What the others are made of, each thing once."""

    def __init__(self, program: Program, threads: int, folder: Path) -> None:
        self.threads, self.folder, self.shape = threads, folder, program.input
        self.plain = Rebuilt(program.plan)
        self.last = Rebuilt(program.plan).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._blob: bytes | None = None
        self._sessions: dict[str, onnxfile.Session] = {}

    def session(self, name: str) -> onnxfile.Session:
        """ONNX Runtime with the network in float32 or int8.

        Raises:
            AnymaskError: where something is not installed, or cannot be converted.
        """
        if not onnxfile.has_runtime():
            raise SettingError("onnxruntime is not installed", allowed="PyTorch without it", fix="pip install 'anymask[onnx]'")
        if name not in self._sessions:
            sample = np.random.default_rng(1).standard_normal((_CALIBRATION, *self.shape), dtype=np.float32)
            self._blob = self._blob or onnxfile.onnx_bytes(self.plain, torch.from_numpy(sample[:2]))
            given = onnxfile.quantized(self._blob, sample, self.folder) if name == "int8" else self._blob
            self._sessions[name] = onnxfile.Session(given, threads=self.threads)
        return self._sessions[name]


def _torch(model: nn.Module, images: Array, *, last: bool) -> Call:
    x = torch.from_numpy(images)
    x = x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x

    def call() -> Array:
        with torch.inference_mode():
            return np.asarray(model(x))

    return call


def _compiled(bench: _Bench, images: Array) -> Call:
    torch.compiler.reset()  # one graph a size, none for sizes in between
    call = _torch(torch.compile(bench.last, dynamic=False), images, last=True)  # type: ignore[arg-type]
    try:
        call()
    except Exception as error:  # the compiler's errors are of many kinds
        said = " ".join(str(error).split())[:150]
        raise AnymaskError(f"torch.compile fails ({said})", allowed="a C++ compiler", fix="install g++, or see PyTorch's help") from error
    return call


def _onnx(name: str) -> Callable[[_Bench, Array], Call]:
    def make(bench: _Bench, images: Array) -> Call:
        session = bench.session(name)
        return lambda: session(images)

    return make


OTHERS: dict[str, Callable[[_Bench, Array], Call]] = {
    "eager": lambda bench, images: _torch(bench.plain, images, last=False),
    "channels-last": lambda bench, images: _torch(bench.last, images, last=True),
    "compiled": _compiled,
    "onnx": _onnx("float32"),
    "onnx-int8": _onnx("int8"),
}
GROUPS = {"PyTorch": ("eager", "channels-last", "compiled"), "ONNX Runtime float32": ("onnx",), "ONNX Runtime int8": ("onnx-int8",)}


def _versions() -> dict[str, str]:
    found = {"anymask": __version__}  # which a copy on the path has no metadata of
    for name in ("torch", "numpy", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
