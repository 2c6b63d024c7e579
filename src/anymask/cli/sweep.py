"""`anymask sweep`."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from anymask import sweep as sweeping
from anymask.cli.outcome import LEDGER, for_many
from anymask.cli.progress import watching
from anymask.cli.settings import RUN, Budget, Compile, Deterministic, Device, Diagnose, Sparse
from anymask.errors import SettingError
from anymask.runlog import Ledger
from anymask.sweep import Outcome, budget_seconds, read_plan
from anymask.sweep.workers import how_it_ended
from anymask.train import Computing

FAILED = 1
_SHOWN = 10  # trainings that are named where many are left


def sweep(
    plan: Annotated[Path, Parameter(name="PLAN", group=RUN, help="The plan, PLAN.toml.")],
    /,
    *,
    out: Annotated[Path, Parameter(group=RUN, help="The run folder; trainings that it holds already are not run again.")],
    workers: Annotated[int, Parameter(group=RUN, help="How many processes train beside each other; they share the cores.")] = 1,
    streams: Annotated[
        int, Parameter(group=RUN, help="How many trainings each process has beside each other, on a GPU; needs --compile graph or fused.")
    ] = 1,
    ray: Annotated[
        str | None, Parameter(group=RUN, help="Train on the Ray cluster of this address, such as 10.0.0.1:6379, instead of here.")
    ] = None,
    budget: Budget = None,
    dry_run: Annotated[bool, Parameter(group=RUN, negative=(), help="Only show which trainings would run.")] = False,
    masks_only: Annotated[
        bool, Parameter(group=RUN, negative=(), help="Only make the masks, in the run folder; a machine that has a copy of it trains.")
    ] = False,
    sparse: Sparse = "auto",
    compile: Compile = "off",
    diagnose: Diagnose = "off",
    deterministic: Deterministic = False,
    device: Device = "auto",
) -> int:
    """Train what is left of a plan."""
    if budget is not None:
        budget_seconds(budget)  # refused before the data are read
    wanted, computing = read_plan(plan).on(device), Computing(sparse, compile, diagnose, deterministic)
    if dry_run:
        return _show(sweeping.tasks(wanted, out, computing, device=None if ray is None else "cpu"), finished=Ledger(out / LEDGER).ids())
    for_many(out)
    if masks_only and (workers, streams, ray, budget) != (1, 1, None, None):
        raise SettingError(
            "--masks-only came with --workers, --streams, --ray or --budget",
            allowed="masks, made one after the other",
            fix="leave one of the two out",
        )
    try:
        if masks_only:
            made = sweeping.make_masks(wanted, out, computing, told=lambda task: say([f"Making {task.mask.name if task.mask else ''}"]))
            say([f"Masks in {out / 'masks'}: {made}"])
            return 0
        with watching() as watcher:
            how: dict[str, Any] = {"budget": budget, "workers": workers, "streams": streams, "ray": ray, "computing": computing}
            outcome = sweeping.sweep(wanted, out, **how, watcher=watcher)
    except KeyboardInterrupt:
        kept = f"{len(Ledger(out / LEDGER).rows())} finished trainings are kept in {out}"
        print(f"\nStopped. {kept}; the same command goes on from there.", file=sys.stderr)
        return 130
    say(_summary(outcome, out))
    return FAILED if outcome.failed or (outcome.died and outcome.left) else 0


def _show(planned: Sequence[sweeping.Task], *, finished: set[str]) -> int:
    waiting = [task for task in planned if task.name not in finished]
    for task in waiting:
        print(task.cell)
    epochs = sum(task.part.protocol.epochs for task in waiting)
    say([f"{len(waiting)} of {len(planned)} trainings would run, {epochs} epochs in all."])
    return 0


def _summary(outcome: Outcome, out: Path) -> Iterable[str]:
    total = len(outcome.finished) + len(outcome.failed) + len(outcome.left)
    for failed in outcome.failed:
        yield f"Failed {failed.tries} times: {failed.task.cell}: {failed.reason}"
    for code in outcome.died:
        yield f"A worker process died {how_it_ended(code)}."
    for task in outcome.left[:_SHOWN]:
        yield f"Left: {task.cell}"
    if len(outcome.left) > _SHOWN:
        yield f"Left: and {len(outcome.left) - _SHOWN} more"
    yield f"{len(outcome.finished)} of {total} trainings are finished, {len(outcome.failed)} failed, {len(outcome.left)} are left."
    if outcome.left:
        yield "The same command goes on from there."
    if outcome.finished:
        yield f"Tables: anymask report {out}"


def say(lines: Iterable[str]) -> None:
    """Print `lines` on stderr, so that stdout holds results only."""
    for line in lines:
        print(line, file=sys.stderr)
