"""What people read when something they can mend went wrong: what came, what is allowed, what to do."""

from cyclopts import CycloptsError
from cyclopts.exceptions import UnknownCommandError, UnknownOptionError

from anymask.cli.app import COMMANDS
from anymask.errors import FULL, AnymaskError
from anymask.registry import nearest


def explain(error: BaseException) -> str:
    """`error` as three lines."""
    came, allowed, fix = _parts(error)
    return f"Error: {came}\nAllowed: {allowed}\nTo do: {fix}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or on an accelerator; PyTorch has no common class for these."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _parts(error: BaseException) -> tuple[str, str, str]:
    if isinstance(error, AnymaskError):
        return error.came, error.allowed, error.fix
    if isinstance(error, CycloptsError):
        return _command_line(error)
    if isinstance(error, OSError):
        return _file(error)
    return "memory ran out", "what fits this machine", "lower --batch-size (and raise --accumulate), or take a smaller --model"


def _command_line(error: CycloptsError) -> tuple[str, str, str]:
    command = " ".join(["anymask", *(error.command_chain or ())])
    see = f"`{command} --help` shows them all"
    if isinstance(error, UnknownOptionError):
        name = (error.token.keyword or error.token.value).split("=")[0]
        options = [option for argument in error.argument_collection for option in argument.names if option != "*"]
        return f"unknown option {name}", f"the options of `{command}`", _mean(name, options, see)
    if isinstance(error, UnknownCommandError):
        name = (error.unused_tokens or [""])[0]
        return f"unknown command {name!r}", ", ".join(COMMANDS), _mean(name, [*COMMANDS, "--help", "--version"], see)
    cause = str(error).strip().rstrip(".")
    return cause, f"the options of `{command}`, each with values of its kind", see


def _mean(name: str, names: list[str], see: str) -> str:
    near = nearest(name, names, most=1)
    return f"did you mean {near[0]}? {see}" if near else see


def _file(error: OSError) -> tuple[str, str, str]:
    came = str(error) if error.filename is None else f"{error.strerror}: {error.filename}"
    if isinstance(error, FileNotFoundError):
        return came, "a file that is there", "check the path"
    if isinstance(error, PermissionError):
        return came, "a file or folder that you may read or write", "choose another path, or change its permissions"
    if error.errno in FULL:
        return came, "a disk with room", "make room, and give the same command (train with --resume): what was finished is kept"
    return came, "a path that can be read or written", "check the path and the disk"
