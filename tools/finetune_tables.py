"""The parts of docs/ about trained networks that are pruned and fine-tuned, made of results/finetune-rates and results/finetune."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ledgers import ROOT, ledger
from tables import table as markdown

from anymask.report import paired
from anymask.report.stats import Comparison
from anymask.report.table import interval
from anymask.runlog import Ledger

OWN = {
    "vgg11-0.5x": {"default": "0.1", "best": "0.03", "best-slow": "0.03"},
    "resnet18-0.25x": {"default": "0.3", "best": "0.1", "best-slow": "0.1"},
}
LOW, PROTOCOL = "0.03", "0.1"


def at(recipe: str, rate: str) -> str:
    """The name of a recipe at a learning rate, as plans say it."""
    return recipe if rate == PROTOCOL else f"{recipe}@lr={rate}"


def finetune_rates() -> str:
    """Validation accuracies at each learning rate: what the rates of `OWN` were chosen by."""
    return by_rate(ledger("finetune-rates"), ["network", "sparsity"], key=lambda s: (s["model"], f"{100 * s['sparsity']:g}%"))


def by_rate(rows: list[dict[str, Any]], head: list[str], *, key: Callable[[dict[str, Any]], tuple[str, ...]]) -> str:
    """Validation accuracies of one seed at each learning rate: a line for each `key` of the settings and each recipe."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        s = row["settings"]
        recipe, _, rate = s["recipe"].partition("@lr=")
        found.setdefault((*key(s), f"`{recipe}`"), {})[rate or f"{s['lr']:g}"] = 100 * row["accuracy"]["validation"]
    rates = sorted({rate for by in found.values() for rate in by}, key=float)
    first = [*dict.fromkeys(names[0] for names in found)]
    ordered = sorted(found.items(), key=lambda item: (first.index(item[0][0]), item[0]))
    lines = [[*names, *(f"{by[rate]:.2f}" if rate in by else "-" for rate in rates)] for names, by in ordered]
    return markdown([*head, "recipe", *(f"lr {rate}" for rate in rates)], lines)


@dataclass(frozen=True)
class Tuned:
    """One network at one sparsity: `best` and `best-slow` beside `default`, each at its own rate, and `best` beside it at a low one."""

    model: str
    sparsity: float
    best: Comparison
    slow: Comparison
    low: Comparison


def _tuned() -> Iterator[Tuned]:
    rows = ledger("finetune")
    by = {base: paired(rows, baseline=base) for base in {at("default", rate) for rate in (LOW, *(own["default"] for own in OWN.values()))}}
    for model, sparsity in dict.fromkeys((row["settings"]["model"], row["settings"]["sparsity"]) for row in rows):

        def beside(recipe: str, base: str, where: tuple[str, float] = (model, sparsity)) -> Comparison:
            return next(c for c in by[base] if c.recipe == recipe and (c.settings["model"], c.settings["sparsity"]) == where)

        own = {recipe: at(recipe, rate) for recipe, rate in OWN[model].items()}
        best, slow = (beside(own[recipe], own["default"]) for recipe in ("best", "best-slow"))
        yield Tuned(model, sparsity, best, slow, beside(at("best", LOW), at("default", LOW)))


def finetune() -> str:
    """A line for each of them, beside the dense networks that were pruned (results/finetune/dense.jsonl, the rows of their trainings)."""
    trained = Ledger(ROOT / "results" / "finetune" / "dense.jsonl").rows()
    dense = {model: fmean(100 * row["accuracy"]["test"] for row in trained if row["settings"]["model"] == model) for model in OWN}
    low = f"at {LOW}"
    head = ["network", "sparsity", "dense", "`default`", "`best` - `default`", "`best-slow` - `default`"]
    head += [f"`default` {low}", f"`best` - `default`, both {low}", "seeds"]
    lines = [
        [
            t.model,
            f"{100 * t.sparsity:g}%",
            f"{dense[t.model]:.2f}",
            f"{t.best.baseline_mean:.2f}",
            interval(t.best),
            interval(t.slow),
            f"{t.low.baseline_mean:.2f}",
            interval(t.low),
            f"{t.best.n}",
        ]
        for t in _tuned()
    ]
    own = "; ".join(f"{model}: {', '.join(f'`{recipe}` {rate}' for recipe, rate in rates.items())}" for model, rates in OWN.items())
    return f"{markdown(head, lines)}\nLearning rates, unless a column says another ({own}).\n"


def finetune_short() -> str:
    """It in a sentence: the range of the differences, and how many of their intervals decide."""
    found = list(_tuned())
    own, low = (_range([getattr(t, which) for t in found]) for which in ("best", "low"))
    where = f"{' and '.join(OWN)} at {' and '.join(f'{100 * s:g}%' for s in sorted({t.sparsity for t in found}))} sparsity"
    return (
        f"`best` against `default` in fine-tuning ({where}, {found[0].best.n} seeds): {own}, each at the rate that it likes best; "
        f"{low}, both at {LOW}.\n"
    )


def _range(several: list[Comparison]) -> str:
    means = [c.mean for c in several if c.mean is not None]
    above, below = (sum(c.verdict == verdict for c in several) for verdict in ("won", "lost"))
    lost = f", {below} below" if below else ""
    return f"{min(means):+.2f} to {max(means):+.2f} points ({above} of {len(several)} intervals above 0{lost})"


PARTS: Mapping[str, Callable[[], str]] = {
    "finetune": finetune,
    "finetune-rates": finetune_rates,
    "finetune-short": finetune_short,
}
