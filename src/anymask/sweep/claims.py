"""Who does what, among processes that share a folder: locks that the kernel lets go of when their process dies."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from anymask.ranks import by_rank_0, from_rank, leads


class Busy(Exception):
    """Another process is making what this one needs."""


@contextmanager
def claimed(path: str | os.PathLike[str], *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path` in the block; gives whether this process has it, at once or, with `wait`, when others are done.

    The lock ends with the process, however that ends, so a SIGKILL leaves nothing stale. The file goes with the block.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "claims" / "a.lock"
        >>> with claimed(file) as mine, claimed(file) as again:
        ...     print(mine, again)
        True False
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=-1 if wait else 0)
    with suppress(Timeout):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with suppress(PermissionError):  # Windows keeps the file of a lock that is held
                path.unlink(missing_ok=True)  # before the lock goes: afterwards it may be another's
            lock.release()


def make_once(file: Path, make: Callable[[], None], *, wait: bool) -> None:
    """Call `make`, which writes `file`, unless another process does or has; all ranks of a training call this.

    Raises:
        Busy: when another process is at it, and this one is not to `wait`.
    """
    with claimed(file.with_suffix(".lock"), wait=wait) if leads() else nullcontext(True) as mine:
        if not from_rank(mine):
            raise Busy(f"{file} is being made by another process")
        if not by_rank_0(file.exists):
            make()


def clear_halves(path: Path) -> None:
    """Remove what `atomic` left of writes to `path` that a SIGKILL cut; for whoever holds the lock on it."""
    for half in path.parent.glob(f".{path.name}.*.tmp"):
        half.unlink(missing_ok=True)
