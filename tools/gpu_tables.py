"""The parts of docs/ about what ran on a GPU, made of results/gpu."""

import re
from collections.abc import Callable, Iterator, Mapping
from statistics import median

from recipe_tables import ROOT, ledger

from anymask.report import paired, table

GPU = ROOT / "results" / "gpu"


def gpu_short() -> str:
    """One sentence: how the pairs of results/gpu ended."""
    rows = ledger("gpu")
    apart: dict[str, list[float]] = {}
    for c in paired(rows):
        apart.setdefault(c.recipe, []).extend(c.differences.values())
    s = rows[0]["settings"]
    said = " and ".join(
        f"`{recipe}` above `default` in {sum(d > 0 for d in found)} of {len(found)} pairs ({min(found):+.2f} to {max(found):+.2f} points)"
        for recipe, found in apart.items()
    )
    masks = ", ".join(dict.fromkeys(row["settings"]["mask"] for row in rows))
    where = f"The whole {s['model']} on all of {s['data']}, {s['epochs']} epochs, {100 * s['sparsity']:g}% ({masks})"
    return f"{where}, on one {rows[0]['machine']['processor']}: {said}.\n"


def _rates() -> Iterator[tuple[str, str, int, int]]:
    """Network, way, how many at once and images a second in all, of each line of results/gpu/rates.log that has them."""
    for line in (GPU / "rates.log").read_text().splitlines():
        if found := re.match(r"\[ *[\d.]+\] (R32|R18) (bf16|fp32) (eager|graph|streams (\d+)) \(?(\d+)[ ,]", line):
            how = {"bf16": "bfloat16", "fp32": "float32"}[found[2]] + ("" if found[3] == "eager" else ", recorded")
            yield found[1].replace("R", "resnet"), f"fit, {how}", int(found[4] or 1), int(found[5])
        elif found := re.match(r"(resnet\d+) (plain|graph) (\d+)", line):
            yield found[1], "plain loop" if found[2] == "plain" else "fit, bfloat16, recorded", 1, int(found[3])
        elif found := re.match(r"r18 streams (\d+) (\d+)", line):
            yield "resnet18", "fit, bfloat16, recorded", int(found[1]), int(found[2])


def gpu_rates() -> str:
    """Images a second on a GPU: in turns they were not, so each is one run."""
    rows = sorted(_rates(), key=lambda row: (-int(row[0].removeprefix("resnet")), row[3]))
    plain = {network: rate for network, way, _, rate in rows if way == "plain loop"}
    head = ["network", "way", "at once", "images / s in all", "times the plain loop", "182 epochs of 45,000, s a training (computed)"]
    lines = [
        [network, way, str(number), f"{rate:,}", f"{rate / plain[network]:.2f}x", f"{182 * 45_000 / rate:,.0f}"]
        for network, way, number, rate in rows
    ]
    made = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *lines])
    return f"{made}\n\n2026-11-26, NVIDIA H200, 16 cores, PyTorch 2.11.0+cu130, commits 387f530 to 48b1fd2; one run each.\n"


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
    rows = [row for row in ledger("gpu") if row["settings"]["seed"] == 1]  # of which none had to wait for a mask
    rate = 6 * rows[0]["settings"]["epochs"] * 45_000 / median(row["time"]["seconds"] for row in rows)
    return f"A step is, {'; '.join(said)}. The sweep trained at about {rate:,.0f} images a second in all.\n"


PARTS: Mapping[str, Callable[[], str]] = {
    "gpu-short": gpu_short,
    "gpu-table": lambda: table(ledger("gpu")),
    "gpu-rates": gpu_rates,
    "gpu-kernels": gpu_kernels,
}
