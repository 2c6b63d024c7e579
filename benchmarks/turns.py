"""What the benchmarks of speed share: calls that take turns, and a JSON file that is written after each case."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from anymask.kernels import library
from anymask.runlog import atomic, processor

RESULTS = Path(__file__).resolve().parent.parent / "results" / "sparse"
BURST = 0.05  # seconds that a turn lasts at least: short calls are made several times, the first of them not counted
SAME = ("processor", "cores", "threads", "isa", "torch", "python")  # rows of one file are of one machine
PAUSE = 0.03  # seconds before each turn: the threads of the one before still look for work for some milliseconds
Call = Callable[[], object]


def arguments(about: str, name: str, cases: Iterable[str], given: list[str] | None, *, devices: bool = False) -> argparse.Namespace:
    """What every script takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help=f"measure this one anew and leave the rest of the file: {', '.join(cases)}")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test: a few seconds, numbers that say nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="the file to write")
    parser.add_argument("--rounds", type=int, help="how often each is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    if devices:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made = parser.parse_args(given)
    torch.set_num_threads(made.threads)
    return made


def say(text: str) -> None:
    """A line with the time of day, at once."""
    print(f"{datetime.now():%H:%M:%S} {text}", flush=True)


def machine() -> dict[str, Any]:
    """Where and with what a file was made."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": library.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load before": round(os.getloadavg()[0], 2),
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


class Record:
    """The results, one a case.

    A file that was not finished is gone on with, by whatever cases it lacks; a finished one is made anew; with `only` one case of it is.
    """

    def __init__(self, path: Path, *, only: str | None, cases: Iterable[str]) -> None:
        self.path, self.only, self.every = path, only, list(cases)
        self.cases = [case for case in self.every if only in (None, case)]
        if not self.cases:
            sys.exit(f"--only {only} is none of the cases")
        old = json.loads(path.read_text()) if path.exists() else None
        here = machine()
        same = old is not None and all(old["machine"].get(key) == here[key] for key in SAME)
        if only and old and not same:
            sys.exit(f"{path} was made on another machine or with other versions: give --out, or measure everything here")
        kept = old["results"] if old and same and (only or not old["finished"]) else []
        self.began = time.perf_counter()
        self.data = {"machine": here, "finished": False, "results": kept}

    def missing(self) -> list[str]:
        """The names of the cases that are to be measured."""
        there = set() if self.only else {row["name"] for row in self.data["results"]}
        if there:
            say(f"{self.path} has {len(there)} already, which stay: remove it to measure them anew")
        return [case for case in self.cases if case not in there]

    def put(self, row: dict[str, Any]) -> None:
        """Write the file with this row and how long it took, in place of an older one of its name."""
        row["seconds"] = round(time.perf_counter() - self.began, 1)
        self.began = time.perf_counter()
        names = [old["name"] for old in self.data["results"]]
        if row["name"] in names:
            self.data["results"][names.index(row["name"])] = row
        else:
            self.data["results"].append(row)
        self._write()

    def finish(self) -> None:
        """Write it a last time."""
        self.data["finished"] = set(self.every) <= {row["name"] for row in self.data["results"]}
        self._write()
        say(f"wrote {self.path}")

    def _write(self) -> None:
        with atomic(self.path, "w") as file:
            json.dump(self.data, file, indent=1)
            file.write("\n")


def in_turns(calls: Mapping[str, Call], *, rounds: int, may_drop: Iterable[str] = (), factor: float = 1.5) -> dict[str, list[float]]:
    """Seconds of each call: in each round all of them, in every other round backwards, so that nobody is always after the same one.

    Args:
        calls: warmed up already.
        rounds: how many turns each has.
        may_drop: of these, one that takes `factor` times as long as their fastest is left out after two rounds.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    number = dict.fromkeys(calls, 1)
    left = list(calls)
    for turn in range(rounds):
        for name in left if turn % 2 else left[::-1]:
            if turn == 0:
                number[name] = int(min(50, max(1, BURST / max(1e-6, _seconds(calls[name])))))
            time.sleep(PAUSE)
            if number[name] > 1:
                calls[name]()  # after somebody else's data in the caches
            took[name] += [_seconds(calls[name]) for _ in range(number[name])]
        if turn == 1:
            rivals = {name: median(took[name]) for name in may_drop}
            slow = {name for name, seconds in rivals.items() if seconds > factor * min(rivals.values())}
            left = [name for name in left if name not in slow]
    return took


def _seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def summary(seconds: list[float]) -> dict[str, float | int]:
    """The median and the quartiles, in milliseconds."""
    low, high = np.percentile(seconds, [25, 75]).tolist()
    return {"ms": figure(1000 * median(seconds)), "low": figure(1000 * low), "high": figure(1000 * high), "times": len(seconds)}


def figure(value: float) -> float:
    """Four digits: more were never measured."""
    return float(f"{value:.4g}")
