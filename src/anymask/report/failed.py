"""What failed: a recipe that diverges is not to vanish from a report, nor to be judged by the seeds that it survived without a word."""

from collections.abc import Iterable, Sequence

from anymask.report.cells import Row
from anymask.report.table import NONE, Table

SURVIVORS = "What failed is in no average: those of a recipe that is here are over the seeds that finished alone."
_LONGEST = 120  # characters of a reason


def failed_table(failures: Iterable[Row], rows: Sequence[Row]) -> list[Table]:
    """A table of what is in `failures`, of failures.jsonl, and not among the finished `rows`; no table where that is nothing.

    Example:
        >>> said = {"type": "TechniqueError", "message": "the training loss became nan. Allowed: a finite loss. To do: lower lr."}
        >>> failures = [{"id": str(seed), "training": f"d, m, snip 0.9, tost, seed {seed}", **said} for seed in (0, 0, 1, 2)]
        >>> settings = {"data": "d", "model": "m", "mask": "snip", "sparsity": 0.9, "recipe": "tost", "seed": 2}
        >>> [table] = failed_table(failures, [{"id": "2", "settings": settings}])
        >>> table.lines
        [['d, m, snip 0.9, tost', '0, 1', '2', 'TechniqueError: the training loss became nan']]
    """
    done = {row["id"] for row in rows}
    seeds: dict[tuple[str, str, str], list[str]] = {}
    blocks: dict[str, set[str]] = {}  # of a training's name, which says neither learning rate nor epochs
    for row in {row["id"]: row for row in failures if row["id"] not in done}.values():  # the last of several tries
        training, _, seed = row["training"].rpartition(", seed ")
        block = row.get("block", "")
        blocks.setdefault(training, set()).add(block)
        seeds.setdefault((training, block, f"{row['type']}: {_short(row['message'])}"), []).append(seed)
    lines = [
        [what, ", ".join(members), _finished(what, rows), reason]
        if len(blocks[what]) == 1
        else [f"{what} ({block})", ", ".join(members), NONE, reason]
        for (what, block, reason), members in seeds.items()
    ]
    return [Table("Failed trainings", ["training", "seeds that failed", "that finished", "reason"], lines, [SURVIVORS])] if lines else []


def _finished(training: str, rows: Sequence[Row]) -> str:
    """The seeds of `training` that finished, whatever is told behind the name of its recipe."""
    return ", ".join(str(row["settings"]["seed"]) for row in rows if f"{_training(row)} (".startswith(f"{training} (")) or NONE


def _training(row: Row) -> str:
    s = row["settings"]
    mask = s["mask"] if s["mask"] == "dense" else f"{s['mask']} {s['sparsity']:g}"
    return f"{s['data']}, {s['model']}, {mask}, {s['recipe']}"


def _short(message: str) -> str:
    first = (message.partition(". Allowed: ")[0].splitlines() or [""])[0]
    return first if len(first) <= _LONGEST else f"{first[: _LONGEST - 3]}..."
