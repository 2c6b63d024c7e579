"""What failed: a recipe that diverges is not to vanish from a report, nor to be judged by the seeds that it survived without a word."""

from collections.abc import Iterable, Sequence
from typing import Any

from anymask.report.cells import Row, differing, of_a_run
from anymask.report.contents import contents, flat
from anymask.report.table import NONE, Table

SURVIVORS = "What failed is in no average: where others with the same settings finished, it is over the seeds that finished alone."
_LONGEST = 120  # characters of a reason


def failed_table(failures: Iterable[Row], rows: Sequence[Row]) -> list[Table]:
    """A table of what is in `failures`, of failures.jsonl, and not among the finished `rows`; no table where that is nothing.

    Example:
        >>> said = {"type": "TechniqueError", "message": "the training loss became nan. Allowed: a finite loss. To do: lower lr."}
        >>> said["settings"] = {"data": "d", "model": "m", "mask": "snip", "sparsity": 0.9, "recipe": "tost", "lr": 9}
        >>> failures = [{"id": str(seed), "training": f"d, m, snip 0.9, tost, seed {seed}", **said} for seed in (0, 0, 1, 2)]
        >>> [table] = failed_table(failures, [{"id": "2", "settings": said["settings"] | {"seed": 2}}])
        >>> table.lines
        [['d, m, snip 0.9, tost', '0, 1', '2', 'TechniqueError: the training loss became nan']]
    """
    done = {row["id"] for row in rows}
    lost: dict[str, dict[str, Row]] = {}  # by a name that says neither learning rate nor epochs, and by id: the last of several tries
    for row in failures:
        if row["id"] not in done:
            lost.setdefault(row["training"].rpartition(", seed ")[0], {})[row["id"]] = row
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for training, tried in lost.items():
        # A row may have words behind the name of its recipe.
        finished = [row for row in rows if f"{_training(row)} (".startswith(f"{training} (")]
        for row in tried.values():
            words = differing(_shared(row), [_shared(other) for other in (*tried.values(), *finished)])
            # The seeds of those that differ from it in the seed alone.
            others = ", ".join(str(other["settings"]["seed"]) for other in finished if _shared(other) == _shared(row)) or NONE
            line = f"{training}{words}", others, f"{row['type']}: {_short(row['message'])}"
            seeds.setdefault(line, []).append(_seed(row))
    lines = [[what, ", ".join(members), others, reason] for (what, others, reason), members in seeds.items()]
    return [Table("Failed trainings", ["training", "seeds that failed", "that finished", "reason"], lines, [SURVIVORS])] if lines else []


def _shared(row: Row) -> dict[str, Any]:
    """What decides the numbers of `row` beside its seed and its recipe's name; of a failure it is all in its settings."""
    settings = {"techniques": row.get("techniques"), **row["settings"]}
    held = dict(flat(contents(settings.pop("techniques") or [])))
    return {key: value for key, value in settings.items() if key not in of_a_run(settings)} | held


def _seed(failure: Row) -> str:
    return str(failure["training"].rpartition(", seed ")[2])


def _training(row: Row) -> str:
    s = row["settings"]
    mask = s["mask"] if s["mask"] == "dense" else f"{s['mask']} {s['sparsity']:g}"
    return f"{s['data']}, {s['model']}, {mask}, {s['recipe']}"


def _short(message: str) -> str:
    first = (message.partition(". Allowed: ")[0].splitlines() or [""])[0]
    return first if len(first) <= _LONGEST else f"{first[: _LONGEST - 3]}..."
