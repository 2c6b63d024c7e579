"""`anymask prune`."""

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from anymask.cli.inspect import show_mask
from anymask.cli.outcome import writable
from anymask.cli.settings import EXPERIMENT, METHOD, PROTOCOL, RUN, ConfigFile
from anymask.config import Experiment
from anymask.pruning import CollapseWarning
from anymask.sweep import prune_to
from anymask.train import Protocol


def prune(
    method: Annotated[str, Parameter(group=RUN, help="The mask method; `anymask list masks` shows them.")],
    /,
    *,
    out: Annotated[Path, Parameter(group=RUN, help="The mask file to write.")],
    sparsity: Annotated[float | None, Parameter(group=RUN, help="Share of zeros, in [0, 1); an N:M pattern has its own.")] = None,
    seed: Annotated[int, Parameter(group=RUN, help="Gives the initialisation, and the images that are looked at.")] = 0,
    scope: Annotated[str | None, Parameter(group=METHOD, help="Where scores compete: global, uniform, er, erk or balanced.")] = None,
    pattern: Annotated[
        str | None, Parameter(group=METHOD, help="How kept weights lie: unstructured, 2:4, 4x1, channel, fan-in, and their like.")
    ] = None,
    rounds: Annotated[int | None, Parameter(group=METHOD, help="Score and prune this often.")] = None,
    floor: Annotated[int, Parameter(group=METHOD, help="The least number of weights that each layer keeps.")] = 0,
    exclude: Annotated[tuple[str, ...], Parameter(group=METHOD, help="Modules or parameters to leave dense and out of the count.")] = (),
    experiment: Annotated[Experiment | None, Parameter(name="*", group=EXPERIMENT)] = None,
    protocol: Annotated[Protocol | None, Parameter(name="*", group=PROTOCOL)] = None,
    refit: Annotated[
        Path | None, Parameter(group=RUN, help="Write the network of --weights there, pruned and refitted; no training.")
    ] = None,
    force: Annotated[bool, Parameter(group=RUN, negative=(), help="Replace files that are there.")] = False,
    config: ConfigFile = None,
) -> int:
    """Make a mask on the initialisation of a seed, or a trained network, and save it."""
    for path in (out, refit):
        if path is not None:
            writable(path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # shown below
        how = {"scope": scope, "pattern": pattern, "rounds": rounds, "floor": floor, "exclude": exclude}
        given: dict[str, Any] = {name: value for name, value in how.items() if value is not None}
        given |= {"experiment": experiment, "protocol": protocol, "refit": refit, "force": force}
        mask, accuracies = prune_to(out, method, sparsity=sparsity, seed=seed, **given)
    show_mask(mask, title=str(out))
    if accuracies:
        print("Test accuracy: " + ", ".join(f"{100 * share:.2f}% {name}" for name, share in accuracies.items()))
    print(f"Mask: {out}", file=sys.stderr)
    return 0
