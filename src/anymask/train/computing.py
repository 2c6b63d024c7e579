"""How a training is computed: what it takes and records, and not what it is."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anymask.errors import SettingError
from anymask.ranks import ranks
from anymask.registry import unknown
from anymask.train.sparsity import sparse_possible

DIAGNOSE = ("off", "on", "sharpness")
COMPILE = ("off", "on", "graph", "fused")


@dataclass(frozen=True)
class Computing:
    """The arguments of `fit` that leave a training what it is, but for rounding (and for dropout, which compiled draws other numbers)."""

    sparse: str = "auto"
    compile: str = "off"
    diagnose: str = "off"
    deterministic: bool = False

    @property
    def compiles(self) -> bool:
        """Whether the network goes through torch.compile."""
        return self.compile in ("on", "fused")

    @property
    def records(self) -> bool:
        """Whether steps are recorded as CUDA graphs."""
        return self.compile in ("graph", "fused")

    def check(self, *, device: str, precision: str, accumulate: int = 1, masked: bool = True, moves: bool = False) -> None:
        """Raise before any work what `fit` would raise after some of it.

        Raises:
            UnknownName: for a value that there is not.
            SettingError: for sparse="on", or a `compile` other than "off", where it cannot be.
        """
        for name, known in {"diagnose": DIAGNOSE, "compile": COMPILE}.items():
            if getattr(self, name) not in known:
                raise unknown(getattr(self, name), known, what=f"value of {name}:")
        if self.compile != "off" and ranks() > 1:
            raise SettingError(f"compile={self.compile!r} came on {ranks()} ranks", allowed="one process", fix="leave compile at 'off'")
        if self.records:
            _check_graph(self.compile, precision=precision, accumulate=accumulate, moves=moves)
        sparse_possible(self.sparse, device=device, precision=precision, masked=masked, moves=moves)


_asking, _lock = list[int](), threading.Lock()  # the mode that was before, once for each that is in the block


@contextmanager
def same_bits(on: bool) -> Iterator[None]:
    """Where `on`, PyTorch's deterministic algorithms alone, for as long as somebody is in the block; several threads may be."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is refused
    with _lock:
        _asking.append(torch.get_deterministic_debug_mode() if not _asking else _asking[0])
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise SettingError(
            f"deterministic came, and {str(error).partition(', but you set')[0]}",
            allowed="networks and techniques that PyTorch has deterministic algorithms for",
            fix="leave it out, or do that in another way",
        ) from error
    finally:
        with _lock:
            before = _asking.pop()
            if not _asking:
                torch.set_deterministic_debug_mode(before)


def _check_graph(mode: str, *, precision: str, accumulate: int, moves: bool) -> None:
    """Raise where steps cannot be recorded: what they do depends on numbers on the device, or several batches make one."""
    reasons = {
        "a mask that moves": moves,
        "precision float16, whose GradScaler looks at the gradients": precision == "float16",
        f"accumulate as {accumulate}": accumulate > 1,
    }
    for reason, there in reasons.items():
        if there:
            raise SettingError(
                f"compile={mode!r} came with {reason}",
                allowed="a mask that stays, float32 or bfloat16, and one batch for each step",
                fix="leave compile at 'off', or change that",
            )


def compiled(model: nn.Module, *, whole: int, graphs: bool) -> Callable[[Tensor], Any]:
    """`model` by torch.compile for training: once for each phase of a recipe.

    Args:
        whole: the size of a whole batch. One of another size, the last of an epoch, goes through the model as it is: to compile for it
            takes as long, and pays in one step of hundreds.
        graphs: let PyTorch record what it compiles as CUDA graphs, on a GPU.
    """
    graphs = graphs and next(model.parameters()).is_cuda

    def run(x: Tensor) -> Any:  # torch.compile would leave an attribute in the model itself
        return model(x)

    call = torch.compile(run, dynamic=False, mode="reduce-overhead" if graphs else None)

    def forward(x: Tensor) -> Any:
        if len(x) != whole:
            return model(x)
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return call(x)

    return forward


@contextmanager
def compiling() -> Iterator[None]:
    """Around what torch.compile may compile in, forward or backward.

    Raises:
        SettingError: where it cannot.
    """
    try:
        yield
    except torch._dynamo.exc.ShortenTraceback as error:  # BackendCompilerFailed, TritonMissing and their like
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise SettingError(
            f"torch.compile failed ({reason})",
            allowed="compile='on' or 'fused' where PyTorch's compiler works: with a C++ compiler on a CPU, with Triton on a GPU",
            fix="leave compile at 'off'",
        ) from error
