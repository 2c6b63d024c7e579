"""The tables and plots of docs/speed.md, made of what the benchmarks wrote under results/sparse/."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from svg_plot import Line, Panel, figure
from tables import table

from anymask.runlog import Ledger

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "sparse"
NOTHING = "Not measured yet.\n"
GROUPS = (
    "conv forward", "conv gradients", "norm forward", "norm gradient", "relu and add", "pools",
    "layout", "optimiser", "other",
)  # fmt: skip
OTHERS = ("SparseProp", "sparselab", "PyTorch CSR", "SciPy CSR")
Rows = list[dict[str, Any]]


def part(name: str, make: Callable[[Rows], str]) -> Callable[[], str]:
    """A part of a page, made of results/sparse/`name`.json, or a sentence where that is not there."""
    return lambda: make(rows) if (rows := results(name)) else NOTHING


def results(name: str) -> Rows:
    """What results/sparse/`name`.json holds; nothing where there is none."""
    path = RESULTS / f"{name}.json"
    found: Rows = json.loads(path.read_text())["results"] if path.exists() else []
    return found


def made_on(name: str) -> str:
    """One sentence: where and with what."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return NOTHING
    found = json.loads(path.read_text())
    m = found["machine"]
    minutes = sum(row["seconds"] for row in found["results"]) / 60
    begun = "" if found["finished"] else " Not all cases have been measured yet."
    return (
        f"Measured {m['when'][:10]} on {m['processor']}, {m['cores']} cores, {m['threads']} threads, kernels for {m['isa']}, "
        f"PyTorch {m['torch']}, Python {m['python']}; load {m['load before']} before; the script took {minutes:.1f} minutes.{begun}\n"
    )


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mb(value: float) -> str:
    return f"{value / 1e6:,.1f}" if value >= 1e7 else f"{value / 1e6:.2f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def _sparsities(rows: Rows) -> list[float]:
    return sorted({case["sparsity"] for row in rows for case in row.get("cases", [row])})


def _by_mask(row: dict[str, Any]) -> dict[str, dict[float, dict[str, Any]]]:
    masks: dict[str, dict[float, dict[str, Any]]] = {}
    for case in row["cases"]:
        masks.setdefault(case["mask"], {})[case["sparsity"]] = case
    return masks


def _grid(rows: Rows, head: list[str], first: Callable[[dict[str, Any]], list[str]], cell: Callable[[dict[str, Any]], str]) -> str:
    """A line for each network and mask, a column for each sparsity."""
    sparsities = _sparsities(rows)
    lines = [
        [*first(row)[:1], mask, *first(row)[1:], *(cell(cases[s]) if s in cases else "-" for s in sparsities)]
        for row in rows
        for mask, cases in _by_mask(row).items()
    ]
    return table([head[0], "mask", *head[1:], *(f"{s:.2f}" for s in sparsities)], lines)


# -- training -------------------------------------------------------------------------------------------------------
def training(rows: Rows) -> str:
    """Speedups of whole steps over the fastest dense setting."""
    head = ["network, batch", "fastest dense, ms"]
    return _grid(rows, head, lambda row: [f"{row['name']}, {row['batch']}", f"{_ms(_best(row))} ({row['fastest']})"], _speed)


def _best(row: dict[str, Any]) -> float:
    value: float = row["dense"][row["fastest"]]["ms"]
    return value


def _speed(case: dict[str, Any]) -> str:
    return f"**{_times(case['speedup'])}** ({_ms(case['time']['ms'])} ms)"


def training_dense(rows: Rows) -> str:
    """Milliseconds of the dense step in each setting."""
    settings = list(dict.fromkeys(setting for row in rows for setting in row["dense"]))
    lines = [[row["name"], *(_ms(row["dense"][s]["ms"]) if s in row["dense"] else "-" for s in settings)] for row in rows]
    return table(["dense step, ms", *settings], lines)


def training_limit(rows: Rows) -> str:
    """How near a step is to the least that its own operations and bytes take."""
    peaks = [f"{row['name']} {row['peak']['gflops']:.0f} GFLOP/s and {row['peak']['gbytes']:.0f} GB/s" for row in rows]
    cells = _grid(rows, ["network"], lambda row: [row["name"]], _limit)
    return cells + f"\nThe peaks, measured before each network: {'; '.join(peaks)}.\n"


def _limit(case: dict[str, Any]) -> str:
    limit = case["limit"]
    return f"{limit['reached']:.0%} ({_ms(limit['limit ms'])} of {_ms(case['time']['ms'])} ms)"


def training_where(rows: Rows) -> str:
    """Milliseconds of a step by group of operators."""
    every = [row["dense where"]["ms"] for row in rows] + [case["where ms"] for row in rows for case in row["cases"]]
    groups = [group for group in GROUPS if any(group in found for found in every)]
    lines = []
    for row in rows:
        lines.append([row["name"], f"dense, {row['dense where']['setting']}", *_shares(row["dense where"]["ms"], groups)])
        lines += [[row["name"], f"{case['mask']} {case['sparsity']:.2f}", *_shares(case["where ms"], groups)] for case in row["cases"]]
    return table(["network", "", *groups], lines)


def _shares(found: dict[str, float], groups: list[str]) -> list[str]:
    return [_ms(found[group]) if group in found else "-" for group in groups]


def training_memory(rows: Rows) -> str:
    """Megabytes of weights, gradients and momentum."""
    return _grid(
        rows,
        ["network", "dense, MB"],
        lambda row: [row["name"], _mb(_held(row["dense bytes"]))],
        lambda case: f"{_mb(_held(case['bytes']))} + {_mb(case['bytes']['tables'])}",
    )


def _held(found: dict[str, int]) -> int:
    return found["weights"] + found["gradients"] + found["slots"]


def training_figure() -> str | None:
    """Speedup of a training step against sparsity."""
    rows = results("training")
    lines = [line for row in rows for line in _lines(row["name"], row)]
    return figure([Panel("training step, against the fastest dense", lines)], caption=_dashes(rows)) if rows else None


def _lines(name: str, row: dict[str, Any]) -> list[Line]:
    masks = _by_mask(row).values()
    return [Line(name, [(s, case["speedup"]) for s, case in cases.items()], dashed=n > 0) for n, cases in enumerate(masks)]


def _dashes(rows: Rows) -> str:
    masks = list(dict.fromkeys(case["mask"] for row in rows for case in row["cases"]))
    return "; ".join(f"{kind}: {mask}" for kind, mask in zip(("solid", "dashed"), masks, strict=False)) + "; 1x: as fast as dense"


# -- inference ------------------------------------------------------------------------------------------------------
def _batches(rows: Rows) -> Rows:
    return [row for row in rows if "batch" in row]


def inference(rows: Rows) -> str:
    """Speedups over the fastest of all others."""
    head = ["network, batch", "fastest dense, ms"]
    return _grid(_batches(rows), head, lambda row: [f"{row['network']}, {row['batch']}", f"{_ms(_best(row))} ({row['fastest']})"], _speed)


def inference_each(rows: Rows) -> str:
    """Speedups over each of the others."""
    rows = _batches(rows)
    others = list(dict.fromkeys(other for row in rows for other in row["dense"]))
    lines = [
        [f"{row['network']}, {row['batch']}", f"{case['mask']} {case['sparsity']:.2f}", _ms(case["time"]["ms"])]
        + [_times(case["against each"][other]) if other in case["against each"] else "-" for other in others]
        for row in rows
        for case in row["cases"]
    ]
    off = max(case["difference from PyTorch"] for row in rows for case in row["cases"])
    said = f"\nThe outputs differ from PyTorch's by at most {off:.1e}. {' '.join(_notes(rows))}".rstrip() + "\n"
    return table(["network, batch", "mask", "ms", *others], lines) + said


def _notes(rows: Rows) -> list[str]:
    return [f"{note}." for note in dict.fromkeys(note for row in rows for note in row["notes"])]


def file_sizes(rows: Rows) -> str:
    """Sizes of files, positions included."""
    lines = [
        [f"{row['network']}, {case['mask']} {case['sparsity']:.2f}", *_file(case)]
        for row in rows
        if "batch" not in row
        for case in row["cases"]
    ]
    head = ["network, mask", "kept weights", "file, MB", "dense in float32, MB", "bits a kept weight", "outputs off by, of the largest"]
    return table(head, lines) if lines else NOTHING


def _file(case: dict[str, Any]) -> list[str]:
    sizes = (f"{case['bytes'] / 1e6:.3f}", f"{case['dense bytes'] / 1e6:.1f}", f"{8 * case['bytes'] / case['kept']:.1f}")
    return [f"{case['kept']:,}", *sizes, f"{case['difference'] / case['largest output']:.1e}"]


def inference_figure() -> str | None:
    """Speedup against sparsity, a panel a batch size."""
    rows = _batches(results("inference"))
    batches = sorted({row["batch"] for row in rows})
    lines = {batch: [line for row in rows if row["batch"] == batch for line in _lines(row["network"], row)] for batch in batches}
    panels = [Panel(f"batch {batch}, against the fastest dense", found) for batch, found in lines.items()]
    return figure(panels, caption=_dashes(rows)) if rows else None


# -- whole trainings ------------------------------------------------------------------------------------------------
def trainer(rows: Rows) -> str:
    """Images a second of each way to train, and of several trainings at once."""
    lines = []
    for row in rows:
        for way in row["ways"]:
            rate, times = f"{way['images a second']:,.0f}", _times(way["times the plain loop"])
            lines.append([row["name"], way["way"], rate, times, f"{way['share of peak']:.0%}", _ms(way["first epoch s"])])
        for case in row["beside"]:
            rate, times = f"{case['images a second']:,.0f}", f"{case['times one']:.2f}x one"
            lines.append([row["name"], f"{case['trainings']} at once", rate, times, "-", "-"])
    head = ["network", "way", "images / s", "times the plain loop", "of the peak", "first epoch, s"]
    about = f"Batches of {rows[0]['batch']}, {rows[0]['images']:,} images an epoch, masks random-erk at {rows[0]['sparsity']}."
    return table(head, lines) + f"\n{about}\n"


# -- layers ---------------------------------------------------------------------------------------------------------
def layers(rows: Rows) -> str:
    """Times as fast as the faster dense layout, by layer."""
    kinds = ("anymask", "anymask, from channels_last", *OTHERS)
    lines = [[row["layer"], f"{row['sparsity']:.2f}", _ms(row["times"][row["fastest"]]["ms"]), *_speeds(row, kinds)] for row in rows]
    off = max(off for row in rows for off in row["differences"].values())
    said = f"Outputs and gradients of all of them differ from dense by at most {off:.1e} of the largest entry."
    return table(["layer", "sparsity", "dense, ms", *kinds], lines) + f"\nBatch {rows[0]['batch']}. {said}\n"


def _speeds(row: dict[str, Any], kinds: Iterable[str]) -> list[str]:
    found = [row["speedup"].get(kind, "-") for kind in kinds]
    return [value if isinstance(value, str) else _times(value) for value in found]


def layers_figure() -> str | None:
    """Speedup against sparsity of ours, and of SparseProp where it was there."""
    rows = results("layers")
    panels = []
    for kind in ("anymask", "anymask, from channels_last", "SparseProp"):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if isinstance(row["speedup"].get(kind), float):
                points.setdefault(row["layer"], []).append((row["sparsity"], row["speedup"][kind]))
        panels += [Panel(kind, [Line(layer, found) for layer, found in points.items()])] if points else []
    return figure(panels, caption="Forward and both gradients, against the faster dense layout; 1x: as fast") if rows else None


def short() -> str:
    """For the README: training and prediction with the first mask, times as fast as the fastest dense setting."""
    rows = [(f"train {row['name']}, batch {row['batch']}", row) for row in results("training")]
    rows += [(f"predict with {row['network']}, batch {row['batch']}", row) for row in _batches(results("inference")) if row["batch"] != 32]
    if not rows:
        return NOTHING
    sparsities = _sparsities([row for _, row in rows])
    lines = []
    for what, row in rows:
        mask, cases = next(iter(_by_mask(row).items()))
        lines.append([what, _ms(_best(row)), *(_times(cases[s]["speedup"]) if s in cases else "-" for s in sparsities)])
    said = f"\nMasks: {mask}; those by ERK gain less (docs/speed.md). {_files_short(results('inference'))}".rstrip() + "\n"
    return table(["", "fastest dense, ms", *(f"{s:.0%} zeros" for s in sparsities)], lines) + said


def _files_short(rows: Rows) -> str:
    cases = [(row["network"], case) for row in rows if "batch" not in row for case in row["cases"]]
    found = [(network, case) for network, case in cases if case["mask"] == cases[0][1]["mask"]]
    if not found:
        return ""
    sizes = [f"{case['bytes'] / 1e6:.2f} MB at {case['sparsity']:.0%}" for _, case in found]
    network, case = found[0]
    return f"The file of {network} in {case['values']}: {', '.join(sizes)}; dense in float32: {case['dense bytes'] / 1e6:.1f} MB."


def demo() -> str:
    """The demo's masked trainings, with sparse layers and without: accuracy within each pair, and the time of all."""
    files = ROOT / "results" / "demo" / "ledger.jsonl", RESULTS / "demo-dense.jsonl"
    if not all(file.exists() for file in files):
        return NOTHING
    sparse, dense = ({row["id"]: row for row in Ledger(file).rows() if row["settings"]["mask"] != "dense"} for file in files)
    both = [(sparse[name], dense[name]) for name in dense if name in sparse]
    off = [100 * (ours["accuracy"]["test"] - theirs["accuracy"]["test"]) for ours, theirs in both]
    took, without = (sum(row["time"]["seconds"] for row in rows) for rows in zip(*both, strict=True))
    return (
        f"{len(both)} trainings, each with sparse layers and without: {took:.0f} s instead of {without:.0f} s in all, "
        f"{without / took:.2f} times as fast. "
        f"Test accuracy differs within a pair by {mean(off):+.2f} points on average, standard deviation {stdev(off):.2f}.\n"
    )


PARTS: dict[str, Callable[[], str]] = {
    "demo-sparse": demo,
    "speed-short": short,
    "training-machine": partial(made_on, "training"),
    "training-plot": part("training", lambda _: "![Speedup of a training step against sparsity](figures/training.svg)\n"),
    "training-speed": part("training", training),
    "training-before": part("training-2026-11-24", training),
    "training-before-dense": part("training-2026-11-24", training_dense),
    "training-dense": part("training", training_dense),
    "training-limit": part("training", training_limit),
    "training-where": part("training", training_where),
    "training-memory": part("training", training_memory),
    "trainer-machine": partial(made_on, "trainer"),
    "trainer-table": part("trainer", trainer),
    "inference-machine": partial(made_on, "inference"),
    "inference-plot": part("inference", lambda _: "![Speedup of inference against sparsity](figures/inference.svg)\n"),
    "inference-speed": part("inference", inference),
    "inference-each": part("inference", inference_each),
    "file-sizes": part("inference", file_sizes),
    "layers-machine": partial(made_on, "layers"),
    "layers-plot": part("layers", lambda _: "![Speedup of single layers against sparsity](figures/layers.svg)\n"),
    "layers-table": part("layers", layers),
}
FIGURES: dict[str, Callable[[], str | None]] = {  # file -> its text, None where nothing was measured
    "docs/figures/training.svg": training_figure,
    "docs/figures/inference.svg": inference_figure,
    "docs/figures/layers.svg": layers_figure,
}
