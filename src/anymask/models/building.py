"""Models by name, with weights that depend on the seed alone."""

import inspect
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from anymask.errors import SettingError
from anymask.models.table import MODELS, Model, resnet
from anymask.randomness import isolated_random
from anymask.registry import imported, unknown

FORMS = (
    'any resnetN with N = 6n + 2, such as resnet104; any name with a factor on its width, such as "resnet32-2x" or "resnet20-0.5x"; '
    '"module:callable" for one of your own'
)

_NAME = re.compile(r"(?P<base>\w+?)(?:-(?P<width>\d{1,3}(?:\.\d+)?)x)?")
_DEPTH = re.compile(r"resnet(\d{1,4})")


def build(name: str, *, classes: int, channels: int = 3, seed: int | None = None) -> nn.Module:
    """A new model on the CPU, in train mode, for images (N, `channels`, H, W) of 28, 32 or 64 pixels.

    Convolution weights are drawn from a normal of mean 0 and variance 2 / fan_out, where fan_out = kernel^2 * channels out / groups
    (Kaiming, arXiv 1502.01852); batch norm starts as 1 and 0; the linear layer as in PyTorch. A network of yours starts as you make it.

    Args:
        name: a key of `MODELS`, or resnetN with N = 6n + 2; "-2x" or "-0.5x" after it multiplies every width. Or "module:callable":
            imported, and called with those of classes= and channels= that it takes.
        classes: number of outputs, >= 1.
        channels: channels of the images, >= 1: 1 for grey, 3 for colour.
        seed: with one, the weights depend on it alone and the global random state stays as it is; None draws from the global state.

    Raises:
        UnknownName: with the nearest names, for a name that is none of these.
        SettingError: for a number out of its range, and for a callable that gives no network.

    Example:
        >>> import torch
        >>> build("resnet20-0.5x", classes=10, channels=1, seed=0)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    make = find(name)
    for what, value in (("classes", classes), ("channels", channels)):
        if value < 1:
            raise SettingError(f"{what} came as {value}", allowed="a whole number from 1", fix=f"give the {what} of the data set")
    with nullcontext() if seed is None else isolated_random(seed), torch.device("cpu"):  # yours may draw from NumPy
        return make(channels=channels, classes=classes)


def is_own(name: str) -> bool:
    """Whether `name` is that of a network of the user's, whose code runs when it is looked up."""
    return ":" in name


def find(name: str) -> Callable[..., nn.Module]:
    """What makes the network `name`, called with channels= and classes=.

    Raises:
        UnknownName, SettingError: as `build` does.
    """
    if is_own(name):
        return partial(_make_own, name, _own(name))
    match = _NAME.fullmatch(name)
    base, width = (match["base"], float(match["width"] or 1)) if match else (name, 1.0)
    if width == 0:
        raise SettingError(f"model came as {name!r}", allowed="a factor over 0, such as -2x or -0.5x", fix=f"write {base!r} for 1x")
    if base in MODELS:
        return partial(_make, MODELS[base], width)
    if depth := _DEPTH.fullmatch(base):
        return partial(_make, resnet(int(depth[1])), width)
    raise unknown(name, MODELS, what="model", listing="`anymask list`")


def _make(model: Model, width: float, *, channels: int, classes: int) -> nn.Module:
    network = model.make(channels=channels, classes=classes, width=width)
    _initialise(network)
    return network


def _own(name: str) -> Callable[..., object]:
    place, _, attribute = name.partition(":")
    module = imported(place)
    make = getattr(module, attribute, None)
    if not callable(make):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(attribute, there, what=f"callable in {place}:")
    return make


def _make_own(name: str, make: Callable[..., object], **given: int) -> nn.Module:
    try:
        takes = inspect.signature(make).parameters
        anything = any(taken.kind is taken.VAR_KEYWORD for taken in takes.values())
        network = make(**{key: value for key, value in given.items() if anything or key in takes})
    except Exception as error:  # it is the user's code
        raise SettingError(
            f"model {name!r} could not be made ({type(error).__name__}: {error})",
            allowed="a callable that needs nothing but classes= and channels=",
            fix="mend it, or write a function around it",
        ) from error
    if not isinstance(network, nn.Module):
        raise SettingError(f"model {name!r} gave a {type(network).__name__}", allowed="a torch.nn.Module", fix="return the network")
    return network


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # nn.init.kaiming_normal_ forgets the groups, which makes depthwise weights too small by sqrt(channels)
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
