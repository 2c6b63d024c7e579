"""Steps of a training that are recorded as CUDA graphs: what a GPU was told once it does again without being told."""

import gc
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anymask.errors import SettingError

WARM = 3  # steps of a kind before one is recorded: cuDNN looks for its algorithms in them, and what is made once is made


class NotRecordedError(SettingError):
    """A step that does not let itself be recorded. PyTorch before 2.12 allocates no memory properly after it: end the process."""


@dataclass
class _Kind:
    """Steps of batches of one size: what they read, and `replay`, which makes one anew with what lies there by then."""

    x: Tensor
    y: Tensor
    compiled: Hashable = None
    replay: Callable[[], None] | None = None
    made: int = 0  # so far


class Recorder:
    """Makes the steps of a training, from the fourth of a kind on by recordings; a kind is a size of batches in a phase of the recipe.

    A recorded step is the same kernels in the same order, launched at once. On a CPU, which has no such graphs, the same steps are made
    one by one.

    Args:
        step: makes one step of a batch: forward, backward, and the optimiser's.
        device: where the batches lie; on a GPU, the current one, in a stream that is not the default one (`own_stream`).
        compiled: changes when what torch.compile made is forgotten: a step that compiles cannot be recorded.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], None], *, device: str, compiled: Callable[[], Hashable] = lambda: None) -> None:
        self._step, self._cuda, self._compiled = step, device.startswith("cuda"), compiled
        self._kinds: dict[Hashable, _Kind] = {}
        self._phase: Hashable = None
        self._pool: Any = None  # of memory, for all recordings of a phase: one of them runs at a time

    def make(self, x: Tensor, y: Tensor, *, phase: Hashable | None) -> bool:
        """Make one step; True where only the device knows of it, as it replays a recording.

        Args:
            x, y: images and labels.
            phase: recordings are good for as long as it stays the same; None for a step that cannot be one.

        Raises:
            NotRecordedError: where something in the step does not let itself be recorded.
        """
        if phase is None:
            self._by_itself(x, y)
            return False
        if phase != self._phase:
            self.forget()
            self._phase = phase
        kind = self._kinds.get(x.shape)
        if kind is None:
            kind = self._kinds[x.shape] = _Kind(torch.empty_like(x), torch.empty_like(y))
        kind.x.copy_(x)
        kind.y.copy_(y)
        kind.made += 1
        before, kind.compiled = kind.compiled, self._compiled()
        if kind.made <= WARM or (kind.replay is None and kind.compiled != before):
            self._by_itself(kind.x, kind.y)
            return False
        if kind.replay is not None:
            kind.replay()
            return self._cuda
        kind.replay = self._record(kind.x, kind.y)
        kind.replay()
        return False

    def forget(self) -> None:
        """Let go of what was recorded, and of its memory."""
        if self._cuda and any(kind.replay is not None for kind in self._kinds.values()):
            torch.cuda.current_stream().synchronize()
        self._kinds, self._pool = {}, None

    def _by_itself(self, x: Tensor, y: Tensor) -> None:
        with timing_algorithms():
            self._step(x, y)

    def _record(self, x: Tensor, y: Tensor) -> Callable[[], None]:
        if not self._cuda:
            return lambda: self._step(x, y)
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what is collected may call the device, which ends a recording
        try:
            torch.cuda.current_stream().synchronize()
            free, whole = torch.cuda.mem_get_info()
            if free < whole / 4:  # what is kept cannot be let go of while it records; to do so waits for all streams
                torch.cuda.empty_cache()
            # Other threads may call the device meanwhile: one that pins memory for a DataLoader, or that ends.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._by_itself(x, y)
            except BaseException:
                with suppress(RuntimeError):  # it fails as well, and would hide why
                    graph.capture_end()
                raise
            graph.capture_end()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise NotRecordedError(
                f"a step could not be recorded as a CUDA graph ({reason})",
                allowed="networks and losses that do not wait for the device, nor look at numbers on it",
                fix="leave compile at 'off'; or, where this came up in a notebook, `del` the losses and outputs of earlier steps",
            ) from error
        finally:
            if collects:
                gc.enable()
        self._pool = graph.pool()
        return graph.replay


@contextmanager
def timing_algorithms() -> Iterator[None]:
    """cuDNN chooses its algorithms by timing them in the block, unless they have to be deterministic."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def rates_on_device(optimizer: Optimizer) -> None:
    """Learning rates as tensors where the weights are, so that recorded steps see them change; nothing on a CPU."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if device.type == "cuda" and not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            if "capturable" in group:  # AdamW counts its steps on the device then
                group["capturable"] = True


_streams = threading.local()  # PyTorch keeps memory for each stream: one for each thread and device is enough


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """The block with the GPU `device` as the current one, in a stream that is not its default one, in which nothing can be recorded.

    Algorithms are timed in all of it: a thread's first call of a shape, as a mask method makes it, decides for all later ones.
    """
    with torch.cuda.device(device), timing_algorithms():
        before = torch.cuda.current_stream()
        if before != torch.cuda.default_stream():
            yield
            return
        known: dict[int, torch.cuda.Stream] = vars(_streams).setdefault("of", {})
        here = torch.cuda.current_device()
        stream = known[here] = known.get(here) or torch.cuda.Stream()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            before.wait_stream(stream)
