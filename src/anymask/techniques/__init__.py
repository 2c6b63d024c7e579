"""Training tricks for sparse networks. `TECHNIQUES` is the table of all of them."""

from anymask.techniques.base import Attached, Context, Loss, Technique
from anymask.techniques.density_lr import DensityLR
from anymask.techniques.fan_in_init import FanInInit
from anymask.techniques.ghost_activation import GhostActivation
from anymask.techniques.ghost_skip import GhostSkip
from anymask.techniques.isometry_init import IsometryInit
from anymask.techniques.label_smoothing import LabelSmoothing
from anymask.techniques.lrsi import LRsI
from anymask.techniques.rescale import RescaleSettings

TECHNIQUES: dict[str, type[Technique]] = {
    "lrsi": LRsI,
    "fan_in_init": FanInInit,
    "isometry_init": IsometryInit,
    "density_lr": DensityLR,
    "ghost_activation": GhostActivation,
    "ghost_skip": GhostSkip,
    "label_smoothing": LabelSmoothing,
}

__all__ = [
    "TECHNIQUES",
    "Attached",
    "Context",
    "DensityLR",
    "FanInInit",
    "GhostActivation",
    "GhostSkip",
    "IsometryInit",
    "LRsI",
    "LabelSmoothing",
    "Loss",
    "RescaleSettings",
    "Technique",
]
