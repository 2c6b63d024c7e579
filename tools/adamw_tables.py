"""The parts of docs/ about `best` with AdamW, made of results/adamw-rates and results/adamw."""

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from finetune_tables import by_rate
from ledgers import Rows, ledger
from long_tables import with_interval
from tables import table as markdown

from anymask.report import paired
from anymask.report.stats import Comparison, Overall, overall
from anymask.report.table import interval


def _begun(settings: Mapping[str, Any]) -> str:
    return "trained, pruned" if "weights" in settings else "from scratch"


def adamw_rates() -> str:
    """Validation accuracies at each learning rate: what the rates of plans/adamw-two-cores.toml were chosen by."""
    return by_rate(
        ledger("adamw-rates"),
        ["weights", "sparsity", "mask"],
        key=lambda s: (_begun(s), f"{100 * s['sparsity']:g}%", s["mask"]),
    )


def _rates(rows: Rows, begun: str) -> str:
    """The learning rates of the two recipes."""
    there = [row["settings"] for row in rows if _begun(row["settings"]) == begun]
    recipes = dict.fromkeys(s["recipe"] for s in there)
    rates = {recipe.partition("@lr=")[0]: recipe.partition("@lr=")[2] or f"{there[0]['lr']:g}" for recipe in recipes}
    return ", ".join(f"`{recipe}` {rate}" for recipe, rate in rates.items())


def adamw() -> str:
    """A line for each mask, and one for all masks of a network that begins from scratch."""
    rows = ledger("adamw")
    head = ["weights", "learning rates", "sparsity", "mask", "`default`", "`best` - `default`", "seeds"]
    found: list[tuple[Comparison | Overall, str]] = [(c, c.settings["mask"]) for c in paired(rows)]
    found += [(o, f"all {o.cells}") for o in overall(paired(rows)) if o.cells > 1]
    ordered = sorted(found, key=lambda of: (_begun(of[0].settings), -of[0].settings["sparsity"], isinstance(of[0], Overall)))
    lines = [
        [
            _begun(c.settings),
            _rates(rows, _begun(c.settings)),
            f"{100 * c.settings['sparsity']:g}%",
            mask,
            f"{c.baseline_mean:.2f}",
            interval(c),
            f"{c.n}",
        ]
        for c, mask in ordered
    ]
    scratch = {(s["mask"], s["seed"]) for row in rows if _begun(s := row["settings"]) == "from scratch"}
    found_by = {recipe: _by_sgd(rows, recipe, scratch) for recipe in ("default", "best")}
    by_sgd = " and ".join(f"{fmean(found):.2f} with `{recipe}`" for recipe, found in found_by.items())
    return f"{markdown(head, lines)}\nFrom scratch with SGD, at the protocol's rate, the same masks and seeds end at {by_sgd}.\n"


def _by_sgd(rows: Rows, recipe: str, scratch: set[tuple[str, int]]) -> list[float]:
    """Test accuracies, in %, of the same network and images with SGD."""
    like = next(row["settings"] for row in rows if _begun(row["settings"]) == "from scratch")
    same = ("data_hash", "model", "epochs", "sparsity", "schedule")
    found = {
        (s["mask"], s["seed"]): 100 * row["accuracy"]["test"]
        for row in ledger("best")
        if (s := row["settings"])["recipe"] == recipe and all(s[key] == like[key] for key in same)
    }
    return [found[of] for of in sorted(scratch)]


def adamw_short() -> str:
    """It in a sentence."""
    rows = ledger("adamw")
    scratch = [
        f"{with_interval(o)} at {100 * o.settings['sparsity']:g}% over {o.cells} masks" for o in overall(paired(rows)) if o.cells > 1
    ]
    fine = [f"{with_interval(c)} at {100 * c.settings['sparsity']:g}%" for c in paired(rows) if _begun(c.settings) != "from scratch"]
    n = max(c.n for c in paired(rows))
    return (
        f"With AdamW, vgg11-0.5x, each recipe at the rate that it likes best, n = {n}: `best` against `default` from scratch "
        f"{', '.join(scratch)}; in fine-tuning {' and '.join(fine)} (points).\n"
    )


PARTS: Mapping[str, Callable[[], str]] = {
    "adamw": adamw,
    "adamw-rates": adamw_rates,
    "adamw-short": adamw_short,
}
