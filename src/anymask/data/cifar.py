"""CIFAR-10 and CIFAR-100 from the publishers' pickled files, through an unpickler that can run nothing."""

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anymask.data.splits import Dataset, Split
from anymask.errors import DataError, FileFormatError


class _Dtype:
    """`np.dtype` for old pickles, which write 0 and 1 for its two booleans; numpy 2.4.0 and 2.4.1 warn of that.

    An instance without a `__dict__`, since a pickle may set attributes of whatever it can name.
    """

    __slots__ = ()

    def __call__(self, spec: str | bytes, align: int = 0, copy: int = 0) -> "np.dtype[Any]":
        return np.dtype(_text(spec), bool(align), bool(copy))


_RECONSTRUCT = np.empty(0).__reduce__()[0]
# All that the published files name, in the spellings of numpy 1 and 2.
_PERMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _Dtype(),
    ("_codecs", "encode"): codecs.encode,  # how Python 3 writes bytes in protocol 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PERMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file needs")
        return _PERMITTED[module, name]


def read_cifar10(folder: Path) -> Dataset:
    """All `data_batch_1` to 9 that are there, `test_batch` and `batches.meta`; a part of CIFAR-10 may hold fewer batches."""
    train = [_split(path, "labels") for path in sorted(folder.glob("data_batch_[0-9]"))]
    if not train:
        raise _missing(folder / "data_batch_1")
    whole = Split(torch.cat([part.images for part in train]), torch.cat([part.labels for part in train]))
    return Dataset("cifar10", _classes(folder / "batches.meta", "label_names"), whole, _split(folder / "test_batch", "labels"))


def read_cifar100(folder: Path) -> Dataset:
    """`train`, `test` and `meta`, with the 100 fine labels."""
    train, test = (_split(folder / part, "fine_labels") for part in ("train", "test"))
    return Dataset("cifar100", _classes(folder / "meta", "fine_label_names"), train, test)


def _split(path: Path, key: str) -> Split:
    record = _record(path)
    data, labels = record.get("data"), record.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise _bad(path, "its data are not uint8 (N, 3072)")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels) or len(labels) != len(data):
        raise _bad(path, f"its {key} are not a list of {len(data)} whole numbers")
    return Split(torch.tensor(data).reshape(-1, 3, 32, 32), torch.tensor(labels))


def _classes(path: Path, key: str) -> tuple[str, ...]:
    names = _record(path).get(key)
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
        raise _bad(path, f"its {key} are not a list of names")
    return tuple(_text(name) for name in names)


def _record(path: Path) -> dict[str, Any]:
    """The dictionary in `path`; its keys are bytes as published (Python 2), or text when somebody wrote it again."""
    if not path.is_file():
        raise _missing(path)
    try:
        with open(path, "rb") as file:
            record = _Unpickler(file, encoding="bytes").load()
        return {_text(key): value for key, value in record.items()}
    except Exception as error:  # bytes that anybody may have written can raise anything
        raise _bad(path, f"{type(error).__name__}: {error}") from error


def _text(name: str | bytes) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else name


def _bad(path: Path, why: str) -> FileFormatError:
    return FileFormatError(
        f"{path} cannot be read as a CIFAR file ({why})",
        allowed="the pickled files of the python version of CIFAR-10 or CIFAR-100, and nothing else that is pickled",
        fix="fetch the file again from https://www.cs.toronto.edu/~kriz/cifar.html",
    )


def _missing(path: Path) -> DataError:
    return DataError(
        f"no {path.name} in {path.parent}",
        allowed="cifar-10-batches-py with data_batch_*, test_batch and batches.meta, or cifar-100-python with train, test and meta",
        fix="fetch the python version from https://www.cs.toronto.edu/~kriz/cifar.html",
    )
