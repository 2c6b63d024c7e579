"""Every error that anymask raises on purpose.

    AnymaskError
    ├── SettingError      a setting or argument out of range       (also a ValueError)
    │   └── UnknownName   a name that no table holds               (also a LookupError)
    ├── MaskError         a mask that does not fit, or cannot be   (also a ValueError)
    ├── TechniqueError    a technique that cannot do its work here (also a RuntimeError)
    ├── DataError         images or labels that cannot be read     (also a ValueError)
    ├── FileFormatError   a file that is damaged or not ours       (also a ValueError)
    ├── MissingFile       no file where one was named              (also a FileNotFoundError)
    └── IsFolder          a folder where a file was named          (also an IsADirectoryError)

Each message has three parts: what came, what is allowed, what to do. The command line prints them without a
traceback and exits with code 2.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # of an OSError: the disk takes nothing more


class AnymaskError(Exception):
    """An error in three parts.

    Args:
        came: what was given, with its value.
        allowed: what would have been right.
        fix: what to do now.

    Example:
        >>> str(AnymaskError("sparsity came as 2", allowed="a number in [0, 1)", fix="give 0.98 for 98% zeros"))
        'sparsity came as 2. Allowed: a number in [0, 1). To do: give 0.98 for 98% zeros.'
    """

    def __init__(self, came: str, *, allowed: str, fix: str) -> None:
        self.came, self.allowed, self.fix = came, allowed, fix
        super().__init__(f"{came}. Allowed: {allowed}. To do: {fix}.")

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments: the default would not unpickle
        return _rebuild, (type(self), self.came, self.allowed, self.fix)


def _rebuild(kind: type[AnymaskError], came: str, allowed: str, fix: str) -> AnymaskError:
    return kind(came, allowed=allowed, fix=fix)


class SettingError(AnymaskError, ValueError):
    """A setting or argument out of its range."""


class UnknownName(SettingError, LookupError):
    """A name that no table holds; the message suggests the nearest ones."""


class MaskError(AnymaskError, ValueError):
    """A mask that does not fit its model, or a budget that no mask can meet."""


class TechniqueError(AnymaskError, RuntimeError):
    """A technique that finds nothing to apply to, or is used out of order."""


class DataError(AnymaskError, ValueError):
    """Images, labels or folders that cannot be read."""


class FileFormatError(AnymaskError, ValueError):
    """A file that is damaged, truncated or of an unknown format."""


class MissingFile(AnymaskError, FileNotFoundError):
    """No file where one was named."""


class IsFolder(AnymaskError, IsADirectoryError):
    """A folder where a file was named, to read or to write."""


def note(message: Warning | str, *_: object, **__: object) -> None:
    """In place of `warnings.showwarning`: a line for people, without the place in the code."""
    print(f"Note: {message}", file=sys.stderr)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Errors of the block begin with `where` they come from."""
    try:
        yield
    except AnymaskError as error:
        if error.came.startswith(where):
            raise
        raise type(error)(f"{where}: {error.came}", allowed=error.allowed, fix=error.fix) from error
