"""Native kernels over kept weights, NumPy in and out; nothing here knows PyTorch."""

from anymask.kernels.library import available, why_not
from anymask.kernels.native import Gather
from anymask.kernels.norms import Pool

__all__ = ["Gather", "Pool", "available", "why_not"]
