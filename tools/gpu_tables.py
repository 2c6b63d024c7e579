"""The parts of docs/ about what ran on a GPU, made of results/gpu."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from statistics import median

from ledgers import ROOT, ledger
from recipe_tables import differences
from tables import table as markdown

from anymask.report import overall, paired, table

GPU = ROOT / "results" / "gpu"


def gpu_short() -> str:
    """What has an interval in results/gpu, as a table, and a sentence about what has one seed."""
    rows = ledger("gpu")
    found = overall(paired(rows))
    single = [o for o in found if not o.interval and o.mean is not None]
    said = [f"{o.settings['model']}, `{o.recipe}` {o.mean:+.2f} points over {o.cells} masks" for o in single]
    more = f"\nWith one seed each: {'; '.join(said)}.\n" if said else ""
    return f"Full-width networks on all of CIFAR-100, on one {rows[0]['machine']['processor']}:\n\n{differences(rows)}{more}"


WAYS = {
    "plain": "plain loop",
    "plain, timed": "plain loop, cuDNN timing its algorithms",
    "plain compiled": "plain loop, compiled",
    "graph": "fit, bfloat16, recorded",
    "graph again": "fit, bfloat16, recorded",
    "graph, norms compiled": "fit, bfloat16, recorded, batch norms compiled (not in the package)",
    "fused": "fit, bfloat16, compiled and recorded (`fused`)",
}


def _rates() -> Iterator[tuple[str, str, str, int, int]]:
    """Day, network, way, how many at once and images a second in all, of each line of results/gpu/rates.log that has them."""
    day = ""
    for line in (GPU / "rates.log").read_text().splitlines():
        if found := re.match(r"# .* on (\d{4}-\d\d-\d\d(?: \(\w+\))?)", line):
            day = found[1]
        yield from ((day, *row) for row in _rate(line))


def _rate(line: str) -> Iterator[tuple[str, str, int, int]]:
    """The same of one line, if it has them, but for the day."""
    if found := re.match(r"\[ *[\d.]+\] (resnet\d+) ([a-z, ]+) \(\[([\d, ]+)\]", line):
        yield found[1], WAYS[found[2]], 1, round(median(map(int, found[3].split(","))))
    elif found := re.match(r"\[ *[\d.]+\] (resnet\d+) (\d+) streams (fused )?(\d+)", line):
        yield found[1], WAYS["fused" if found[3] else "graph"], int(found[2]), int(found[4])
    elif found := re.match(r"\[ *[\d.]+\] (R32|R18) (bf16|fp32) (eager|graph|streams (\d+)) \(?(\d+)[ ,]", line):
        how = {"bf16": "bfloat16", "fp32": "float32"}[found[2]] + ("" if found[3] == "eager" else ", recorded")
        yield found[1].replace("R", "resnet"), f"fit, {how}", int(found[4] or 1), int(found[5])
    elif found := re.match(r"(resnet\d+) (plain|graph) (\d+)", line):
        yield found[1], "plain loop" if found[2] == "plain" else "fit, bfloat16, recorded", 1, int(found[3])
    elif found := re.match(r"r18 streams (\d+) (\d+)", line):
        yield "resnet18", "fit, bfloat16, recorded", int(found[1]), int(found[2])


def gpu_rates() -> str:
    """Images a second on a GPU: in turns they were not, so each is one run."""
    rows = sorted(_rates(), key=lambda row: (-int(row[1].removeprefix("resnet")), row[0], row[4]))
    plain = {(day, network): rate for day, network, way, _, rate in rows if way in (WAYS["plain"], WAYS["plain, timed"])}
    head = ["day", "network", "way", "at once", "images / s in all", "times the plain loop", "182 epochs of 45,000, s (computed)"]
    lines = [
        [day, network, way, str(number), f"{rate:,}", _times(rate, plain.get((day, network))), f"{182 * 45_000 / rate:,.0f}"]
        for day, network, way, number, rate in rows
    ]
    made = markdown(head, lines)
    return f"{made}\nNVIDIA H200, 16 cores, PyTorch 2.11.0+cu130; one run each, at commits 387f530 to 48b1fd2, 7eae2e5, 2c2fd71.\n"


def _times(rate: int, plain: int | None) -> str:
    return f"{rate / plain:.2f}x" if plain else "-"


def gpu_kernels() -> str:
    """Where the time of a step goes, of results/gpu/kernels-*.txt, and how fast the sweep was once all of it trained."""
    said = []
    for network in ("resnet32", "resnet18"):
        rows = re.findall(r"([\d.]+) us +([\d.]+) x +[\d.]+ +(.*)", (GPU / f"kernels-{network}.txt").read_text())
        # Optimizer.step is the time between two marks, not a kernel
        kernels = [(float(us), float(count), name) for us, count, name in rows if not name.startswith("Optimizer.step")]
        total, count = sum(us for us, *_ in kernels), sum(number for _, number, _ in kernels)
        norms, zeros = (sum(us for us, _, name in kernels if word in name) / total for word in ("batch_norm", "BitwiseAnd"))
        said.append(
            f"of the {network} {count:.0f} kernels of {total / 1000:.1f} ms in all, batch norms {norms:.0%}, the mask's zeros {zeros:.0%}"
        )
    sweeps: dict[str, tuple[str, int]] = {"48b1fd2": ("two processes of three streams", 6), "7eae2e5": ("one process of eight streams", 8)}
    rates = []
    for (commit, (how, number)), network in product(sweeps.items(), ("resnet18", "resnet32")):
        rows = [row for row in ledger("gpu") if row["versions"]["commit"] == commit and row["settings"]["model"] == network]
        seconds = [row["time"]["seconds"] for row in rows if not row["time"]["mask_seconds"] > 1]  # none that waited for a mask
        if rows:
            rates.append(f"{number * rows[0]['settings']['epochs'] * 45_000 / median(seconds):,.0f} ({network}, {how})")
    return f"A step is, {'; '.join(said)}. Sweeps trained at about {', '.join(rates)} images a second in all.\n"


def gpu_whole() -> str:
    """What plans/gpu-182.toml gave, where some of its trainings were stopped: validation accuracy on the way, and the test's at the end."""
    rows = [row for row in ledger("gpu") if row["settings"]["epochs"] == 182]
    named = [(f"`{row['settings']['recipe']}`", row) for row in rows]
    for row in map(json.loads, (GPU / "stopped.jsonl").read_text().splitlines()):
        recipe = row["settings"]["recipe"]  # `best` was stopped before `density_lr` had its bound for long trainings
        named.append((f"`{recipe}`, c to 10" if recipe == "best" else f"`{recipe}`", row))
    curves = {name: [100 * v for v in row["curves"]["validation_accuracy"]] for name, row in named}
    marks = [30, 60, 90, 111, 135, 180, 182]
    assert {len(curve) for curve in curves.values()} <= set(marks)
    head = ["recipe", *(f"best of {mark} epochs" for mark in marks), "test at the end"]
    lines = []
    for name, row in named:
        curve = curves[name]
        best = [f"{max(curve[:mark]):.2f}" if mark <= len(curve) else "-" for mark in marks]
        lines.append([name, *best, f"{100 * row['accuracy']['test']:.2f}" if "accuracy" in row else "stopped"])
    seconds = rows[0]["time"]["seconds"]
    rate = 45_000 * sum(map(len, curves.values())) / seconds
    made = markdown(head, lines)
    return f"{made}\nBeside each other, with validation and checkpoints, they trained at {rate:,.0f} images a second in all.\n"


PARTS: Mapping[str, Callable[[], str]] = {
    "gpu-short": gpu_short,
    "gpu-table": lambda: table(ledger("gpu")),
    "gpu-whole": gpu_whole,
    "gpu-rates": gpu_rates,
    "gpu-kernels": gpu_kernels,
}
