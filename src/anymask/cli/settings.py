"""Where settings come from: options, and a TOML or YAML file under them."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from cyclopts import App, Group, Parameter
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.config import Dict

from anymask import toml
from anymask.errors import FileFormatError, SettingError
from anymask.registry import imported, unknown

RUN = Group("Run", sort_key=0)
GRID = Group("Grid", sort_key=1)
METHOD = Group("Method", sort_key=2)
EXPERIMENT = Group("Data and network", sort_key=3)
PROTOCOL = Group("Protocol", sort_key=4)

Sparse = Annotated[
    str,
    Parameter(
        group=RUN,
        help="Layers that compute kept weights alone: auto (on the CPU, where measured faster), on (all that can be), off. "
        "The results are those of dense layers but for rounding.",
    ),
]
Compile = Annotated[
    str,
    Parameter(
        group=RUN,
        help="off; on trains through torch.compile, which takes its time at the start and whenever ghosts go; graph records each step as a "
        "CUDA graph, for small networks on a GPU; fused does both. The results are the same but for rounding (compiled, dropout too).",
    ),
]
Diagnose = Annotated[
    str,
    Parameter(
        group=RUN,
        help="Record each epoch what explains the training (docs/diagnostics.md): off, on, or sharpness, which costs more. "
        "The training is the same.",
    ),
]
Deterministic = Annotated[
    bool,
    Parameter(
        group=RUN,
        negative=(),
        help="Compute with PyTorch's deterministic algorithms: the same command gives the same bits on a GPU, too, and is slower there.",
    ),
]
Budget = Annotated[str | None, Parameter(group=RUN, help="Stop in time, at the end of an epoch, and say what is left: 25m, 2h, 90s.")]
Device = Annotated[str, Parameter(group=RUN, help="cpu, cuda, cuda:1, mps, or auto for the fastest there is.")]
ConfigFile = Annotated[
    Path | None,
    Parameter(group=RUN, help="File.toml or file.yaml with settings, named as the options are; options given here override it."),
]
Preset = Annotated[
    str | None,
    Parameter(
        name="--protocol",
        group=PROTOCOL,
        help="A published protocol by name, such as tost-182; `anymask list protocols` shows them. Other settings override it.",
    ),
]
# --recipes is none of them: in tost:lrsi,ghost_skip the comma has a meaning
_LISTS = ("--masks", "--sparsity", "--exclude", "--drops", "--plugins")
_WHOLE = re.compile(r"[+-]?\d+")


def split_commas(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """`--masks snip,synflow` as well as `--masks snip synflow`. Called by cyclopts."""
    for argument in _named(arguments, _LISTS):
        words = [(token, word) for token in argument.tokens for word in token.value.split(",") if word]
        if argument.tokens and not words:  # "$MASKS", which is not set: not the same as to leave it out
            raise SettingError(f"{argument.name} came empty", allowed="one or more", fix=f"name them, or leave {argument.name} out")
        argument.tokens = [token.evolve(value=word, index=index) for index, (token, word) in enumerate(words)]


def expand_home(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """`--out=~/x`, and ~ in a file of settings, which no shell expands. Called by cyclopts."""
    for argument in arguments:
        if argument.hint is Path or Path in get_args(argument.hint):
            argument.tokens = [token.evolve(value=os.path.expanduser(token.value)) for token in argument.tokens]


def read_config(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the arguments that are not on the command line the values in the file of `--config`. Called by cyclopts.

    Raises:
        OSError: when the file cannot be read.
        FileFormatError: when it is not TOML or YAML, or no table of settings.
        UnknownName: for a key that is no setting.
    """
    for argument in _named(arguments, ("--config",)):
        for token in argument.tokens:
            path = Path(token.value)
            settings = load_table(path)
            known = {a.name.lstrip("-").replace("-", "_"): a for a in arguments if a.name not in ("*", "--config")}
            for key, value in settings.items():
                taker = known.get(str(key).replace("-", "_"))
                if taker is None:
                    raise unknown(str(key), known, what=f"setting in {path}:")
                _check_value(path, key, value, many=get_origin(taker.hint) is tuple)
                if isinstance(value, bool) and taker.hint is str:  # YAML takes the words on and off for these
                    settings = {**settings, key: "on" if value else "off"}
            Dict(settings, source=str(path), use_commands_as_keys=False)(app, commands, arguments)
    _read_preset(app, commands, arguments)
    for argument in _named(arguments, ("--plugins",)):  # now, because the settings that follow may be names of theirs
        for token in argument.tokens:
            imported(token.value)


def _read_preset(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the arguments that neither the command line nor a file gives the values of the protocol that one of them names."""
    for argument in _named(arguments, ("--protocol",)):
        for token in argument.tokens[-1:]:
            from anymask.train.presets import preset_settings  # needs torch, which the help does without

            settings = {key: list(value) if isinstance(value, tuple) else value for key, value in preset_settings(token.value).items()}
            Dict(settings, source=f"protocol {token.value}", use_commands_as_keys=False)(app, commands, arguments)


def check_whole_numbers(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse 2.5 where a whole number belongs, which cyclopts would round. Called by cyclopts."""
    for argument in arguments:
        for token in argument.tokens:
            if _holds_int(argument.hint) and token.value and not _WHOLE.fullmatch(token.value):
                raise SettingError(f"{argument.name} came as {token.value!r}", allowed="a whole number", fix="write 3, for example")


def check_out(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse an empty --out, as "$OUT" is where there is no OUT: it would be the current folder. Called by cyclopts."""
    if any(not token.value for argument in _named(arguments, ("--out",)) for token in argument.tokens):
        raise SettingError("--out came empty", allowed="a path", fix="name one; the current folder is .")


def _holds_int(hint: Any) -> bool:
    """Whether `hint` is int, or has it within, as `int | None` and `tuple[int, int, int]` do."""
    return hint is int or any(map(_holds_int, get_args(hint)))


def load_table(path: Path) -> dict[str, Any]:
    """The table in a TOML or YAML file.

    Raises:
        OSError: when the file cannot be read.
        FileFormatError: when it is neither, or damaged.
    """
    if path.suffix.lower() not in _PARSERS:
        raise SettingError(f"{path} came as a file of settings", allowed=", ".join(_PARSERS), fix="name the file by its format")
    text = path.read_bytes()
    try:
        table = _PARSERS[path.suffix.lower()](text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # damaged TOML and text that is not UTF-8 are ValueErrors
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(f"{path} cannot be read ({why})", allowed="whole TOML or YAML, in UTF-8", fix="mend that line") from error
    if table is None:  # YAML without a line that is not a comment
        return {}
    if not isinstance(table, dict):
        raise FileFormatError(f"{path} holds a {type(table).__name__}", allowed="lines of name: value", fix="write epochs: 3, for example")
    return table


def _yaml(text: str) -> Any:
    import yaml

    class Once(yaml.SafeLoader):
        """Refuses a name that comes twice, as TOML does."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [name for place, name in enumerate(names) if name in names[:place]]
            if twice:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", node.start_mark)
            return super().construct_mapping(node, deep=deep)

    try:
        return yaml.load(text, Loader=Once)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place is not None else ""
        raise ValueError(f"{getattr(error, 'problem', None) or 'no YAML'}{line}") from error


_PARSERS: dict[str, Callable[[str], Any]] = {".toml": toml.loads, ".yaml": _yaml, ".yml": _yaml}


def _check_value(path: Path, key: str, value: Any, *, many: bool) -> None:
    entries = value if many and isinstance(value, list) else [value]
    if not all(isinstance(entry, (str, int, float)) for entry in entries):
        allowed = "a text, a number, true or false" + (", or a list of these" if many else "")
        raise SettingError(f"{key} in {path} came as {value!r}", allowed=allowed, fix="write one of these")


def _named(arguments: ArgumentCollection, names: Iterable[str]) -> list[Argument]:
    return [argument for argument in arguments if argument.name in names]
