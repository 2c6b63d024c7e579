"""NumPy's .npz archives, read without `allow_pickle` and within bounds."""

import re
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from anymask.formats.leaves import Contents, Leaf
from anymask.formats.refusal import refusal

_RATIO, _FREE = 200, 1 << 24  # bytes unpacked: at most 200 for one of the file, and 16 MiB beside; masks compress well, bombs better
_KEY = re.compile(r"[^/\[\]'\"]+")  # "params/Conv_0/kernel", and "['params']['Conv_0']['kernel']" of jax.tree_util.keystr
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_NUMBERS = "biuf"


def read_arrays(path: Path, archive: zipfile.ZipFile) -> Contents:
    """The arrays of a .npz file; `archive` has to stay open while they are read.

    Raises:
        FileFormatError: for arrays of Python objects, files that are no arrays, and an archive that would unpack to far more
            than it is.
    """
    entries = archive.infolist()
    if other := [entry.filename for entry in entries if not entry.filename.endswith(".npy")]:
        raise refusal(path, f"an archive with {other[0]} in it, which is neither of torch.save nor an array of NumPy")
    if sum(entry.file_size for entry in entries) > _RATIO * path.stat().st_size + _FREE:
        raise refusal(path, f"an archive that unpacks to more than {_RATIO} times its size")
    found = {}
    for entry in entries:
        keys = tuple(_KEY.findall(entry.filename.removesuffix(".npy")))
        leaf = _leaf(path, archive, entry)
        if keys and leaf is not None:
            found[keys] = leaf
    return Contents("npz", found)


def _leaf(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Leaf | None:
    """One array; None when it holds no numbers, as a text beside the masks does."""
    with archive.open(entry) as file:
        shape, _, dtype, start = _header(path, file)
    if dtype.kind not in _NUMBERS:
        return None
    if start + int(np.prod(shape, dtype=object)) * dtype.itemsize != entry.file_size:
        raise refusal(path, f"{entry.filename} has {entry.file_size} bytes for an array of shape {shape} and type {dtype}")
    return Leaf(shape, dtype.kind == "f", lambda: _read(path, archive, entry))


def _read(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    with archive.open(entry) as file:
        shape, fortran, dtype, _ = _header(path, file)
        values = np.frombuffer(file.read(), dtype=dtype)
    array = values.reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype.newbyteorder("=")))


def _header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran's order, type, and where the numbers begin."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise refusal(path, f"an array in version {version} of NumPy's format, which is for records")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise refusal(path, "it holds Python objects, which would be unpickled; nothing was run", fix="save arrays of numbers or bool")
    return shape, fortran, dtype, file.tell()
