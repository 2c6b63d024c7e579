"""The table of docs/networks.md, from the rows of tools/networks.py."""

from typing import Any

from tables import table as markdown

CHECKS = ("changed", "equal_at_zero", "three_steps", "nothing_left", "zeros")
SHOWN = {"ghost_activation": "ghost activation", "ghost_skip": "ghost skip", "lrsi": "LRsI", "label_smoothing": "label smoothing"}


def good(row: dict[str, Any]) -> bool:
    """Whether a technique did all that it promises on a network, or said why not and left it as it was."""
    if "refused" in row:
        return row["untouched"]
    return "failed" not in row and all(row.get(key, True) for key in CHECKS)


def table(rows: list[dict[str, Any]]) -> str:
    """A line a network: what each technique found; then the counts of every check."""
    by_network: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_network.setdefault(row["network"], {})[row["technique"]] = row
    lines = []
    for name, found in sorted(by_network.items(), key=lambda item: (next(iter(item[1].values()))["family"].lower(), item[0])):
        first = next(iter(found.values()))
        cells = [_cell(found[technique]) if technique in found else "not tried" for technique in SHOWN]
        lines.append([f"{name} ({first['source']})", first["family"], f"{first['parameters']:,}", *cells])
    families = {next(iter(found.values()))["family"] for found in by_network.values()}
    shown = markdown(["network", "family", "parameters", *SHOWN.values()], lines)
    return f"{shown}\n{len(by_network)} networks of {len(families)} families.\n\n{_counts(rows)}"


def _cell(row: dict[str, Any]) -> str:
    if "refused" in row:
        return "nothing" if "nothing" in row["refused"] else "refused"
    if "failed" in row:
        return "**failed**"
    said = row["found"].split(", ")[0] if row["technique"] in {"lrsi", "label_smoothing"} else row["found"]
    missed = [key.replace("_", " ") for key in CHECKS if not row.get(key, True)]
    return f"{said} **not: {', '.join(missed)}**" if missed else said


def _counts(rows: list[dict[str, Any]]) -> str:
    heads, lines = ("technique", "applied", "refused", "failed", *(check.replace("_", " ") for check in CHECKS)), []
    for technique in dict.fromkeys(row["technique"] for row in rows):
        mine = [row for row in rows if row["technique"] == technique]
        applied = [row for row in mine if "found" in row]
        refused, failed = (sum(key in row for row in mine) for key in ("refused", "failed"))
        checks = [_of(applied, check) for check in CHECKS]
        lines.append([technique.replace("_", " "), f"{len(applied)}", f"{refused}", f"{failed}", *checks])
    return markdown(heads, lines)


def _of(applied: list[dict[str, Any]], check: str) -> str:
    asked = [row[check] for row in applied if check in row]
    return f"{sum(asked)} of {len(asked)}" if asked else "-"
