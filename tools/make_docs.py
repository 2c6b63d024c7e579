"""Fill the parts of README.md and docs/ that are made from committed ledgers, and draw docs/figures/.

    python tools/make_docs.py            write them
    python tools/make_docs.py --check    exit 1 where a file is not what this would write

A part stands between `<!-- made by NAME -->` and `<!-- end -->`; NAME is a function of PARTS below.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import adamw_tables
import finetune_tables
import gpu_tables
import long_tables
import method_tables
import network_table
import recipe_tables
import speed_tables
from ledgers import ledger, named
from tables import table as markdown

from anymask.report import grid, table
from anymask.runlog import Ledger

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("evidence", "lab", "masks", "networks", "speed", "techniques", "which")
FILES = ("README.md", *(f"docs/{page}.md" for page in PAGES))
PART = re.compile(r"(<!-- made by ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(name: str) -> list[dict]:
    """The rows of results/`name`.jsonl."""
    return Ledger(ROOT / "results" / f"{name}.jsonl").rows()


def of(name: str, what: str, wanted: set[str]) -> list[dict]:
    """The rows of results/`name`/ledger.jsonl whose setting `what` is one of these."""
    return [row for row in ledger(name) if row["settings"][what] in wanted]


def seconds(name: str) -> str:
    """One sentence: how long the trainings of a ledger took, and where."""
    found = ledger(name)
    time = sum(row["time"]["seconds"] + row["time"]["mask_seconds"] for row in found)
    machine = found[-1]["machine"]
    return f"{len(found)} trainings, {time / 60:.1f} minutes of computing ({machine['device']}, {machine['threads']} threads).\n"


def fits() -> str:
    """One sentence: that the dense network of the demo fits its training set."""
    dense = [row for row in ledger("demo") if row["settings"]["mask"] == "dense"]
    loss = fmean(row["curves"]["train_loss"][-1] for row in dense)
    weights = dense[0]["parameters"]
    return f"The dense network has {weights:,} parameters and ends at a training loss of {loss:.3f} (mean of {len(dense)} seeds).\n"


def tuning() -> str:
    """The tuning runs, each recipe named by what it holds."""
    return grid(named(ledger("tuning")))


def tuning_early() -> str:
    """The first tuning runs: the learning rates of the default recipe, then what recipes did."""
    found = named(ledger("tuning-early"))
    defaults = [row for row in found if row["settings"]["recipe"] == "default" and row["settings"]["model"] == "demonet"]
    return table(defaults) + "\n" + grid(found)


def times() -> str:
    """How long the two commands take in a fresh clone."""
    measured = json.loads((ROOT / "results" / "times.json").read_text())
    lines = [f"- `{command}`: {value:.1f} minutes" for command, value in measured["minutes"].items()]
    return "\n".join([*lines, f"\nMeasured in fresh clones on {measured['machine']}, installation included.\n"])


def overhead() -> str:
    """What benchmarks/overhead.py measured: time as a ratio to the plain step, memory in MB where it was counted."""
    measured = json.loads((ROOT / "results" / "overhead.json").read_text())["results"]
    kinds = list(measured[0]["ratios"])
    lines = []
    for m in measured:
        cells = [f"{m['ratios'][kind]:.3f}" + (f" ({m['megabytes'][kind]:.0f} MB)" if m["megabytes"] else "") for kind in kinds]
        lines.append([f"{m['model']}, {m['batch']}{', compiled' if m['compiled'] else ''}", *cells])
    return markdown(["network, batch", *kinds], lines)


def networks() -> str:
    """What tools/networks.py found, a line a network."""
    return network_table.table(results("networks"))


def fine_tuning() -> str:
    """What tools/fine_tuning.py measured: test accuracy of each recipe, and the difference to the default one within a seed."""
    found = results("fine_tuning")
    by = {recipe: {r["seed"]: r for r in found if r["recipe"] == recipe} for recipe in dict.fromkeys(r["recipe"] for r in found)}
    lines = []
    for recipe, seeds in by.items():
        gain = [row["test"] - by["default"][seed]["test"] for seed, row in seeds.items()]
        cells = (_spread([r["pruned"] for r in seeds.values()]), _spread([r["test"] for r in seeds.values()]), _spread(gain))
        kept = all(row["every zero kept"] for row in seeds.values())
        lines.append([recipe, *cells, f"{len(seeds)}", "yes" if kept else "NO"])
    head = ["recipe", "pruned, before", "fine-tuned", "difference to default", "seeds", "every zero kept"]
    return markdown(head, lines) + "\nMean ± sample standard deviation over the seeds.\n"


def refitting() -> str:
    """What tools/refitting.py measured, a line a network, mask and sparsity: means of the seeds."""
    found = results("refitting")
    by: dict[tuple, list[dict]] = {}
    for row in found:
        by.setdefault((row["model"], row["mask"], row["sparsity"]), []).append(row)
    head = ["network", "mask", "sparsity", "dense", "pruned", "norms anew", "refitted", "refitted - dense", "outputs unexplained", "seeds"]
    lines = []
    for (model, mask, sparsity), several in by.items():
        means = [f"{fmean(r[name] for r in several):.2f}" for name in ("dense", "pruned", "norms", "refitted")]
        lost = [r["refitted"] - r["dense"] for r in several]
        shares = " to ".join(f"{fmean(r[name] for r in several):.0%}" for name in ("unexplained_before", "unexplained"))
        spread = _spread(lost) if len(lost) > 1 else f"{lost[0]:.2f}"
        lines.append([model, mask, f"{sparsity:.0%}", *means, spread, shares, f"{len(several)}"])
    times = [r["seconds"] for r in found]
    return markdown(head, lines) + f"\nRefitting took {min(times):.0f} to {max(times):.0f} seconds (2 threads, a busy machine).\n"


def refitting_short() -> str:
    """One sentence of it, for the README: the first network and mask at each sparsity."""
    found = results("refitting")
    first = [r for r in found if (r["model"], r["mask"]) == (found[0]["model"], found[0]["mask"])]
    means = {
        sparsity: [fmean(r[name] for r in first if r["sparsity"] == sparsity) for name in ("pruned", "refitted")]
        for sparsity in sorted({r["sparsity"] for r in first})
    }
    said = "{:.1f}% at {:.0%} sparsity ({:.1f}% before it)"
    each = ", ".join(said.format(refitted, sparsity, pruned) for sparsity, (pruned, refitted) in means.items())
    seeds = len({r["seed"] for r in first})
    dense = fmean(r["dense"] for r in first)
    where = f"{found[0]['model']} on a fifth of CIFAR-100, pruned by {found[0]['mask']}, {seeds} seeds"
    return f"Test accuracy, {where}: {dense:.1f}% dense; after refitting {each}.\n"


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f} ± {stdev(values):.2f}"


def references() -> str:
    """How far each mask method is from its formula written out a second time, by tools/compare_references.py."""
    measured = json.loads((ROOT / "results" / "references.json").read_text())
    made = ", ".join(f"{name} {version}" for name, version in measured["made with"].items())
    head = ["method", "cases", "scores differ at most by", "masks: equal entries", "whole masks, until a tie, tie at once"]
    lines = [_reference(method, found) for method, found in measured["methods"].items()]
    return markdown(head, lines) + f"\nMade with {made}, on a CPU.\n"


def _reference(method: str, found: dict) -> list[str]:
    equal = f"{found['agree']:,} of {found['entries']:,}"
    if found["difference"] is None:
        return [method, f"{found['cases']}", "-", f"counts of layers: {equal}", "-"]
    masks = ", ".join(str(found[key]) for key in ("whole masks", "until a tie", "tie at once"))
    apart = f"{found['difference']:.1e}" if found["difference"] else "0"
    return [method, f"{found['cases']}", apart, equal, masks]


def costs() -> dict[tuple[str, float], dict]:
    """What benchmarks/methods.py measured on the demo's network, by (method, sparsity)."""
    measured = json.loads((ROOT / "results" / "methods.json").read_text())["results"]
    return {(m["method"], m["sparsity"]): m for m in measured if m["model"] == "demonet"}


PARTS: dict[str, Callable[[], str]] = {
    "methods-table": lambda: method_tables.methods(ledger("methods"), costs()),
    "methods-luck": lambda: method_tables.luck(ledger("methods"), "`tost` - `default`, a mask and a sparsity each"),
    "growth": lambda: method_tables.growth(json.loads((ROOT / "results" / "methods.json").read_text())["results"]),
    "moving-default": lambda: method_tables.moving(ledger("methods"), recipe="default", against="default"),
    "moving-tost": lambda: method_tables.moving(ledger("methods"), recipe="tost", against="tost"),
    "moving-both": lambda: method_tables.moving(ledger("methods"), recipe="tost", against="default"),
    "demo-table": lambda: table(ledger("demo")) + "\n" + seconds("demo") + fits(),
    "demo-best": lambda: recipe_tables.differences(ledger("demo-best")),
    "times": times,
    "masks-table": lambda: table(of("evidence", "recipe", {"default", "tost"})),
    "techniques-grid": lambda: grid(of("evidence", "mask", {"random-erk", "synflow"})),
    "verdicts": lambda: method_tables.luck(ledger("evidence"), "a recipe, a mask, a sparsity each"),
    "overhead": overhead,
    "networks": networks,
    "fine-tuning": fine_tuning,
    "refitting": refitting,
    "refitting-short": refitting_short,
    "evidence-time": lambda: seconds("evidence"),
    "tuning-grid": tuning,
    "tuning-early": tuning_early,
    "references": references,
    "cifar100-table": lambda: table(ledger("cifar100")) + "\n" + seconds("cifar100"),
    **adamw_tables.PARTS,
    **finetune_tables.PARTS,
    **gpu_tables.PARTS,
    **long_tables.PARTS,
    **recipe_tables.PARTS,
    **speed_tables.PARTS,
}


def made(text: str) -> str:
    """`text` with every marked part made anew."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}{match[3]}", text)


def written() -> dict[str, str]:
    """What each file is to hold: the pages with their parts made anew, the figures of what was measured."""
    pages = {name: made((ROOT / name).read_text(encoding="utf-8")) for name in FILES}
    drawn = {name: draw() for name, draw in speed_tables.FIGURES.items()}
    return {**pages, **{name: text for name, text in drawn.items() if text is not None}}


def main() -> int:
    stale = []
    for name, text in written().items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"not what tools/make_docs.py writes: {', '.join(stale)}; run it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
