"""How a file that cannot be read is refused."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anymask.errors import AnymaskError, FileFormatError

FORMAT = "anymask-mask-1"
_GLOBAL = re.compile(r"GLOBAL (\S+)")


def refusal(path: Path, why: str, *, fix: str = "make the file again: mask.save(path), or a whole copy of the original") -> FileFormatError:
    """The error for a file that holds nothing that can be read."""
    allowed = f"a whole file of format {FORMAT}, or one that docs/formats.md lists"
    return FileFormatError(f"{path} cannot be read as a mask or checkpoint ({why})", allowed=allowed, fix=fix)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Whatever a parser raises inside the block becomes a refusal of `path`; its warnings are about the file, and silent.

    Errors of ours, and those of the operating system that name a file, pass.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except AnymaskError:
        raise
    except Exception as error:  # parsers of four packages: a damaged file drives them to any exception that there is
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise _translated(path, error) from error


def _translated(path: Path, error: Exception) -> FileFormatError:
    if found := _GLOBAL.search(str(error)):
        why = f"it is a pickle that would run or build {found[1]}, which is no tensor; nothing was run"
        return refusal(path, why, fix="save tensors only: torch.save(model.state_dict(), path), or a plain dict of name -> mask")
    text = str(error)
    said = " ".join((text.partition("WeightsUnpickler error:")[2] or text).split())[:200]
    return refusal(path, f"{type(error).__name__}: {said}" if said else type(error).__name__)
