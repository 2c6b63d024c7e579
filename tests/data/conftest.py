"""Small files in the publishers' layouts, and the packs of real images where this machine has them."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def unpacked() -> Iterator[Callable[[str], Path]]:
    """Unpacks one pack of real images and returns the folder that it lies in; skips where there are no packs."""
    packs = Path(os.environ.get("ANYMASK_DATA") or REPOSITORY.parent / "shared" / "data")

    def unpack(name: str) -> Path:
        if not (packs / "unpack.py").is_file():
            pytest.skip(f"no packs of real images in {packs} (set ANYMASK_DATA)")
        folder = Path(root) / name
        subprocess.run([sys.executable, packs / "unpack.py", folder, name], check=True, capture_output=True)
        return folder

    with tempfile.TemporaryDirectory() as root:  # not pytest's tmp_path, which would keep 0.2 GB of each of the last three runs
        yield unpack


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion(folder: Path, *, train: np.ndarray, test: np.ndarray, classes: int = 10, zipped: bool = False) -> None:
    """The four idx files; labels go round the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, images in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(len(images)) % classes)):
            blob = idx(array)
            name = f"{part}-{kind}-ubyte"
            (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(blob) if zipped else blob)


def _save_python2_text(pickler: "_Python2", value: str | bytes) -> None:
    blob = value.encode("latin1") if isinstance(value, str) else value
    pickler.write(pickle.BINSTRING + struct.pack("<i", len(blob)) + blob)
    pickler.memoize(value)


class _Python2(pickle._Pickler):
    """Writes str and bytes as Python 2 wrote its str, which is what the published CIFAR files hold."""

    dispatch = {**pickle._Pickler.dispatch, str: _save_python2_text, bytes: _save_python2_text}  # noqa: RUF012

    def reducer_override(self, value: object) -> object:
        if isinstance(value, np.dtype):
            return np.dtype, (value.str[1:], 0, 1), value.__reduce__()[2]  # the 0 and 1 of old numpy
        return NotImplemented


def python2(record: object, *, numpy: str = "numpy.core") -> bytes:
    """`record` pickled as the publishers did; `numpy` is how the module of arrays is spelt."""
    file = io.BytesIO()
    _Python2(file, protocol=2).dump(record)
    for spelling in (b"cnumpy._core.", b"cnumpy.core."):
        file = io.BytesIO(file.getvalue().replace(spelling, f"c{numpy}.".encode()))
    return file.getvalue()


def cifar_rows(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_cifar10(folder: Path, *, batches: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, batches + 1):
        record = {"batch_label": "x", "labels": [number % 3, 0, 1], "data": cifar_rows(3, seed=number), "filenames": ["a", "b", "c"]}
        (folder / f"data_batch_{number}").write_bytes(python2(record))
    (folder / "test_batch").write_bytes(python2({"labels": [2, 1], "data": cifar_rows(2)}))
    (folder / "batches.meta").write_bytes(python2({"label_names": ["cat", "dog", "frog"], "num_vis": 3072}))


def write_image(path: Path, *, colour: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (6, 4)) -> None:
    """`size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
