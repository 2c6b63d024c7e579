"""Recipes of one name and several contents: a file that was edited between trainings, a preset that changed between versions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Contents = Mapping[str, Mapping[str, Any]]  # the settings of each technique


def told_apart(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`rows`; where recipes of one name hold different things, each is named by what it holds, too, as far as they differ.

    Example:
        >>> def row(eps):
        ...     return {"settings": {"recipe": "my.toml"}, "techniques": [{"name": "label_smoothing", "eps": eps}]}
        >>> [row["settings"]["recipe"] for row in told_apart([row(0.1), row(0.9)])]
        ['my.toml (label_smoothing.eps=0.1)', 'my.toml (label_smoothing.eps=0.9)']
    """
    held: dict[str, dict[str, Contents]] = {}
    for row in rows:
        if row.get("techniques") is not None:
            held.setdefault(row["settings"]["recipe"], {})[repr(row["techniques"])] = contents(row["techniques"])
    return [_named(row, list(held.get(row["settings"]["recipe"], {}).values())) for row in rows]


def _named(row: Mapping[str, Any], several: Sequence[Contents]) -> Mapping[str, Any]:
    if row.get("techniques") is None or not (words := ", ".join(_differing(contents(row["techniques"]), several))):
        return row
    return {**row, "settings": {**row["settings"], "recipe": f"{row['settings']['recipe']} ({words})"}}


def _differing(one: Contents, several: Sequence[Contents]) -> Iterator[str]:
    """In what `one` differs from others: its techniques, then the settings of each in which those that have it differ."""
    if len({tuple(other) for other in several}) > 1:
        yield "+".join(one) or "no technique"
    for name, settings in one.items():
        having = [other[name] for other in several if name in other]
        for key in sorted({key for other in having for key in other}):
            if len({repr(other.get(key)) for other in having}) > 1:
                yield f"{name}.{key}={settings.get(key)}"


def contents(techniques: Sequence[Mapping[str, Any]]) -> Contents:
    """The settings of each technique, by its name."""
    return {each["name"]: dict(flat(each)) for each in techniques}


def flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Its values by their dotted names."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", what) for inner, what in flat(value))
        else:
            yield key, value
