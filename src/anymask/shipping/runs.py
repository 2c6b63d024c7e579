"""What `anymask train` leaves in a folder, and checkpoints of networks of `anymask.models`, as models to ship."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anymask import models
from anymask.errors import AnymaskError, MaskError, SettingError
from anymask.formats import load_mask, load_weights
from anymask.formats.reading import load_into
from anymask.mask import Mask
from anymask.runlog import Ledger

WEIGHTS, MASK, LEDGER = "model.safetensors", "mask.mask", "ledger.jsonl"
_SIDE = {"fashion-mnist-5k": 28, "fashion-mnist": 28, "cifar10": 32, "cifar100": 32, "tiny-imagenet": 64}  # pixels, of `anymask.data`
_MOST = 2**25  # numbers of one sample: there are eight in an example
_TOLD = ("model", "data", "mask", "sparsity", "recipe", "seed")  # settings of a run that its file keeps


@dataclass(frozen=True)
class Trained:
    """A model with its mask, an example of its input, and what is known of where it comes from."""

    model: nn.Module
    mask: Mask | None
    example: Tensor
    info: Mapping[str, Any]


def of_folder(folder: Path, *, shape: tuple[int, int, int] | None = None, model: str | None = None) -> Trained:
    """The network that `anymask train --out folder` has kept.

    Args:
        folder: with model.safetensors, ledger.jsonl and, unless it is dense, mask.mask.
        shape: of one image, (C, H, W), where neither the data nor the mask says it.
        model: its name, where it is a network of the user's ("module:callable"): a folder from anywhere runs no code by itself.

    Raises:
        SettingError: when the folder holds no finished training, or nothing says how large its images are, and for another `model`.
        FileFormatError: when a file in it is damaged.
    """
    rows = Ledger(folder / LEDGER).rows()
    if len(rows) != 1 or not (folder / WEIGHTS).is_file() or not isinstance(rows[0].get("settings"), dict):
        raise SettingError(
            f"{folder} holds no finished training with its weights",
            allowed=f"a folder of `anymask train`, with {WEIGHTS} and a {LEDGER} of one row",
            fix="name the --out of anymask train, or a checkpoint with --model and --input",
        )
    settings: dict[str, Any] = rows[0]["settings"]
    network = str(settings.get("model"))
    if network != model and (model is not None or models.is_own(network)):
        raise SettingError(
            f"{folder} holds a {network}" + (f", and {model} came" if model else ", whose code would be run"),
            allowed="the network that was trained, by its name where it is one of yours",
            fix=f"give --model {network}, if you trust it",
        )
    mask = load_mask(folder / MASK) if (folder / MASK).is_file() else None
    weights = load_weights(folder / WEIGHTS)
    found = shape or _recorded(mask) or _usual(str(settings.get("data")), weights)
    if found is None:
        raise SettingError(
            f"nothing in {folder} says how large its images are", allowed="channels, height and width", fix="give --input 3 32 32"
        )
    told = {name: settings[name] for name in _TOLD if name in settings}
    accuracy = rows[0].get("accuracy")
    told |= {"accuracy": accuracy["test"]} if isinstance(accuracy, dict) and "test" in accuracy else {}
    return _trained(network, weights, mask=mask, shape=found, info=told)


def of_checkpoint(path: Path, *, model: str, shape: tuple[int, int, int], mask: Path | None = None) -> Trained:
    """A network of `anymask.models` with the weights in a checkpoint.

    Args:
        path: safetensors, or a file of torch.save; masks of torch.nn.utils.prune in it are applied.
        model: its name, as in `anymask list models`.
        shape: of one image, (C, H, W).
        mask: a mask file; its zeros become zeros of the weights.

    Raises:
        SettingError: when the weights are not of that model, and for a `shape` that no image has.
        MaskError, FileFormatError: when the mask does not fit, or a file is damaged.
    """
    found = _trained(model, load_weights(path), mask=None, shape=shape, info={"model": model, "source": path.name})
    given = load_mask(mask, model=found.model) if mask is not None else _inside(path, found.model)
    if given is None:
        return found
    given.apply(found.model)
    return Trained(found.model, given, found.example, found.info)


def _inside(path: Path, model: nn.Module) -> Mask | None:
    """The mask that a checkpoint holds beside its weights; None when it holds none."""
    try:
        return load_mask(path, model=model)
    except AnymaskError:  # a dense one
        return None


def _trained(
    name: str, weights: Mapping[str, Tensor], *, mask: Mask | None, shape: tuple[int, int, int], info: Mapping[str, Any]
) -> Trained:
    if min(shape) < 1 or math.prod(shape) > _MOST:
        raise SettingError(
            f"the input came as {' x '.join(map(str, shape))}",
            allowed=f"numbers over 0, at most {_MOST:,} a sample",
            fix="give --input 3 32 32",
        )
    classes = next((weight.shape[0] for weight in reversed(list(weights.values())) if weight.ndim == 2), 10)
    model = models.build(name, classes=classes, channels=shape[0])
    load_into(model, weights, name=name)
    if mask is not None and not set(mask) <= set(weights):
        raise MaskError(f"the mask is not of {name}", allowed="the mask it was trained with", fix="copy the whole folder")
    generator = torch.Generator().manual_seed(0)
    return Trained(model.eval(), mask, torch.randn(8, *shape, generator=generator), info)


def _recorded(mask: Mask | None) -> tuple[int, int, int] | None:
    """The input that a mask says it was made for, if it says one."""
    network = {} if mask is None else mask.info.get("network")
    shape = network.get("input") if isinstance(network, Mapping) else None
    if isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n < 4096 for n in shape):
        return shape[0], shape[1], shape[2]
    return None


def _usual(data: str, weights: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """The input of images of that name, which have as many channels as the first convolution takes."""
    first = next((weight for weight in weights.values() if weight.ndim == 4), None)
    if data not in _SIDE or first is None:
        return None
    return first.shape[1], _SIDE[data], _SIDE[data]
