"""Files that survive: whole-or-not-at-all writes, and the ledger of finished runs; the name of what they ran on."""

import fcntl
import hashlib
import json
import math
import os
import platform
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from anymask.errors import FileFormatError, IsFolder, SettingError

CODE_OF = "code of "  # begins the names of digests of the user's modules among the `versions` of a row


@contextmanager
def atomic(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` and move it there when the block ends well.

    Nobody ever sees half a file: an error in the block removes the temporary one and leaves `path` as it was.

    Raises:
        IsFolder: when `path` is one.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with atomic(target, "w") as file:
        ...     _ = file.write("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    if path.is_dir():
        raise IsFolder(f"{path} is a folder", allowed="the name of a file to write", fix="name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    with _one_asks:
        mask = os.umask(0)
        os.umask(mask)
    return mask


_one_asks = threading.Lock()  # trainings beside each other in one process write their checkpoints at once


def settings_id(settings: Mapping[str, Any]) -> str:
    """A short name for `settings`: the same for equal settings in any order, on any machine.

    Raises:
        SettingError: for an infinity or NaN among them, which no ledger could hold when the training is done.

    Example:
        >>> settings_id({"a": 1, "b": 2}) == settings_id({"b": 2, "a": 1})
        True
    """
    if endless := _endless(settings):
        raise SettingError(
            ", ".join(endless),
            allowed="finite numbers, in what a ledger is to hold",
            fix="give a large number, such as 1e30, where no bound is meant",
        )
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _endless(value: Any, name: str = "") -> list[str]:
    """Which of nested settings are not finite."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [f"{name} came as {value}"]
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [said for key, part in inside for said in _endless(part, f"{name}.{key}".removeprefix("."))]


def file_hash(*paths: str | os.PathLike[str]) -> str:
    """What tells two files of the same name apart, or two checkpoints of several files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]


class Ledger:
    """The append-only file of finished runs, one JSON object a line.

    A row is added under a lock and in one write, so that several processes may share a ledger; half a last line (a machine
    that lost power in the middle) is left out by `rows` and dropped by the next `append`.

    Example:
        >>> import tempfile, pathlib
        >>> ledger = Ledger(pathlib.Path(tempfile.mkdtemp()) / "ledger.jsonl")
        >>> ledger.append({"id": "a", "test": 0.9})
        >>> [row["test"] for row in ledger.rows()]
        [0.9]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one finished run.

        Raises:
            ValueError: when `row` holds NaN or an infinity, which JSON does not have.
        """
        line = json.dumps(row, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            there = file.read()
            whole = _whole(there)
            if len(whole) < len(there):
                file.truncate(len(whole))
            file.write(whole[len(there) :] + line.encode())
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All finished runs, oldest first; none when the file is not there.

        Raises:
            FileFormatError: naming the line that is not a JSON object.
        """
        if not self.path.exists():
            return []
        lines = _whole(self.path.read_bytes()).split(b"\n")
        return [self._row(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        row = _object(line)
        if row is None:
            raise FileFormatError(
                f"line {number} of {self.path} is not a JSON object",
                allowed="one JSON object a line",
                fix="remove that line, or move the file away to begin a new ledger",
            )
        return row

    def size(self) -> int:
        """How many bytes there are: as many as before where nothing was added."""
        return self.path.stat().st_size if self.path.exists() else 0

    def ids(self) -> set[str]:
        """The ids of all finished runs."""
        return set(self.by_id())

    def by_id(self) -> dict[str, dict[str, Any]]:
        """All finished runs by their ids, but for rows of others that have none."""
        return {row["id"]: row for row in self.rows() if "id" in row}


def _whole(content: bytes) -> bytes:
    """The lines of `content` that are whole: a last row that lacks its newline alone (an editor took it) gets it back, half a row goes."""
    end = content.rfind(b"\n") + 1
    return content[:end] if _object(content[end:]) is None else content + b"\n"


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object in `line`; None for anything else."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def processor() -> str:
    """The processor's name, where the system says it, else its kind."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    said = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(said, "") or platform.processor() or platform.machine()
