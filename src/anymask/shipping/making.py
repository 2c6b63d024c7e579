"""`anymask.ship`: a trained network to a file."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from anymask.errors import AnymaskError, MaskError, SettingError
from anymask.mask import Mask, needs_mask
from anymask.prunables import effective
from anymask.runlog import atomic
from anymask.shipping import file, onnxfile
from anymask.shipping.fusing import fused
from anymask.shipping.plan import STORED, stored
from anymask.shipping.runtime import Program
from anymask.shipping.tracing import plain, reason, traced
from anymask.surgery import copied

_OFF = 1e-3  # of the largest output: what rounding of float32 never comes to, but where large numbers cancel out
_ROUNDED = 100  # times what the model itself is off then: sums in another order, and norms that are folded
_MUCH = 0.2  # of the largest output: what no network loses that its weights' type suits; int8 costs 0.04


@dataclass(frozen=True)
class Shipped:
    """What was written.

    Args:
        path: the file.
        bytes: its size.
        dense_bytes: size of the model's parameters and buffers, dense, as they are.
        kept: number of weights that are not 0, of convolutions, linear layers and attention; in .anymask of those stored, where each use
            of a layer has its own.
        total: number of these weights with their zeros.
        difference: largest difference between what the file and the model give for the example; None where the file was not run.
    """

    path: Path
    bytes: int
    dense_bytes: int
    kept: int
    total: int
    difference: float | None


def ship(
    model: nn.Module,
    mask: Mask | None,
    *,
    example: Tensor,
    to: str | os.PathLike[str],
    values: str | None = None,
    info: dict[str, Any] | None = None,
) -> Shipped:
    """Write a trained network to the file `to`, whole or not at all; its name decides how.

    `.anymask`: batch norms folded, kept weights alone; `anymask.load` runs it with NumPy. `.onnx`: dense with the zeros, for batches
    of any size. `.safetensors`: the plain state dict. The model stays as it is; what is shipped is how it evaluates.

    Args:
        model: takes one tensor (N, C, H, W) or (N, D) and gives one; of integers (token ids) only to .onnx and .safetensors.
        mask: the mask it was trained with, to be checked: weights outside of it have to be 0. None: the zeros of the model count.
        example: a batch of real inputs, on which the file is compared with the model.
        to: the file; its folder is made when it is not there.
        values: of .anymask: "float16" (as when it is left out), "bfloat16" (for weights beyond 65,504), "float32", or "int8", of each
            output channel scaled to 127 steps.
        info: plain JSON values that are kept in an .anymask file.

    Raises:
        SettingError: naming the operation that cannot be shipped, and its module; for other names, values and examples.
        AnymaskError: when what would be written gives other outputs than the model.
        MaskError: when the mask does not fit, or weights outside of it are not 0.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> mask = Mask({"0.weight": torch.eye(3, 4)})
        >>> mask.apply(net)
        >>> done = ship(net, mask, example=torch.ones(2, 4), to=tempfile.mkdtemp() + "/small.anymask")
        >>> done.kept, done.total, done.difference < 0.01
        (3, 12, True)
    """
    path = Path(to)
    write = _WRITERS.get(path.suffix)
    if write is None:
        raise SettingError(f"{path} came as the file to write", allowed=f"a name that ends in {', '.join(_WRITERS)}", fix="name it so")
    if values not in (None, *STORED) or (path.suffix != ".anymask" and values not in (None, "float32")):
        allowed = ", ".join(STORED) if path.suffix == ".anymask" else f"float32 in {path.suffix}"
        raise SettingError(f"values came as {values!r}", allowed=allowed, fix="choose one of these, or leave it out")
    _check_example(example)
    try:
        json.dumps(info, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"info cannot be kept ({error})", allowed="plain JSON values", fix="give str, int, float, bool, None, list, dict"
        ) from error
    model, example = plain(model), example.detach().cpu()
    example = example.float() if example.is_floating_point() else example  # token ids stay integers
    if mask is not None:
        _check_zeros(model, needs_mask(mask))
    return write(model, example, path, values=values or "float16", info=info or {})


def _check_example(example: Tensor) -> None:
    allowed, fix = "a tensor (N, C, H, W) or (N, D) of finite numbers", "give a batch of inputs"
    if not isinstance(example, Tensor):
        raise SettingError(f"the example came as {type(example).__name__}", allowed=allowed, fix=fix)
    if example.ndim < 2 or not len(example):
        raise SettingError(f"the example came without samples, as {tuple(example.shape)}", allowed=allowed, fix=fix)
    if not example.isfinite().all():
        raise SettingError("the example holds numbers that are not finite, with which nothing can be compared", allowed=allowed, fix=fix)


@torch.no_grad()
def _check_zeros(model: nn.Module, mask: Mask) -> None:
    odd = {name: int((p[~mask[name]] != 0).sum()) for name, p in mask.check(model).items()}
    said = [f"{name} ({count:,})" for name, count in odd.items() if count]
    if said:
        raise MaskError(
            f"weights that the mask leaves out are not 0: {', '.join(said)}",
            allowed="zeros wherever the mask is False",
            fix="hold the mask while training; mask.apply(model) sets them to 0 now",
        )


def _ship_sparse(model: nn.Module, example: Tensor, path: Path, *, values: str, info: dict[str, Any]) -> Shipped:
    wanted = _answer(model, example)
    meant = replace(fused(traced(model, example)), info=info)
    if values != "float32":  # rounded or not, it has to be this model: of float16 alone nobody could tell
        _same(model, example, wanted, Program(stored(meant, "float32"))(example.numpy()))
    plan = stored(meant, values)
    blob = file.packed(plan)
    program = Program(file.unpacked(blob, path=path))  # what will be read, and not what was meant
    given = program(example.numpy())
    off = _same(model, example, wanted, given) if values == "float32" else _difference(wanted, given)
    largest = _largest(wanted)
    if largest and off > _MUCH * largest:
        share = f"{off / largest:.0%} of the largest output"
        warnings.warn(
            f"{values} changes what {type(model).__name__} gives by up to {share}: its weights are too small or too unlike for it. "
            "Ship with values='float32'",
            stacklevel=3,
        )
    return _written(blob, path, model, kept=plan.kept, total=plan.total, difference=off)


def _ship_onnx(model: nn.Module, example: Tensor, path: Path, *, values: str, info: dict[str, Any]) -> Shipped:
    wanted = _answer(model, example)
    blob = onnxfile.onnx_bytes(model, example)
    off = _same(model, example, wanted, onnxfile.Session(blob, threads=1)(example.numpy())) if onnxfile.has_runtime() else None
    return _written(blob, path, model, **_counted(model), difference=off)


def _ship_state(model: nn.Module, example: Tensor, path: Path, *, values: str, info: dict[str, Any]) -> Shipped:
    given = model.state_dict()
    if odd := [name for name, value in given.items() if not isinstance(value, Tensor)]:
        raise SettingError(
            f"the state dict holds what is no tensor: {', '.join(odd)}",
            allowed="tensors in .safetensors",
            fix="leave out what get_extra_state gives, or use torch.save",
        )
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in given.items()}
    return _written(to_bytes(state, metadata={"format": "pt"}), path, model, **_counted(model), difference=None)


_WRITERS: dict[str, Callable[..., Shipped]] = {".anymask": _ship_sparse, ".onnx": _ship_onnx, ".safetensors": _ship_state}


@torch.no_grad()
def _answer(model: nn.Module, example: Tensor) -> np.ndarray:
    """The one tensor that the model gives for the example, and that the file has to give."""
    try:
        given = model(example)
    except Exception as error:  # its own, of any kind: asked first, or the exporter would be blamed for it
        raise SettingError(
            f"{type(model).__name__} fails with the example, {example.dtype} {tuple(example.shape)} ({reason(error)})",
            allowed="a batch of inputs as the model takes them",
            fix="give such a batch as the example",
        ) from error
    found = [part for part in tree_leaves(given) if isinstance(part, Tensor)]
    if len(found) != 1:
        raise SettingError(
            f"{type(model).__name__} gives {len(found)} tensors", allowed="one output", fix="ship a module whose forward returns one"
        )
    return found[0].double().numpy()


def _same(model: nn.Module, example: Tensor, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The `_difference`; where it is more than rounding the file is refused: nothing wrong is ever written."""
    off = _difference(ours, theirs)
    if not off <= _OFF * _largest(ours) and not off <= _ROUNDED * _rounding(model, example, ours):
        raise AnymaskError(
            f"the file gives other outputs than the model, by up to {off:.3g}",
            allowed="equal up to rounding",
            fix="tell us which model this is: what would have been written is wrong",
        )
    return off


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference on the example."""
    return _largest(ours - theirs)


def _largest(numbers: np.ndarray) -> float:
    return float(np.abs(numbers).max(initial=0.0))


def _rounding(model: nn.Module, example: Tensor, ours: np.ndarray) -> float:
    """How far float32 takes the model from what it means: much of its outputs where large numbers cancel out, and no file comes closer."""
    try:
        return _difference(ours, _answer(copied(model).double(), example.double() if example.is_floating_point() else example))
    except SettingError:  # its forward knows float32 alone
        return 0.0


def _counted(model: nn.Module) -> dict[str, int]:
    held = effective(model)
    return {"kept": sum(int((weight != 0).sum()) for weight in held), "total": sum(weight.numel() for weight in held)}


def _written(blob: bytes, path: Path, model: nn.Module, *, kept: int, total: int, difference: float | None) -> Shipped:
    with atomic(path) as out:
        out.write(blob)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    dense = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Shipped(path, len(blob), dense, kept, total, difference)
