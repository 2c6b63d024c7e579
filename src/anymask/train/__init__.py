"""The reference trainer."""

from anymask.train.computing import Computing
from anymask.train.loop import fit
from anymask.train.run import Result
from anymask.train.settings import Protocol, accuracy

__all__ = ["Computing", "Protocol", "Result", "accuracy", "fit"]
