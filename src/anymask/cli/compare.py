"""`anymask compare`."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from anymask import sweep
from anymask.cli.outcome import LEDGER, PAGE, TABLE, for_many, show_table, write_outcome
from anymask.cli.progress import watching
from anymask.cli.settings import EXPERIMENT, GRID, PROTOCOL, RUN, Compile, ConfigFile, Deterministic, Diagnose, Preset, Sparse
from anymask.config import Bench, Experiment
from anymask.errors import SettingError
from anymask.ranks import by_rank_0, leads
from anymask.runlog import Ledger
from anymask.sweep import Grid, Runner
from anymask.sweep.masks import is_mask_file
from anymask.train import Computing, Protocol


def compare(
    *,
    grid: Annotated[Grid | None, Parameter(name="*", group=GRID)] = None,
    experiment: Annotated[Experiment | None, Parameter(name="*", group=EXPERIMENT)] = None,
    preset: Preset = None,
    protocol: Annotated[Protocol | None, Parameter(name="*", group=PROTOCOL)] = None,
    out: Annotated[Path, Parameter(group=RUN, help="The run folder; trainings that it holds already are not run again.")] = Path(
        "runs/compare"
    ),
    sparse: Sparse = "auto",
    compile: Compile = "off",
    diagnose: Diagnose = "off",
    deterministic: Deterministic = False,
    dry_run: Annotated[bool, Parameter(group=RUN, negative=(), help="Only show which trainings would run.")] = False,
    config: ConfigFile = None,
) -> int:
    """Train each mask with each recipe, and report."""
    grid, experiment, protocol = grid or Grid(), experiment or Experiment(), protocol or Protocol()
    if grid.masks and all(map(is_mask_file, grid.masks)) and grid.sparsity != Grid.sparsity:
        raise SettingError("--sparsity came with mask files alone", allowed="it with methods: a file has its own", fix="leave it out")
    computing = Computing(sparse, compile, diagnose, deterministic)
    if dry_run:
        return _show_plan(grid, Runner(Bench(experiment, protocol), out, computing))
    for_many(out)
    by_rank_0(lambda: _check_tables(out))
    ledger, code = Ledger(out / LEDGER), 0
    try:
        with watching() as watcher:
            sweep.compare(grid, out, experiment=experiment, protocol=protocol, computing=computing, watcher=watcher)
    except KeyboardInterrupt:
        kept = f"{len(ledger.rows())} finished trainings are kept in {out}"
        print(f"\nStopped. {kept}; the same command goes on from there.", file=sys.stderr)
        code = 130
    finally:  # a training that failed takes nothing from those that are finished
        if leads() and ledger.rows():
            show_table(ledger, baseline=grid.recipes[0])
            write_outcome(ledger, baseline=grid.recipes[0])
    return code


def _check_tables(out: Path) -> None:
    """Refuse a folder whose table or page is not that of a ledger beside it, which is written again each time."""
    there = [out / name for name in (TABLE, PAGE) if (out / name).exists()]
    if there and not (out / LEDGER).exists():
        raise SettingError(
            f"{there[0]} is there already, without a {LEDGER}", allowed="a run folder, or a new one", fix="choose another --out"
        )


def _show_plan(grid: Grid, runner: Runner) -> int:
    finished = runner.ledger.ids()
    cells = list(sweep.cells(grid, runner.bench.model(grid.first_seed)))
    waiting = [cell for cell in cells if runner.name(cell) not in finished]
    for cell in waiting:
        print(cell)
    print(f"{len(waiting)} of {len(cells)} trainings would run, {runner.bench.protocol.epochs} epochs each.", file=sys.stderr)
    return 0
