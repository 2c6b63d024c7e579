"""The table of data sets, and `load`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anymask.data.cifar import read_cifar10, read_cifar100
from anymask.data.download import DOWNLOADS, fetch
from anymask.data.folders import read_folder, read_tiny_imagenet
from anymask.data.idx import EMBEDDED, STEMS, read_embedded, read_fashion_mnist
from anymask.data.splits import Dataset
from anymask.errors import DataError
from anymask.registry import lookup


@dataclass(frozen=True)
class Source:
    """How a data set is found and read.

    Args:
        about: one line for people.
        read: makes the data set from its folder (or file).
        files: what its folder must hold, each as it is or with .gz; none when any folder (or file) will do.
        inside: names of the folder, where a parent of it is given.
        known: places to look in when none is given.
    """

    about: str
    read: Callable[[Path], Dataset]
    files: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    known: tuple[Path, ...] = ()

    def find(self, place: Path) -> Path | None:
        """`place`, or the folder inside it, that holds all the files; None when neither does."""
        for folder in (place, *(place / name for name in self.inside)):
            if folder.exists() and all((folder / name).exists() or (folder / f"{name}.gz").exists() for name in self.files):
                return folder
        return None


DATASETS: dict[str, Source] = {
    "fashion-mnist-5k": Source(
        "5,000 + 1,000 images of Fashion-MNIST, 1 x 28 x 28, 10 classes; built in", read_embedded, known=(EMBEDDED,)
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST, 60,000 + 10,000 images, 1 x 28 x 28, 10 classes",
        read_fashion_mnist,
        files=STEMS,
        inside=("fashion-mnist", "FashionMNIST/raw"),
        known=(Path("/usr/share/datasets/fashion-mnist"),),  # Debian's package dataset-fashion-mnist
    ),
    "cifar10": Source(
        "CIFAR-10, 50,000 + 10,000 images, 3 x 32 x 32, 10 classes", read_cifar10, files=("batches.meta",), inside=("cifar-10-batches-py",)
    ),
    "cifar100": Source(
        "CIFAR-100, 50,000 + 10,000 images, 3 x 32 x 32, 100 classes", read_cifar100, files=("meta",), inside=("cifar-100-python",)
    ),
    "tiny-imagenet": Source(
        "Tiny-ImageNet, 100,000 + 10,000 images, 3 x 64 x 64, 200 classes",
        read_tiny_imagenet,
        files=("wnids.txt",),
        inside=("tiny-imagenet-200",),
    ),
    "folder": Source("any images of one size with one folder a class; 20% are held out where there is no test or val folder", read_folder),
}


def load(name: str, *, dir: str | os.PathLike[str] | None = None, download: bool = False) -> Dataset:
    """Read a data set.

    Args:
        name: a key of `DATASETS`.
        dir: the folder that holds the files as published, or the parent of that folder; for "fashion-mnist-5k" another file of
            the same format. When None: what comes with this package, Debian's folder, or what was downloaded before to
            `$XDG_CACHE_HOME/anymask` (`~/.cache/anymask`).
        download: fetch the published files when they are not there (needs `pip install 'anymask[images]'`).

    Notes:
        "folder" takes FOLDER/train/CLASS/* with FOLDER/test/CLASS/* or FOLDER/val/CLASS/*; where there are both, val is the validation
        split. Where there is neither, or where the classes lie directly in FOLDER, 20% of every class are held out as the test split,
        the same ones each time. "tiny-imagenet" has the publishers' val as its test split. A part of CIFAR-10 may hold fewer data_batch_*.

    Raises:
        UnknownName: for a name that is not in `DATASETS`.
        DataError: when files are missing or images cannot be read, and when a download fails.
        FileFormatError: for a damaged file, and for a pickle that holds more than CIFAR needs.

    Example:
        >>> data = load("fashion-mnist-5k")
        >>> data.train.images.shape, len(data.test), data.classes[9]
        (torch.Size([5000, 1, 28, 28]), 1000, 'Ankle boot')
    """
    source = lookup(DATASETS, name, what="data set")
    place = _place(name, source, dir)
    if download and name in DOWNLOADS and source.find(place) is None:
        fetch(DOWNLOADS[name], place)
    folder = source.find(place)
    if folder is None:
        raise DataError(
            f"no {name} in {place}",
            allowed=_layout(source, place),
            fix="name the folder that holds it" + (", or fetch it with download=True (--download)" if name in DOWNLOADS else ""),
        )
    return source.read(folder)


def _place(name: str, source: Source, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anymask"
    found = [place for place in source.known if source.find(place)]
    if not found and name not in DOWNLOADS:
        raise DataError(f"{name!r} came without a folder", allowed=source.about, fix="name the folder with dir=")
    return (*found, cache)[0]


def _layout(source: Source, place: Path) -> str:
    if not source.files:
        return "a path that is there"
    return f"{', '.join(source.files)} in {' or '.join(str(path) for path in (place, *(place / name for name in source.inside)))}"
