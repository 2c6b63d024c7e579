"""The parts of docs/ about `best` and about single techniques, made of results/best and results/screen."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from anymask.report import paired, table
from anymask.report.stats import Comparison
from anymask.runlog import Ledger
from anymask.techniques import TECHNIQUES

ROOT = Path(__file__).resolve().parent.parent
Rows = list[dict[str, Any]]


def ledger(name: str) -> Rows:
    """The rows of results/`name`/ledger.jsonl."""
    return Ledger(ROOT / "results" / name / "ledger.jsonl").rows()


def named(found: Rows) -> Rows:
    """The rows, each recipe named by what it holds."""
    return [{**row, "settings": {**row["settings"], "recipe": contents(row)}} for row in found]


def contents(row: dict[str, Any]) -> str:
    """The techniques of a run with the settings that differ from their defaults, and a learning rate that is not the protocol's."""
    held = " + ".join(_contents(dict(technique)) for technique in row["techniques"]) or "default"
    return held if "lr=" not in row["settings"]["recipe"] else f"{held}, lr={row['settings']['lr']:g}"


def _contents(technique: dict[str, Any]) -> str:
    kind = TECHNIQUES[technique.pop("name")]
    default = asdict(kind())
    parts = [f"{key}={value}" for key, value in technique.items() if not isinstance(value, dict) and value != default[key]]
    parts += [f"{key}={value}" for key, value in technique.get("settings", {}).items() if value != default["settings"][key]]
    fade = technique["schedule"]
    ends = [] if kind.seam != "model" else [f"{fade['shape']} to {fade['end']}"]
    return f"{kind.name}({', '.join([*ends, *parts])})"


# -- best ------------------------------------------------------------------------------------------------------------
def best() -> str:
    """All recipes on the report part of CIFAR-100, against default, then against tost."""
    rows = ledger("best")
    beside = [row for row in rows if row["settings"]["recipe"] != "default" and row["settings"]["sparsity"] == 0.98]
    return f"{table(rows)}\n{table(beside, baseline='tost')}"


def best_costs() -> str:
    """One sentence: what a training of each recipe takes, beside the default one of the same mask and seed."""
    seconds: dict[str, list[float]] = {}
    by = {_key(row): row["time"]["seconds"] for row in ledger("best")}
    for (recipe, *cell), took in by.items():
        if recipe != "default" and ("default", *cell) in by:
            seconds.setdefault(recipe, []).append(took / by[("default", *cell)])
    found = ", ".join(f"`{recipe}` {median(ratios):.2f} times ({len(ratios)} pairs)" for recipe, ratios in seconds.items())
    return f"A training takes, against the default one of the same mask and seed, by the median: {found}.\n"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    s = row["settings"]
    return s["recipe"], s["mask"], s["sparsity"], s["seed"]


# -- single techniques -------------------------------------------------------------------------------------------------
def alone(technique: str) -> Callable[[], str]:
    """A part: what a technique gave by itself, with the settings that were tried."""

    def made() -> str:
        found = [c for c in paired(named(ledger("screen"))) if c.recipe.startswith(f"{technique}(") and " + " not in c.recipe]
        return "; ".join(map(_said, found)) + ".\n" if found else "nothing yet.\n"

    return made


def _said(found: Comparison) -> str:
    inside = found.recipe.partition("(")[2].removesuffix(")")
    how = f"`{inside}` " if inside else ""
    where = f"{found.settings['mask']} at {100 * found.settings['sparsity']:g}%"
    spread = f" ± {found.half_width:.1f}" if found.half_width is not None else ""
    return f"{how}{found.mean:+.1f}{spread} points on {where} (n = {found.n})"


PARTS: Mapping[str, Callable[[], str]] = {
    "best-table": best,
    "best-costs": best_costs,
    **{f"alone-{name.replace('_', '-')}": alone(name) for name in TECHNIQUES},
}
