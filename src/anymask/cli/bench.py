"""`anymask bench`."""

import json
import os
import platform
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anymask.cli.settings import RUN
from anymask.runlog import atomic, processor
from anymask.shipping.runtime import load
from anymask.shipping.timing import OTHERS, OURS, Result, measured


def bench(
    file: Annotated[Path, Parameter(name="FILE", group=RUN, help="A file of `anymask ship`, x.anymask.")],
    /,
    *,
    batch: Annotated[tuple[int, ...], Parameter(group=RUN, help="How many images at once.")] = (1, 32, 128),
    threads: Annotated[int | None, Parameter(group=RUN, help="Threads for each; as many as processors if left out.")] = None,
    against: Annotated[tuple[str, ...], Parameter(group=RUN, help="Whom to compare with.")] = tuple(OTHERS),
    seconds: Annotated[float, Parameter(group=RUN, help="How long each runs for each batch, compiling apart.")] = 3.0,
    json_file: Annotated[Path | None, Parameter(name="--json", group=RUN, help="Write all numbers to this file, too.")] = None,
) -> int:
    """Time a shipped network here, beside PyTorch and ONNX Runtime."""
    program = load(file, threads=threads)
    note = partial(print, file=sys.stderr)
    note(f"{file}: {program}, {program.threads} threads")
    result = measured(program, batch, threads=program.threads, against=against, seconds=seconds, tell=note)
    _show(result, batch)
    if json_file is not None:
        machine = {"machine": platform.machine(), "processor": processor(), "processors": os.cpu_count(), "threads": program.threads}
        plan = program.plan
        network = {"file": file.name, "kept": plan.kept, "total": plan.total, "values": plan.values, "input": list(program.input)}
        with atomic(json_file, "w") as out:
            json.dump({**network, **machine, **asdict(result), "verdicts": result.verdicts()}, out, indent=1)
        print(f"Numbers: {json_file}", file=sys.stderr)
    return 0


def _show(result: Result, batches: tuple[int, ...]) -> None:
    """A row for each runtime: milliseconds for a batch, and how many times ours that is."""
    console = Console(highlight=False)
    shown = Table(title=Text("milliseconds for a batch, medians; in brackets: times ours, over 1 ours is faster"), title_justify="left")
    shown.add_column("")
    for batch in batches:
        shown.add_column(f"batch {batch}", justify="right")
    for name in dict.fromkeys(timing.name for timing in result.timings):
        cells = []
        for batch in batches:
            found = result.of(batch)
            cells.append("-" if name not in found else _cell(found[name].ms, found[OURS].ms, ours=name == OURS))
        shown.add_row(Text(name, "bold" if name == OURS else ""), *cells)
    console.print(shown)
    for line in (*result.verdicts(), *result.notes):
        console.print(Text(line))


def _cell(ms: float, ours_ms: float, *, ours: bool) -> Text:
    return Text(f"{ms:.2f}") if ours else Text(f"{ms:.2f} ({ms / ours_ms:.2f})")
