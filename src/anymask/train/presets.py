"""Protocols by name: TOML files that come with the package, under what is said besides."""

from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from typing import Any

from anymask import toml
from anymask.errors import SettingError
from anymask.registry import lookup, same_type, unknown
from anymask.train.settings import Protocol

PROTOCOLS: dict[str, str] = {  # name -> file in anymask/protocols
    "short-15": "short-15.toml",
    "tost-182": "tost-182.toml",
    "grasp-160": "grasp-160.toml",
    "tiny-200": "tiny-200.toml",
}
_ABOUT = ("about", "source")  # of a file: for people


def protocol_of(table: Mapping[str, Any]) -> Protocol:
    """The protocol of plain values, as in a plan's table `[protocol]`.

    Args:
        table: fields of `Protocol`, with underscores or hyphens; "preset" names one of `PROTOCOLS`, over which the others go.
            What neither of them has is as in `Protocol()`.

    Raises:
        UnknownName: with the nearest names, for a preset or a field that there is not.
        SettingError: for a value of another type or out of its range.

    Example:
        >>> protocol_of({"preset": "tost-182", "batch_size": 256}).drops
        ('90ep', '135ep')
        >>> protocol_of({"epochs": 3}) == Protocol(epochs=3)
        True
    """
    given = {str(key).replace("-", "_"): value for key, value in table.items()}
    preset = given.pop("preset", None)
    if preset is not None and not isinstance(preset, str):
        raise SettingError(f"preset came as {preset!r}", allowed="a name: " + ", ".join(PROTOCOLS), fix="write one of these")
    defaults = {f.name: f.default for f in fields(Protocol)}
    for name in given:
        if name not in defaults:
            raise unknown(name, ["preset", *defaults], what="setting of a protocol")
    checked = {name: _typed(name, value, like=defaults[name]) for name, value in given.items()}
    return Protocol(**(({} if preset is None else preset_settings(preset)) | checked))


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a preset, as plain values.

    Raises:
        UnknownName: with the nearest names.

    Example:
        >>> preset_settings("tiny-200")["lr"]
        0.2
    """
    settings = {key: value for key, value in _read(name).items() if key not in _ABOUT}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def preset_about(name: str) -> tuple[str, str]:
    """One line about a preset, and where it comes from.

    Raises:
        UnknownName: with the nearest names.

    Example:
        >>> preset_about("grasp-160")[1]
        'arXiv 2002.07376'
    """
    table = _read(name)
    return table["about"], table["source"]


def _read(name: str) -> dict[str, Any]:
    file = lookup(PROTOCOLS, name, what="protocol")
    return toml.loads((resources.files("anymask") / "protocols" / file).read_text(encoding="utf-8"))


def _typed(name: str, value: Any, *, like: Any) -> Any:
    """`value`, where it is of the type of the default `like`; a list of texts becomes a tuple."""
    if isinstance(like, tuple):
        many = [value] if isinstance(value, str) else value
        if isinstance(many, (list, tuple)) and all(isinstance(entry, str) for entry in many):
            return tuple(many)
        raise SettingError(f"{name} came as {value!r}", allowed=f"a list such as {list(like)}", fix="write each as a text")
    same_type(name, value, like)
    return float(value) if isinstance(like, float) else value
