"""Looking up names in literal tables, with the nearest names suggested."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from anymask.errors import UnknownName

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
