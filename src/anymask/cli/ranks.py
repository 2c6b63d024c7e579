"""The command line as one of several ranks, as torchrun starts them: one training, one voice."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from anymask.cli.app import COMMANDS
from anymask.cli.errors import explain
from anymask.errors import SettingError

Say = Callable[[str], None]
SPREAD = ("train", "compare")


def as_rank(words: Sequence[str], run: Callable[[Sequence[str], Say], int]) -> int:
    """Run one command together with the other ranks, and give 0; `run` does it, and says its errors by its second argument.

    Rank 0 alone prints. An error is said by the rank that meets it first, and ends this process at once: torchrun then ends the
    others, and those that wait for it lose their connection, which is nothing to be said again.
    """
    rank, failures = _join()
    stderr = sys.stderr

    def say(text: str) -> None:
        if _first(failures):
            print(text, file=stderr, flush=True)

    try:
        with _muted() if rank else contextlib.nullcontext():
            code = refused(words, say) or run(words, say)
            if code == 0:
                dist.barrier()  # nobody leaves while another may still fail
    except Exception:
        if _first(failures):
            raise
        code = 2
    if code:  # others would have to take part in `leave`, and Python's own end may abort, as said there: 1 of 16 runs of a test did
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    leave()
    return code


def leave() -> None:
    """Leave the process group, and free it with what holds it, such as the networks under DDP, which lie in cycles.

    A gloo thread that still runs while Python ends aborts the process: 2 of 12 plain DDP scripts did (PyTorch 2.13), and none of 24 after
    a collection. torchrun calls that a failure of the whole training.
    """
    dist.destroy_process_group()
    gc.collect()


def _join() -> tuple[int, Any]:
    """The rank in the process group of torchrun's environment (gloo, and NCCL for what lies on GPUs), and a store to count failures in."""
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)  # more ranks than GPUs: refused where a GPU is asked for
    prefixed: Any = dist.PrefixStore  # type: ignore[attr-defined]
    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=prefixed("training", store), rank=rank, world_size=size)
    return rank, prefixed("failures", store)


def _first(failures: Any) -> bool:
    """Whether no other rank has failed before; also where the store has gone with the process that held it."""
    with contextlib.suppress(RuntimeError):
        return failures.add("count", 1) == 1
    return False


def refused(words: Sequence[str], say: Say) -> int:
    """2, having said why, for a command that cannot use several ranks; 0 for all that comes to its own end."""
    if not words or words[0] not in COMMANDS or words[0] in SPREAD:
        return 0
    allowed = f"{' and '.join(SPREAD)}, which spread a training over ranks"
    error = SettingError(f"anymask {words[0]} was started on several ranks", allowed=allowed, fix="start it without torchrun")
    say(explain(error))
    return 2


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
