"""Many trainings, one ledger."""

from anymask.sweep.compare import DENSE, Cell, Grid, Runner, Watcher, cells, compare
from anymask.sweep.inspect import Overlap, overlap
from anymask.sweep.single import cell_of, prune_to, train_one

__all__ = ["DENSE", "Cell", "Grid", "Overlap", "Runner", "Watcher", "cell_of", "cells", "compare", "overlap", "prune_to", "train_one"]
