"""Who does what, among processes that share a folder: locks that the kernel lets go of when their process dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Busy(Exception):
    """Another process is making what this one needs."""


@contextmanager
def held(path: str | os.PathLike[str], *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path` in the block; gives whether this process has it, at once or, with `wait`, when others are done.

    The lock ends with the process, however that ends, so a SIGKILL leaves nothing stale. The file goes with the block.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "claims" / "a.lock"
        >>> with held(file) as mine, held(file) as again:
        ...     print(mine, again)
        True False
    """
    path = Path(path)
    handle = _locked(path, wait=wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # before the lock goes: afterwards it may be another's
            os.close(handle)


def _locked(path: Path, *, wait: bool) -> int | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_there(handle: int, path: Path) -> bool:
    """Whether the file that was locked is still the one at `path`: its last holder may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def clear_halves(path: Path) -> None:
    """Remove what `atomic` left of writes to `path` that a SIGKILL cut; for whoever holds the lock on it."""
    for half in path.parent.glob(f".{path.name}.*.tmp"):
        half.unlink(missing_ok=True)
