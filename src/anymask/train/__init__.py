"""The reference trainer."""

from anymask.train.loop import Result, fit
from anymask.train.settings import Protocol, accuracy

__all__ = ["Protocol", "Result", "accuracy", "fit"]
