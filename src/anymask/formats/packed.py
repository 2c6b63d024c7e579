"""MessagePack files of flax, in the encoding of flax/serialization.py (google/flax)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anymask.errors import FileFormatError
from anymask.formats.leaves import Contents, Leaf

_ARRAY = 1  # the extension type of an array; 2 is a complex number and 3 a NumPy scalar, of which a mask has none
_CHUNKED = "__msgpack_chunked_array__"  # flax cuts arrays of more than 1 GiB into chunks
_DEEPEST, _LONGEST = 32, 1024  # dicts in dicts; entries of a list, for which memory is taken before they are read
_BFLOAT16 = "bfloat16"


def read_packed(path: Path) -> Contents:
    """The arrays of a file of flax.serialization.to_bytes or msgpack_serialize.

    Raises:
        FileFormatError: when the package msgpack is not there, or the file is damaged.
    """
    unpack = _unpacker(path)
    root = unpack(path.read_bytes(), raw=False, ext_hook=partial(_array, unpack))
    return Contents("msgpack", dict(_flat(root, ())))


def _unpacker(path: Path) -> Callable[..., Any]:
    try:
        import msgpack
    except ImportError as error:
        raise FileFormatError(
            f"{path} looks like a MessagePack file of flax, and the package msgpack is not installed",
            allowed="msgpack >= 1.0",
            fix="pip install 'anymask[jax]'",
        ) from error
    return partial(msgpack.unpackb, max_array_len=_LONGEST, strict_map_key=False)


def _array(unpack: Callable[..., Any], code: int, data: bytes) -> tuple[str, np.ndarray] | None:
    """One array as (name of its type, values): NumPy has no bfloat16, which comes as uint16."""
    if code != _ARRAY:
        return None
    shape, dtype, buffer = unpack(data, raw=True)
    name = dtype.decode("ascii")
    values = np.frombuffer(buffer, dtype=np.uint16 if name == _BFLOAT16 else np.dtype(name))
    return name, values.reshape(shape)


def _flat(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    if isinstance(node, tuple) and keys:
        yield keys, _leaf(*node)
    elif isinstance(node, dict) and _CHUNKED in node:
        yield keys, _leaf(*_joined(node))
    elif isinstance(node, dict) and len(keys) < _DEEPEST:
        for key, value in node.items():
            yield from _flat(value, (*keys, str(key)))


def _joined(node: dict[str, Any]) -> tuple[str, np.ndarray]:
    shape = [node["shape"][str(i)] for i in range(len(node["shape"]))]
    chunks = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
    return chunks[0][0], np.concatenate([values for _, values in chunks]).reshape(shape)


def _leaf(name: str, values: np.ndarray) -> Leaf:
    floating = name == _BFLOAT16 or values.dtype.kind == "f"
    return Leaf(values.shape, floating, partial(_tensor, name, values))


def _tensor(name: str, values: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if name == _BFLOAT16 else tensor
