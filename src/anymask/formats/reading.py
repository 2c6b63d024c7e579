"""Reading masks, and the weights that some formats are written with."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anymask import prunables
from anymask.errors import MissingFile, SettingError
from anymask.formats.families import find, named_leaves, unwrapped, without_marks
from anymask.formats.names import matched
from anymask.formats.opening import SAFETENSORS, file_in, kind_of, opened
from anymask.formats.own import unpacked
from anymask.formats.refusal import refusal, refusing
from anymask.mask import Mask


def load_mask(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Mask:
    """Read a mask from a file of ours, or of another library; docs/formats.md lists them.

    Which it is, is told by what is in the file, never by its name. Nothing in it is run: pickles are read with
    `weights_only=True`, and no more memory is taken than a file of its size can fill.

    Args:
        path: the file, the index of a sharded checkpoint, or the folder of one.
        model: the model that the mask is for. Names are then matched with its own, whatever a trainer put before them,
            and the mask is checked against it; of a checkpoint whose mask is its zeros it covers `prunable(model)`.
            Without it such a mask covers every floating-point matrix that holds a zero; `info["left_out"]` names the others.

    Raises:
        MissingFile: when there is no such file; a FileNotFoundError, too.
        FileFormatError: when the file is damaged, truncated, holds no mask, or would run code.
        MaskError: when the mask does not fit `model`; it names each entry that does not, with the nearest ones.

    Example:
        >>> import tempfile, torch, anymask
        >>> path = tempfile.mkdtemp() + "/half.mask"
        >>> anymask.Mask({"weight": torch.eye(2)}).save(path)
        >>> anymask.load_mask(path).sparsity
        0.5
        >>> torch.save({"state_dict": {"module.weight": torch.tensor([[0.3, 0.0]])}}, path)
        >>> anymask.load_mask(path, model=torch.nn.Linear(2, 1)).info
        {'format': 'zeros', 'source': 'half.mask'}
    """
    path = _file(Path(path))
    own = _own(path)
    if own is not None:
        return own if model is None else _fitted(own, own.info, model)
    with opened(path) as contents:
        found = find(path, contents, model=model)
        info: dict[str, Any] = {"format": found.family, "source": path.name}
        info |= {"left_out": list(found.left_out)} if found.left_out else {}
        if model is not None and found.loose:
            _check_layout(path, found.kept, model)
        return Mask(found.kept, info=info) if model is None else _fitted(found.kept, info, model, loose=found.loose)


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a checkpoint under their plain names, without masks and wrappers.

    Raises:
        MissingFile: when there is no such file; a FileNotFoundError, too.
        FileFormatError: when the file is damaged, truncated, or would run code.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/net.pt"
        >>> torch.save({"model": {"fc.weight_orig": torch.ones(1, 2), "fc.weight_mask": torch.eye(1, 2)}}, path)
        >>> load_weights(path)
        {'fc.weight': tensor([[1., 1.]])}
    """
    return weights_in(Path(path), prefixes=True)


def weights_in(path: Path, *, prefixes: bool) -> dict[str, Tensor]:
    """As `load_weights`; without `prefixes` names keep a `module.` or `model.` that all of them begin with.

    Raises:
        MissingFile, FileFormatError: as `load_weights`.
    """
    path = _file(path, what="checkpoint")
    if _own(path) is not None:
        raise refusal(path, "a mask of ours, where a checkpoint is needed", fix="name the file with the weights")
    with opened(path) as contents:
        found = without_marks(named_leaves(unwrapped(contents.leaves), prefixes=prefixes))
        return {name: leaf.read().clone() for name, leaf in found.items()}


def load_into(model: nn.Module, weights: Mapping[str, Tensor], *, name: str) -> None:
    """Give `model`, which people call `name`, the weights of `load_weights`.

    Raises:
        SettingError: when they are those of another network.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> load_into(model, {"weight": torch.ones(1, 1)}, name="linear")
        >>> model.weight.item()
        1.0
    """
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        said = " ".join(str(error).split())[:300]
        raise SettingError(
            f"the weights are not those of {name} ({said})",
            allowed="its state dict",
            fix="name the right --model, and the --input that it takes",
        ) from None


def _file(path: Path, *, what: str = "mask file") -> Path:
    if path.is_dir():
        return file_in(path)
    if not path.is_file():
        raise MissingFile(f"no {what} at {path}", allowed="a file that docs/formats.md lists", fix="check the path")
    return path


def _own(path: Path) -> Mask | None:
    """The mask in a file of ours; None for a file of others."""
    with refusing(path):
        return unpacked(path) if kind_of(path) == SAFETENSORS else None


def _fitted(kept: Mapping[str, Tensor], info: Mapping[str, Any], model: nn.Module, *, loose: bool = False) -> Mask:
    names = matched({name: tuple(tensor.shape) for name, tensor in kept.items()}, model, loose=loose)
    renamed = {names.get(name, name): tensor for name, tensor in kept.items()}
    mask = Mask(renamed if len(renamed) == len(kept) else kept, info=info)
    mask.check(model)
    return mask


def _check_layout(path: Path, kept: Mapping[str, Tensor], model: nn.Module) -> None:
    """flax's transposed convolutions are laid out, and flipped, in other ways than torch's."""
    for name in matched({name: tuple(tensor.shape) for name, tensor in kept.items()}, model, loose=True).values():
        if isinstance(prunables.bare(model).get_submodule(name.rpartition(".")[0]), prunables.TRANSPOSED):
            raise refusal(path, f"{name} is of a transposed convolution, whose layout is not translated", fix="leave it dense")
