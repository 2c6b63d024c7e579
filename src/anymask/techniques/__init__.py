"""Training tricks for sparse networks. `TECHNIQUES` is the table of all of them."""

from anymask.techniques.averaging import Averaging
from anymask.techniques.base import Attached, Context, Loss, Technique
from anymask.techniques.density_lr import DensityLR
from anymask.techniques.distillation import Distillation
from anymask.techniques.fan_in_init import FanInInit
from anymask.techniques.ghost_activation import GhostActivation
from anymask.techniques.ghost_skip import GhostSkip
from anymask.techniques.gradient_correction import GradientCorrection
from anymask.techniques.ham import HAM
from anymask.techniques.isometry_init import IsometryInit
from anymask.techniques.label_smoothing import LabelSmoothing
from anymask.techniques.lrsi import LRsI
from anymask.techniques.preconditioning import Preconditioning
from anymask.techniques.refitting import Refit
from anymask.techniques.rescale import RescaleSettings
from anymask.techniques.sam import SAM
from anymask.techniques.sign_in import SignIn

TECHNIQUES: dict[str, type[Technique]] = {
    "lrsi": LRsI,
    "fan_in_init": FanInInit,
    "isometry_init": IsometryInit,
    "density_lr": DensityLR,
    "ghost_activation": GhostActivation,
    "ghost_skip": GhostSkip,
    "label_smoothing": LabelSmoothing,
    "distillation": Distillation,
    "ham": HAM,
    "sign_in": SignIn,
    "gradient_correction": GradientCorrection,
    "preconditioning": Preconditioning,
    "sam": SAM,
    "averaging": Averaging,
}

__all__ = [
    "HAM",
    "SAM",
    "TECHNIQUES",
    "Attached",
    "Averaging",
    "Context",
    "DensityLR",
    "Distillation",
    "FanInInit",
    "GhostActivation",
    "GhostSkip",
    "GradientCorrection",
    "IsometryInit",
    "LRsI",
    "LabelSmoothing",
    "Loss",
    "Preconditioning",
    "Refit",
    "RescaleSettings",
    "SignIn",
    "Technique",
]
