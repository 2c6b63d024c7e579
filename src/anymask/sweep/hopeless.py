"""Errors after which nothing that is left can be trained: they end the sweep, instead of failing one training after the other."""

from pathlib import Path

import torch

from anymask.errors import FULL, AnymaskError
from anymask.train.graphs import NotRecordedError


def check_disk(error: Exception, folder: Path) -> None:
    """Raise where `error` says that the disk of `folder` takes nothing more.

    Raises:
        AnymaskError: naming the file.
    """
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in FULL):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError):
        raise AnymaskError(
            f"{cause.strerror}: {cause.filename or folder}",  # a write that fails does not know its file
            allowed="a disk with room for what is trained",
            fix="make room; the same command goes on from there",
        ) from error


def check_gpu(error: Exception) -> None:
    """Raise where the GPU of this process does nothing more after `error`: an illegal access fails all that comes after it.

    Raises:
        AnymaskError: saying why.
    """
    if isinstance(error, NotRecordedError):
        raise error
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise AnymaskError(
                f"the GPU does nothing more in this process ({str(lost).splitlines()[0]})",
                allowed="a GPU that works",
                fix="give the same command, which goes on in a new process",
            ) from error
