"""Native kernels over kept weights, NumPy in and out; nothing here knows PyTorch."""

from anymask.kernels.native import Gather, available, why_not

__all__ = ["Gather", "available", "why_not"]
