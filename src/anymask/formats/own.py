"""Our own file: safetensors, one bit a weight."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

from anymask.formats.refusal import FORMAT, refusal
from anymask.mask import Mask

_FAMILY = FORMAT.rpartition("-")[0]


def packed(mask: Mask) -> bytes:
    """The file of `mask`: one bit a weight, with shapes and `mask.info` in the header."""
    bits = {name: np.packbits(mask[name].numpy().reshape(-1)) for name in mask}
    header = json.dumps({"shapes": {name: list(mask[name].shape) for name in mask}, "info": mask.info})
    # one key: safetensors writes several in an order of its own, and equal masks would be different files
    return to_bytes(bits, metadata={FORMAT: json.dumps({"header": header, "sha256": _digest(header, bits.values())})})


def unpacked(path: Path) -> Mask | None:
    """The mask in the safetensors file `path`; None when it is not one of ours."""
    with safe_open(path, framework="numpy") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
        if FORMAT not in metadata:
            _check_newer(path, metadata)
            return None
        written: dict[str, Any] = json.loads(metadata[FORMAT])
        header = json.loads(written["header"])
        if set(header["shapes"]) != set(file.keys()):
            raise refusal(path, "names of the header and of the tensors differ")
        bits = {name: file.get_tensor(name) for name in header["shapes"]}
    if _digest(written["header"], bits.values()) != written["sha256"]:
        raise refusal(path, "its checksum is wrong")
    kept = {name: _unpack(path, bits[name], shape) for name, shape in header["shapes"].items()}
    return Mask(kept, info=dict(header["info"]))


def _check_newer(path: Path, metadata: Mapping[str, str]) -> None:
    for key in metadata:
        if key.rpartition("-")[0] == _FAMILY:
            raise refusal(path, f"its format is {key}, and this version reads {FORMAT}", fix="install a newer anymask")
        if key.startswith("anymask-program-"):
            raise refusal(path, "a network of anymask.ship", fix="name a mask, or the run or checkpoint that it was made of")


def _digest(header: str, bits: Iterable[np.ndarray]) -> str:
    """A flipped bit would be another mask, and safetensors would not see it."""
    digest = hashlib.sha256(header.encode())
    for packed_bits in bits:
        digest.update(packed_bits.tobytes())
    return digest.hexdigest()


def _unpack(path: Path, bits: np.ndarray, shape: list[int]) -> torch.Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    if bits.dtype != np.uint8 or bits.ndim != 1 or len(bits) != -(-count // 8):
        raise refusal(path, f"{bits.size} bytes of {bits.dtype} for shape {shape}")
    return torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).reshape(shape)
