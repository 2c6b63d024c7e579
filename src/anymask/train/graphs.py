"""Steps of a training that are recorded as CUDA graphs: what a GPU was told once it does again without being told."""

import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from anymask.errors import SettingError

WARM = 3  # steps of a kind before one is recorded: cuDNN looks for its algorithms in them, and what is made once is made


@dataclass(frozen=True)
class _Recorded:
    """A step: `replay` makes it anew with what lies in `x` and `y` by then."""

    x: Tensor
    y: Tensor
    replay: Callable[[], None]


class Recorder:
    """Makes the steps of a training, from the fourth of a kind on by recordings; a kind is a size of batches in a phase of the recipe.

    A recorded step is the same kernels in the same order, launched at once: its numbers are those of a step that was not recorded. On
    a CPU, which has no such graphs, the same steps are made one by one.

    Args:
        step: makes one step of a batch: forward, backward, and the optimiser's.
        device: where the batches lie.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], None], *, device: str) -> None:
        self._step, self._cuda = step, device.startswith("cuda")
        self._recorded: dict[Hashable, _Recorded] = {}
        self._made: Counter[Hashable] = Counter()
        self._phase: Hashable = None
        self._pool: tuple[int, int] | None = None  # of memory, for all recordings of a phase: one of them runs at a time

    def make(self, x: Tensor, y: Tensor, *, phase: Hashable | None) -> bool:
        """Make one step; True where only the device knows of it, as it replays a recording.

        Args:
            x, y: images and labels.
            phase: recordings are good for as long as it stays the same; None for a step that cannot be one.

        Raises:
            SettingError: where something in the step does not let itself be recorded.
        """
        if phase is None:
            self._by_itself(x, y)
            return False
        if phase != self._phase:
            self.forget()
            self._phase = phase
        kind = x.shape
        self._made[kind] += 1
        if self._made[kind] <= WARM:
            self._by_itself(x, y)
            return False
        known = self._recorded.get(kind)
        if known is None:
            self._recorded[kind] = self._record(x, y)
            self._recorded[kind].replay()
            return False
        known.x.copy_(x)
        known.y.copy_(y)
        known.replay()
        return self._cuda

    def forget(self) -> None:
        """Let go of what was recorded, and of its memory."""
        if self._recorded and self._cuda:
            torch.cuda.current_stream().synchronize()
        self._recorded, self._made, self._pool = {}, Counter(), None

    def _by_itself(self, x: Tensor, y: Tensor) -> None:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        try:
            self._step(x, y)
        finally:
            torch.backends.cudnn.benchmark = before

    def _record(self, x: Tensor, y: Tensor) -> _Recorded:
        x, y = x.clone(memory_format=torch.preserve_format), y.clone()
        if not self._cuda:
            return _Recorded(x, y, lambda: self._step(x, y))
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what is collected may call the device, which ends a recording
        try:
            torch.cuda.current_stream().synchronize()
            graph.capture_begin(*(() if self._pool is None else (self._pool,)))
            try:
                self._by_itself(x, y)
            finally:
                graph.capture_end()
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise SettingError(
                f"a step could not be recorded as a CUDA graph ({reason})",
                allowed="networks and losses that do not wait for the device, nor look at numbers on it",
                fix="leave compile at 'off'",
            ) from error
        finally:
            if collects:
                gc.enable()
        self._pool = graph.pool()
        return _Recorded(x, y, graph.replay)


def rates_on_device(optimizer: Optimizer) -> None:
    """Learning rates as tensors where the weights are, so that recorded steps see them change; nothing on a CPU."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if device.type == "cuda" and not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            if "capturable" in group:  # AdamW counts its steps on the device then
                group["capturable"] = True


@contextmanager
def own_stream() -> Iterator[None]:
    """The block in a stream of its own where it would be in the default one of a GPU, in which nothing can be recorded."""
    if torch.cuda.current_stream() != torch.cuda.default_stream():
        yield
        return
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)
