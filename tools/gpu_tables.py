"""The parts of docs/ about what ran on a GPU, made of results/gpu."""

import json
from collections.abc import Callable, Mapping

from recipe_tables import ROOT, ledger

from anymask.report import paired, table


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


def gpu_rates() -> str:
    """Images a second on a GPU, of results/gpu/rates.json: in turns they were not, so each is one run."""
    made = json.loads((ROOT / "results" / "gpu" / "rates.json").read_text())
    lines = []
    for network in dict.fromkeys(row["network"] for row in made["rows"]):
        rows = sorted((row for row in made["rows"] if row["network"] == network), key=lambda row: row["images a second"])
        plain = next(row["images a second"] for row in rows if row["way"] == "plain loop")
        for row in rows:
            how = f", {row['precision']}" + (", recorded" if row["compile"] == "graph" else "")
            way = row["way"] + (how if row["way"] == "fit" else "")
            rate = row["images a second"]
            whole = f"{182 * 45_000 / rate:,.0f}"
            lines.append([network, way, str(row["streams"]), f"{rate:,}", f"{rate / plain:.2f}x", whole])
    head = [
        "network",
        "way",
        "at once",
        "images / s in all",
        "times the plain loop",
        "182 epochs of 45,000, s a training (computed)",
    ]
    return (
        "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *lines])
        + f"\n\n{made['when']}, {made['machine']}, commit {made['commit']}; one run each.\n"
    )


PARTS: Mapping[str, Callable[[], str]] = {
    "gpu-short": gpu_short,
    "gpu-table": lambda: table(ledger("gpu")),
    "gpu-rates": gpu_rates,
}
