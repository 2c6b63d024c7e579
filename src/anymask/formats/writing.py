"""Writing masks: our own file, and those that other libraries read."""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from anymask.errors import MaskError, SettingError
from anymask.formats.names import aligned
from anymask.formats.own import packed
from anymask.formats.reading import load_mask, weights_in
from anymask.mask import Mask
from anymask.registry import nearest, unknown
from anymask.runlog import atomic

OWN = "anymask"
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Written:
    """A format that masks are written in: tensors from the mask and, where it needs them, the weights."""

    needs_weights: bool
    tensors: Callable[[Mask, Weights], dict[str, Tensor]]


def _weight_mask(mask: Mask, weights: Weights) -> dict[str, Tensor]:
    return {f"{name}_mask": mask[name].float() for name in mask}


def _torch_prune(mask: Mask, weights: Weights) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        found |= {f"{name}_orig": weight, f"{name}_mask": mask[name].to(weight.dtype)} if name in mask else {name: weight}
    return found


def _zeros(mask: Mask, weights: Weights) -> dict[str, Tensor]:
    return {name: weight.masked_fill(~mask[name], 0) if name in mask else weight for name, weight in weights.items()}


WRITTEN: dict[str, Written] = {
    "weight-mask": Written(False, _weight_mask),  # a dictionary of conv.weight_mask, of 0.0 and 1.0
    "torch-prune": Written(True, _torch_prune),  # a state dict of torch.nn.utils.prune, with weight_orig and weight_mask
    "zeros": Written(True, _zeros),  # a checkpoint with the pruned weights at 0
}


def save(mask: Mask, path: str | os.PathLike[str], *, format: str = OWN, weights: Weights | None = None) -> None:
    """Write `mask` to `path`, whole or not at all.

    Args:
        mask: what to write.
        path: of formats other than our own a name that ends in .safetensors gives safetensors, any other a file of torch.save.
        format: "anymask" (safetensors, one bit a weight, with `mask.info`); "weight-mask" (a dictionary of `conv.weight_mask`);
            "torch-prune" (a state dict for a model under torch.nn.utils.prune); "zeros" (a checkpoint whose pruned weights
            are 0; a kept weight that is exactly 0 will be read as pruned).
        weights: a state dict, for "torch-prune" and "zeros"; see `load_weights`.

    Raises:
        UnknownName: for another format.
        SettingError: when the format needs weights, or has no place for them, or they are no tensors.
        MaskError: naming each parameter that the weights lack or have in another shape.

    Example:
        >>> import tempfile, torch, anymask
        >>> path = tempfile.mkdtemp() + "/pruned.pt"
        >>> save(Mask({"weight": torch.eye(2)}), path, format="zeros", weights=torch.nn.Linear(2, 2).state_dict())
        >>> anymask.load_mask(path)["weight"].int().tolist()
        [[1, 0], [0, 1]]
    """
    row = _row(format)
    _check_given(row, format, given=weights is not None)
    weights = None if weights is None else _on_cpu(weights)
    if row is None:
        blob = packed(mask)
    else:
        fitting = mask if weights is None else _fitted(mask, weights)
        blob = _serialised(row.tensors(fitting, weights or {}), as_safetensors=Path(path).suffix == ".safetensors")
    with atomic(path) as file:
        file.write(blob)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = OWN,
    weights: str | os.PathLike[str] | None = None,
    replace: bool = False,
) -> Mask:
    """Read the mask in `source` and write it to `out` in the format `to`; returns it.

    Args:
        source: any file that `load_mask` reads.
        out: the file to write.
        to: as `format` of `save`.
        weights: a checkpoint, for formats that need one; what is written has its names, so that its model loads it.
        replace: whether `out` may be there already.

    Raises:
        SettingError: when `out` is there and is not to be replaced, and as for `save`.
        FileFormatError: when `source` or `weights` cannot be read.
    """
    _check_given(_row(to), to, given=weights is not None)
    if Path(out).exists() and not replace:
        raise SettingError(f"{out} is there already", allowed="a new file", fix="choose another name, or add --force to replace it")
    mask = load_mask(source)
    save(mask, out, format=to, weights=None if weights is None else weights_in(Path(weights), prefixes=False))
    return mask


def _row(format: str) -> Written | None:
    """The row of `format`; None for our own."""
    if format != OWN and format not in WRITTEN:
        raise unknown(format, (OWN, *WRITTEN), what="format to write")
    return WRITTEN.get(format)


def _check_given(row: Written | None, format: str, *, given: bool) -> None:
    needs = row is not None and row.needs_weights
    if needs and not given:
        fix = "give --weights CHECKPOINT, or weights=model.state_dict()"
        raise SettingError(f"format {format} came without weights", allowed=f"{format} with the weights of the network", fix=fix)
    if given and not needs:
        fix = "leave them out, or choose torch-prune or zeros"
        raise SettingError(f"format {format} came with weights", allowed=f"{format} without: it holds the mask alone", fix=fix)


def _fitted(mask: Mask, weights: Weights) -> Mask:
    """The mask under the names of the weights, which may have other prefixes."""
    names = aligned(mask, weights)
    renamed = {names.get(name, name): mask[name] for name in mask}
    fitting = Mask(renamed) if len(renamed) == len(mask) else mask  # two of its names may stand for one
    _check_fit(fitting, weights)
    return fitting


def _on_cpu(weights: Weights) -> Weights:
    """`weights`, where masks are, too."""
    if odd := [name for name, weight in weights.items() if not isinstance(weight, Tensor)]:
        raise SettingError(
            f"the weights hold what is no tensor: {', '.join(odd)}",
            allowed="a state dict of tensors",
            fix="leave out what get_extra_state gives",
        )
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def _check_fit(mask: Mask, weights: Weights) -> None:
    odd = [f"{name} is not there (nearest: {', '.join(nearest(name, weights)) or 'none'})" for name in mask if name not in weights]
    for name in mask:
        if name in weights and weights[name].shape != mask[name].shape:
            odd.append(f"{name} is {tuple(weights[name].shape)} there and {tuple(mask[name].shape)} in the mask")
    if odd:
        raise MaskError(
            f"the weights do not fit the mask: {'; '.join(odd)}",
            allowed="every parameter of the mask, in its shape",
            fix="give the checkpoint that the mask was made for",
        )


def _serialised(tensors: Mapping[str, Tensor], *, as_safetensors: bool) -> bytes:
    if as_safetensors:  # which has no tensors that share memory
        return to_bytes({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    file = io.BytesIO()
    torch.save(dict(tensors), file)
    return file.getvalue()
