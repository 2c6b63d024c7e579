"""Many trainings, one ledger."""

from anymask.sweep.compare import Cell, Grid, Runner, Watcher, cells, compare
from anymask.sweep.inspect import look, look_at
from anymask.sweep.plan import Plan, read_plan
from anymask.sweep.run import Outcome, Task, budget_seconds, make_masks, sweep, tasks
from anymask.sweep.single import cell_of, prune_to, train_one
from anymask.sweep.study import Studied, study
from anymask.sweep.studyfile import Study, read_study

__all__ = [
    "Cell",
    "Grid",
    "Outcome",
    "Plan",
    "Runner",
    "Studied",
    "Study",
    "Task",
    "Watcher",
    "budget_seconds",
    "cell_of",
    "cells",
    "compare",
    "look",
    "look_at",
    "make_masks",
    "prune_to",
    "read_plan",
    "read_study",
    "study",
    "sweep",
    "tasks",
    "train_one",
]
