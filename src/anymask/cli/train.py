"""`anymask train`."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from anymask.cli.outcome import writable
from anymask.cli.progress import watching
from anymask.cli.settings import EXPERIMENT, PROTOCOL, RUN, Compile, ConfigFile, Deterministic, Diagnose, Preset, Sparse
from anymask.config import Experiment
from anymask.sweep import cell_of, train_one
from anymask.train import Computing, Protocol

RECIPE = (
    "The recipe: default, best, best-slow, tost, tost:lrsi ..., or a TOML file; best unless told otherwise (default with --mask dense)."
)


def train(
    *,
    mask: Annotated[str, Parameter(group=RUN, help="A mask method, a mask file, or dense.")],
    out: Annotated[Path, Parameter(group=RUN, help="The folder for this training alone.")],
    sparsity: Annotated[float | None, Parameter(group=RUN, help="Share of zeros, in [0, 1); 0.98 unless told otherwise.")] = None,
    recipe: Annotated[str | None, Parameter(group=RUN, help=RECIPE)] = None,
    seed: Annotated[int, Parameter(group=RUN, help="Gives the initialisation, mask, split and data order.")] = 0,
    experiment: Annotated[Experiment | None, Parameter(name="*", group=EXPERIMENT)] = None,
    preset: Preset = None,
    protocol: Annotated[Protocol | None, Parameter(name="*", group=PROTOCOL)] = None,
    sparse: Sparse = "auto",
    compile: Compile = "off",
    diagnose: Diagnose = "off",
    deterministic: Deterministic = False,
    resume: Annotated[bool, Parameter(group=RUN, negative=(), help="Go on with the training that OUT holds.")] = False,
    tensorboard: Annotated[bool, Parameter(group=RUN, negative=(), help="Log to OUT/tensorboard.")] = False,
    config: ConfigFile = None,
) -> int:
    """Train one network, and keep its weights."""
    cell = cell_of(mask, sparsity=sparsity, recipe=recipe, seed=seed)
    how: dict[str, Any] = {
        "experiment": experiment,
        "protocol": protocol,
        "computing": Computing(sparse, compile, diagnose, deterministic),
        "resume": resume,
    }
    writable(out)
    try:
        with watching() as watcher:
            row = train_one(cell, out, **how, tensorboard=tensorboard, watcher=watcher)
    except KeyboardInterrupt:
        kept = "what is finished of it is kept" if any((out / "unfinished").rglob("*.pt")) else "no epoch was finished yet"
        print(f"\nStopped; {kept}. The same command with --resume goes on from there.", file=sys.stderr)
        return 130
    print(f"{cell}: test accuracy {100 * row['accuracy']['test']:.2f}% at epoch {row['accuracy']['best_epoch']}. Kept in {out}")
    return 0
