"""The committed ledgers, as the parts of docs/ are made of them."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    rate = re.search("[@,]lr=([^,]+)", row["settings"]["recipe"])
    return f"{held}, lr={rate[1]}" if rate else held


def _contents(technique: dict[str, Any]) -> str:
    kind = TECHNIQUES[technique.pop("name")]
    default = asdict(kind())
    parts = [f"{key}={value}" for key, value in technique.items() if not isinstance(value, dict) and value != default[key]]
    parts += [f"{key}={value}" for key, value in technique.get("settings", {}).items() if value != default["settings"][key]]
    fade = technique["schedule"]
    ends = [] if kind.seam != "model" else [f"{fade['shape']} to {fade['end']}"]
    return f"{kind.name}({', '.join([*ends, *parts])})"
