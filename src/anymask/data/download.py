"""Fetching the published files, whole or not at all; the only module that needs pooch."""

import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from anymask.errors import DataError, FileFormatError


@dataclass(frozen=True)
class Remote:
    """A published file.

    Args:
        url: where it lies.
        md5: its published checksum.
        into: the folder that a single file goes to; an archive (.tar.gz, .zip) brings its own.
    """

    url: str
    md5: str
    into: str = ""


_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DOWNLOADS: dict[str, tuple[Remote, ...]] = {
    "fashion-mnist": (
        Remote(f"{_FASHION}/train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "fashion-mnist"),
        Remote(f"{_FASHION}/train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe", "fashion-mnist"),
        Remote(f"{_FASHION}/t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79", "fashion-mnist"),
        Remote(f"{_FASHION}/t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310", "fashion-mnist"),
    ),
    "cifar10": (Remote("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
    "cifar100": (Remote("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
    "tiny-imagenet": (Remote("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),),
}


def fetch(remotes: Sequence[Remote], folder: Path) -> None:
    """Download and unpack `remotes` into `folder`; when anything fails, nothing unfinished stays there.

    Raises:
        DataError: when a file cannot be had, has another checksum, or cannot be written; or when pooch is not installed.
        FileFormatError: when an archive holds links or would write outside `folder`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
            whole = Path(name) / "whole"
            whole.mkdir()
            for remote in remotes:
                _unpack(_retrieve(remote, Path(name)), whole / remote.into)
            for path in sorted(whole.iterdir()):
                os.replace(path, folder / path.name)
    except OSError as error:
        raise DataError(
            f"the download could not be written to {folder} ({error})",
            allowed="a folder with room, without half a data set of the same name",
            fix="move what is in the way, or name another folder",
        ) from error


def _retrieve(remote: Remote, folder: Path) -> Path:
    try:
        import pooch
    except ImportError as error:
        raise DataError(
            "downloads need the package pooch, which is not installed",
            allowed="pooch >= 1.8",
            fix="pip install 'anymask[images]', or fetch the files by hand",
        ) from error
    try:
        return Path(pooch.retrieve(remote.url, known_hash=f"md5:{remote.md5}", fname=Path(remote.url).name, path=folder))
    except (OSError, ValueError) as error:  # requests raises OSErrors, a wrong checksum is a ValueError
        raise DataError(
            f"{remote.url} could not be fetched ({error})",
            allowed=f"a file with the md5 {remote.md5}",
            fix="check the network and try again, or fetch it by hand and name the folder",
        ) from error


def _unpack(path: Path, folder: Path) -> None:
    """Write the files of an archive under `folder`, or move `path` there when it is none."""
    if not path.name.endswith((".tar.gz", ".zip")):
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(path, folder / path.name)
        return
    try:
        for name, member in _zipped(path) if path.suffix == ".zip" else _tarred(path):
            target = folder / name
            # not tarfile's filter="data": Python 3.10.0 to 3.10.11 have none, and zipfile renames instead of refusing
            if member is None or not target.resolve().is_relative_to(folder.resolve()):
                raise _refused(path, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with member, open(target, "xb") as file:
                shutil.copyfileobj(member, file)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise _refused(path, str(error)) from error


def _tarred(path: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isdir():
                yield member.name, archive.extractfile(member) if member.isfile() else None


def _zipped(path: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, archive.open(member)


def _refused(path: Path, what: str) -> FileFormatError:
    return FileFormatError(
        f"the archive {path.name} was refused at {what!r}",
        allowed="a whole archive of plain files that stay inside its folder",
        fix="fetch the data set by hand and look at what is in it",
    )
