"""The command line: `anymask prune | train | compare | sweep | report | ship ...`."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cyclopts import CycloptsError

from anymask.cli.app import make_app
from anymask.cli.errors import explain, is_out_of_memory
from anymask.errors import AnymaskError, note


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 0, 1 where trainings of a sweep failed, 2 for what the user can mend, 130 after Ctrl-C, 141
    where nobody reads any more. Under torchrun it is one of several.

    Args:
        argv: the words after `anymask`; None for those of this process.

    Example:
        >>> main(["--version"])
        0.1.0
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return _run(words, lambda text: print(text, file=sys.stderr))
    from anymask.cli.ranks import as_rank  # loads torch

    return as_rank(words, _run)


def _run(words: Sequence[str], say: Callable[[str], None]) -> int:
    """Run one command; what the user can mend goes to `say`."""
    try:
        with _warnings_as_notes():
            code = make_app()(words, exit_on_error=False, print_error=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has left, as in `anymask list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 141
    except (AnymaskError, CycloptsError, OSError) as error:
        say(explain(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say(explain(error))
        return 2
    return int(code or 0)


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = note
        yield
