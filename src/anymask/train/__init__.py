"""The reference trainer."""

from anymask.train.loop import fit
from anymask.train.run import Result, check_diagnose
from anymask.train.settings import Protocol, accuracy
from anymask.train.sparsity import sparse_possible

__all__ = ["Protocol", "Result", "accuracy", "check_diagnose", "fit", "sparse_possible"]
