"""Training tricks for sparse networks. `TECHNIQUES` is the table of all of them."""

from anymask.techniques.base import Attached, Context, Loss, Technique
from anymask.techniques.ghost_activation import GhostActivation
from anymask.techniques.ghost_skip import GhostSkip
from anymask.techniques.label_smoothing import LabelSmoothing
from anymask.techniques.lrsi import LRsI
from anymask.techniques.rescale import RescaleSettings
from anymask.techniques.sam import SAM

TECHNIQUES: dict[str, type[Technique]] = {
    "lrsi": LRsI,
    "ghost_activation": GhostActivation,
    "ghost_skip": GhostSkip,
    "label_smoothing": LabelSmoothing,
    "sam": SAM,
}

__all__ = [
    "SAM",
    "TECHNIQUES",
    "Attached",
    "Context",
    "GhostActivation",
    "GhostSkip",
    "LRsI",
    "LabelSmoothing",
    "Loss",
    "RescaleSettings",
    "Technique",
]
