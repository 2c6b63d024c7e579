"""Looking up names in literal tables, with the nearest names suggested, and modules of the user's by name; types of values."""

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from anymask.errors import SettingError, UnknownName

T = TypeVar("T")


def nearest(name: str, names: Iterable[str], *, most: int = 3) -> list[str]:
    """The names most like `name`, best first, at most `most`; empty when nothing is near.

    Example:
        >>> nearest("synflw", ["snip", "synflow", "grasp"])
        ['synflow']
    """
    by_lower = {candidate.lower(): candidate for candidate in names}
    return [by_lower[match] for match in get_close_matches(name.lower(), by_lower, n=most, cutoff=0.6)]


def unknown(name: str, names: Iterable[str], *, what: str, listing: str = "") -> UnknownName:
    """The error for a `name` that is not in `names`; `listing` is the command or page that lists them."""
    names = list(names)
    near = nearest(name, names)
    fix = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else "choose one of these"
    return UnknownName(
        f"unknown {what} {name!r}",
        allowed=", ".join(names) or "nothing here",
        fix=fix.rstrip("?") + (f"; {listing} lists them" if listing else ""),
    )


def lookup(table: Mapping[str, T], name: str, *, what: str) -> T:
    """`table[name]`.

    Raises:
        UnknownName: with the nearest names, when the table does not hold it.

    Example:
        >>> lookup({"snip": 1}, "snip", what="mask method")
        1
    """
    if name not in table:
        raise unknown(name, table, what=what, listing="`anymask list`")
    return table[name]


def same_type(name: str, value: Any, like: Any) -> None:
    """Refuse a `value` that is not of the type of the default `like`; a whole number is a number, too.

    Raises:
        SettingError: naming what is allowed.
    """
    wanted = (int, float) if isinstance(like, float) else type(like)
    if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(like, bool)):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        allowed = words.get(type(like), f"a {type(like).__name__}")
        raise SettingError(f"{name} came as {value!r}", allowed=f"{allowed} such as {like!r}", fix="write one of these")


def imported(name: str) -> ModuleType:
    """The module called `name`, of the user's; the current folder is looked at last, so that nothing in it hides what is installed.

    Raises:
        UnknownName: when it is not found, or fails.

    Example:
        >>> imported("json").__name__
        'json'
    """
    if os.getcwd() not in sys.path:  # a console script has its own folder there instead
        sys.path.append(os.getcwd())
    try:
        return import_module(name)
    except Exception as error:  # it is the user's code
        raise UnknownName(
            f"module {name!r} cannot be imported ({type(error).__name__}: {error})",
            allowed="a module that is installed, or lies in the current folder",
            fix=f"""make `python -c "import {name}"` work here""",
        ) from error


@cache
def code_digest(module: ModuleType) -> str:
    """Twelve digits that change with the file of `module`, or with any file of Python in its folder where it is a package.

    As they are when it is asked first: the code that runs is that of then.

    Example:
        >>> import json
        >>> len(code_digest(json)), code_digest(json) == code_digest(json)
        (12, True)
    """
    file = Path(module.__file__ or "")
    digest = hashlib.sha256()
    for path in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:12]
