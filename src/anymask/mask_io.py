"""Mask files: safetensors, one bit a weight."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from anymask.errors import FileFormatError
from anymask.mask import Mask
from anymask.runlog import atomic

FORMAT = "anymask-mask-1"


def save(mask: Mask, path: str | os.PathLike[str]) -> None:
    """Write `mask` to `path`: safetensors, one bit a weight, with shapes and `mask.info` in the header."""
    packed = {name: np.packbits(mask[name].numpy().reshape(-1)) for name in mask}
    header = json.dumps({"shapes": {name: list(mask[name].shape) for name in mask}, "info": mask.info})
    # one key: safetensors writes several in an order of its own, and equal masks would be different files
    blob = to_bytes(packed, metadata={FORMAT: json.dumps({"header": header, "sha256": _digest(header, packed.values())})})
    with atomic(path) as file:
        file.write(blob)


def load_mask(path: str | os.PathLike[str]) -> Mask:
    """Read a mask that `Mask.save` wrote.

    Nothing in the file is run: safetensors holds numbers and text only.

    Raises:
        FileNotFoundError: when there is no such file.
        FileFormatError: when the file is damaged, truncated or no mask of ours.

    Example:
        >>> import tempfile, torch, anymask
        >>> path = tempfile.mkdtemp() + "/half.mask"
        >>> anymask.Mask({"weight": torch.eye(2)}).save(path)
        >>> anymask.load_mask(path).sparsity
        0.5
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no mask file at {path}. Allowed: a file written by mask.save(path). To do: check the path.")
    try:
        return _read(path)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise _bad(path, f"{type(error).__name__}: {error}") from error


def _read(path: Path) -> Mask:
    with safe_open(path, framework="numpy") as file:
        written = (file.metadata() or {}).get(FORMAT)
        if written is None:
            raise _bad(path, "no header of ours")
        metadata: dict[str, Any] = json.loads(written)
        header = json.loads(metadata["header"])
        if set(header["shapes"]) != set(file.keys()):
            raise _bad(path, "names of the header and of the tensors differ")
        packed = {name: file.get_tensor(name) for name in header["shapes"]}
    if _digest(metadata["header"], packed.values()) != metadata["sha256"]:
        raise _bad(path, "its checksum is wrong")
    kept = {name: _unpack(path, packed[name], shape) for name, shape in header["shapes"].items()}
    return Mask(kept, info=dict(header["info"]))


def _digest(header: str, packed: Iterable[np.ndarray]) -> str:
    """A flipped bit would be another mask, and safetensors would not see it."""
    digest = hashlib.sha256(header.encode())
    for bits in packed:
        digest.update(bits.tobytes())
    return digest.hexdigest()


def _unpack(path: Path, bits: np.ndarray, shape: list[int]) -> torch.Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    if bits.dtype != np.uint8 or bits.ndim != 1 or len(bits) != -(-count // 8):
        raise _bad(path, f"{bits.size} bytes of {bits.dtype} for shape {shape}")
    return torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).reshape(shape)


def _bad(path: Path, why: str) -> FileFormatError:
    return FileFormatError(
        f"{path} is not a mask that can be read ({why})",
        allowed=f"a whole file of format {FORMAT}",
        fix="make it again with mask.save(path)",
    )
