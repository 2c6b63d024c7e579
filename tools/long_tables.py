"""The parts of docs/ about trainings long enough for weights to settle, made of results/long, results/long-before and results/whole."""

import re
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from ledgers import Rows, ledger
from tables import table as markdown

from anymask.report import paired
from anymask.report.stats import Comparison


def _long() -> Rows:
    """The trainings of 182 epochs on the tuning part; those of other bounds of `density_lr` named by it."""
    rows = ledger("long")
    for row in ledger("long-before"):
        if row["settings"]["epochs"] == 182:  # `best` was another then, so its id is not what tells it apart
            recipe = f"{row['settings']['recipe']}, c to {_most(row)}"
            rows.append({**row, "id": f"{row['id']} {recipe}", "settings": {**row["settings"], "recipe": recipe}})
    return rows


def _most(row: dict[str, Any]) -> str:
    """The largest c of `density_lr` in a training, as its row says what was found."""
    found = re.search(r" to ([\d.]+)", row["found"].get("density_lr", ""))
    return found[1] if found else ""


NAMES = {  # what was a preset for a day
    "best-long": "`best`, decay / c",
    "best-long:density_lr": "`best:density_lr`, decay / c",
}


def _settling(rows: Rows) -> str:
    """Each recipe's loss and validation accuracy at the first rate, and its accuracies at the end, by weight decay."""
    first = rows[0]["curves"]["lr"].count(rows[0]["curves"]["lr"][0])
    head = [
        "weight decay",
        "recipe",
        "largest c",
        f"training loss of epoch {first}",
        f"best validation of {first} epochs",
        "best validation",
        "test",
        "- `default` [95% CI]",
        "seeds",
    ]
    lines = []
    groups: dict[tuple[float, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["settings"]["weight_decay"], row["settings"]["recipe"]), []).append(row)
    apart = {(c.settings["weight_decay"], c.recipe): c for c in paired(rows)}
    for (decay, name), group in sorted(groups.items(), key=lambda item: -item[0][0]):
        curves, beside = [row["curves"] for row in group], apart.get((decay, name))
        lines.append([
            f"{decay:g}",
            NAMES.get(name.partition(",")[0], f"`{name.partition(',')[0]}`"),
            _most(group[0]),
            f"{fmean(c['train_loss'][first - 1] for c in curves):.2f}",
            f"{100 * fmean(max(c['validation_accuracy'][:first]) for c in curves):.1f}",
            f"{100 * fmean(row['accuracy']['validation'] for row in group):.1f}",
            f"{100 * fmean(row['accuracy']['test'] for row in group):.2f}",
            with_interval(beside) + f" (n = {beside.n})" * (beside.n < len(group)) if beside and beside.n else "",
            f"{len(group)}",
        ])  # fmt: skip
    return markdown(head, lines)


def with_interval(found: Comparison) -> str:
    low, high = found.interval or (None, None)
    return f"{found.mean:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if found.interval else "")


def long_short() -> str:
    """What `best` is to `default` where weights settle: the largest weight decay of results/long."""
    found = max((c for c in paired(ledger("long")) if c.recipe == "best" and c.n), key=lambda c: float(c.settings["weight_decay"]))
    return f"{with_interval(found)} points at 98% over 1 mask, n = {found.n}"


def whole_short() -> str:
    """What `best` is to `default` at the full length, on all images and a quarter of the width."""
    (found,) = (c for c in paired(ledger("whole")) if c.recipe == "best")
    return f"{with_interval(found)} points, n = {found.n}"


def bounded_steps() -> str:
    """What `density_lr`, bounded, adds to `best` where weights settle: the largest weight decay of results/long."""
    every = (c for c in paired(ledger("long"), baseline="best:-density_lr") if c.recipe == "best" and c.n)
    found = max(every, key=lambda c: float(c.settings["weight_decay"]))
    return f"`best` - `best:-density_lr`, c of about 2: {with_interval(found)} points, n = {found.n}.\n"


def kept_decay() -> str:
    """What `best` lost in 15 epochs where the weight decay was divided by c."""
    rows = [row for row in ledger("best") if row["settings"]["recipe"] == "best"]
    rows += [row for row in ledger("long-before") if row["settings"]["recipe"] == "best-long"]
    apart = [value for c in paired(rows, baseline="best") if c.recipe == "best-long" for value in c.differences.values()]
    return f"{fmean(apart):+.2f} points on average over {len(apart)} pairs of masks and seeds.\n"


PARTS: Mapping[str, Callable[[], str]] = {
    "long": lambda: _settling(_long()),
    "whole": lambda: _settling(ledger("whole")),
    "whole-short": lambda: f"There, `best` as it is now against `default`: {whole_short()} (random-erk at 98%).\n",
    "bounded-steps": bounded_steps,
    "kept-decay": kept_decay,
}
