"""Models by name, each in its CIFAR form."""

from anymask.models.building import FORMS, build, find, is_own
from anymask.models.table import MODELS, Model

__all__ = ["FORMS", "MODELS", "Model", "build", "find", "is_own"]
