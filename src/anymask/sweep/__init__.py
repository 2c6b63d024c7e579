"""Many trainings, one ledger."""

from anymask.sweep.compare import Cell, Grid, Watcher, cells, compare

__all__ = ["Cell", "Grid", "Watcher", "cells", "compare"]
