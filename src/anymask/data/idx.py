"""The idx files of the MNIST family, and the part of Fashion-MNIST that comes with this package."""

import gzip
import lzma
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from anymask.data.splits import Dataset, Split
from anymask.errors import DataError, FileFormatError

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
EMBEDDED = Path(__file__).parent / "embedded" / "fashion-mnist-5k.idx.xz"
STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}


def read_embedded(path: Path) -> Dataset:
    """Four idx arrays, one after the other in one .xz stream: training images and labels, test images and labels."""
    if path.is_dir():
        raise DataError(
            f"fashion-mnist-5k came with the folder {path}",
            allowed="a file of its own format, or nothing: it comes with the package",
            fix="name what is in that folder (--data cifar100, data.load('cifar100', dir=...)), or leave the folder away",
        )
    return _dataset("fashion-mnist-5k", _arrays(path, count=len(STEMS)), path)


def read_fashion_mnist(folder: Path) -> Dataset:
    """The four files of the publishers, each as it is or with .gz."""
    paths = [folder / stem if (folder / stem).exists() else folder / f"{stem}.gz" for stem in STEMS]
    return _dataset("fashion-mnist", [array for path in paths for array in _arrays(path, count=1)], folder)


def read_idx(file: IO[bytes]) -> Tensor:
    """One idx array of bytes: two zero bytes, 8 (the type), the number of axes, their lengths as big-endian u32, the values.

    Raises:
        ValueError: when the bytes are no such array, or end too early.

    Example:
        >>> import io
        >>> read_idx(io.BytesIO(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])))
        tensor([7, 9], dtype=torch.uint8)
    """
    head = file.read(4)
    if head[:3] != b"\0\0\x08" or len(head) < 4:
        raise ValueError(f"the first bytes are {head!r}")
    shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
    values = file.read(math.prod(shape))
    if not values or len(values) < math.prod(shape):
        raise ValueError(f"{len(values)} bytes for shape {shape}")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)


def _arrays(path: Path, *, count: int) -> list[Tensor]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            arrays = [read_idx(file) for _ in range(count)]
            if file.read(1):  # reading to the end also makes gzip and lzma compare their checksums
                raise ValueError(f"more than {count} arrays")
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, struct.error, zlib.error, lzma.LZMAError) as error:
        raise FileFormatError(
            f"{path} cannot be read ({type(error).__name__}: {error})",
            allowed="a whole idx file, as published, or a part written by tools/make_fashion_mnist_5k.py",
            fix="fetch or make the file again",
        ) from error
    return arrays


def _dataset(name: str, arrays: list[Tensor], source: Path) -> Dataset:
    if [array.ndim for array in arrays] != [3, 1, 3, 1]:
        raise FileFormatError(
            f"{source} holds arrays of shapes {[tuple(array.shape) for array in arrays]}",
            allowed="(N, H, W), (N,), (M, H, W), (M,)",
            fix="fetch or make the files again",
        )
    train, test = (Split(arrays[i].unsqueeze(1), arrays[i + 1].long()) for i in (0, 2))
    return Dataset(name, CLASSES, train, test)
