"""TOML, which Python reads by itself since 3.11."""

import sys
from pathlib import Path
from typing import Any

from anymask.errors import FileFormatError

if sys.version_info >= (3, 11):
    from tomllib import TOMLDecodeError, loads
else:
    from tomli import TOMLDecodeError, loads

__all__ = ["TOMLDecodeError", "loads", "read"]


def read(path: Path) -> dict[str, Any]:
    """The table in a file.

    Raises:
        OSError: when it cannot be read.
        FileFormatError: when it is not TOML.
    """
    text = path.read_bytes()
    try:
        return loads(text.decode("utf-8-sig"))  # some editors begin a file with a mark of UTF-8
    except ValueError as error:  # damaged TOML and text that is not UTF-8
        why = str(error).splitlines()[0]
        raise FileFormatError(f"{path} cannot be read ({why})", allowed="whole TOML, in UTF-8", fix="mend that line") from error
