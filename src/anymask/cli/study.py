"""`anymask study`."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from anymask import sweep
from anymask.cli.outcome import show, writable
from anymask.cli.progress import watching
from anymask.cli.settings import RUN, Budget, Device, Sparse
from anymask.cli.sweep import FAILED, say
from anymask.sweep import Studied, Study, budget_seconds, cells, read_study
from anymask.sweep.study import REPORT, WINNER
from anymask.train import Computing


def study(
    file: Annotated[Path, Parameter(name="STUDY", group=RUN, help="The study, STUDY.toml.")],
    /,
    *,
    out: Annotated[Path, Parameter(group=RUN, help="The folder of this study; trainings that it holds already are not run again.")],
    budget: Budget = None,
    dry_run: Annotated[bool, Parameter(group=RUN, negative=(), help="Only show how many trainings there would be.")] = False,
    sparse: Sparse = "auto",
    device: Device = "auto",
) -> int:
    """Search, and confirm what wins."""
    if budget is not None:
        budget_seconds(budget)  # refused before the data are read
    wanted = read_study(file).on(device)
    if dry_run:
        return _show(wanted)
    writable(out)
    try:
        with watching() as watcher:
            done = sweep.study(wanted, out, budget=budget, computing=Computing(sparse), watcher=watcher)
    except KeyboardInterrupt:
        print(f"\nStopped. What is finished is kept in {out}; the same command goes on from there.", file=sys.stderr)
        return 130
    if done.winner is not None:
        show((out / REPORT).read_text(encoding="utf-8"))
    say(_summary(done, wanted, out))
    return FAILED if done.confirmed is not None and done.confirmed.failed else 0


def _show(wanted: Study) -> int:
    tune, confirm = (_trainings(wanted, half) for half in ("tune", "confirm"))
    print(f"Tuning: {wanted.baseline} with {len(wanted.space['lr'].values)} learning rates, {tune} trainings each;")
    print(f"  then {wanted.trials} settings of {wanted.base}, at most {tune} trainings each: the worse ones are dropped early.")
    print(f"Confirmation: {wanted.baseline} and the winner, {confirm} trainings each.")
    return 0


def _trainings(wanted: Study, half: str) -> int:
    """How many trainings a recipe has in a half, without the dense network."""
    grids = [(len(part.seeds), replace(part.grid, recipes=("default",), dense=False)) for part in getattr(wanted, half)]
    return sum(seeds * len(list(cells(grid))) for seeds, grid in grids)


def _summary(done: Studied, wanted: Study, out: Path) -> Iterable[str]:
    yield f"Tuning: {done.trials} of {wanted.trials} settings were tried."
    if done.winner is None or done.confirmed is None:
        yield "The same command goes on from there."
        return
    found = done.confirmed
    for failed in found.failed:
        yield f"Failed {failed.tries} times: {failed.task.cell}: {failed.reason}"
    total = len(found.finished) + len(found.failed) + len(found.left)
    yield f"Confirmation: {len(found.finished)} of {total} trainings are finished, {len(found.failed)} failed, {len(found.left)} are left."
    if found.left:
        yield "The same command goes on from there."
    yield f"Winner: {out / WINNER}, {done.winner.recipe}"
    yield f"Report: {out / REPORT}"
