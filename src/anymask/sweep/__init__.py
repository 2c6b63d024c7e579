"""Many trainings, one ledger."""

from anymask.sweep.compare import Cell, Grid, Runner, Watcher, cells, compare
from anymask.sweep.inspect import Network, look, look_at
from anymask.sweep.masks import DENSE
from anymask.sweep.single import cell_of, prune_to, train_one

__all__ = [
    "DENSE",
    "Cell",
    "Grid",
    "Network",
    "Runner",
    "Watcher",
    "cell_of",
    "cells",
    "compare",
    "look",
    "look_at",
    "prune_to",
    "train_one",
]
