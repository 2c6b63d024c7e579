"""One training spread over the ranks of torch.distributed; in a process that trains alone nothing here does anything."""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from anymask.errors import SettingError
from anymask.prunables import how_spread
from anymask.ranks import mean_over_ranks, together
from anymask.train.settings import accuracy, count_right, share_right

Pair = tuple[Tensor, Tensor]  # images (N, ...) and labels (N,)


class Spread:
    """How `model` trains on several ranks: each computes its part of every batch, and all make the same steps.

    The batches are those of one process, so that the sums of the gradients are its gradients, too. Norms see the images of their own
    rank, as DistributedDataParallel has it anywhere; their running statistics are averaged over the ranks.

    Args:
        model: gets the weights and buffers of rank 0.

    Raises:
        SettingError: where there are several ranks and the model is spread over them already.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = self.network = model  # `network` is what the training calls
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if together() else (0, 1)
        if self.ranks > 1:
            _check_whole(model)
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def begin(self) -> None:
        """Average the gradients of all ranks from now on; for a model that is as it will be trained, with its ghosts and sparse layers."""
        if self.ranks > 1:
            self.network = DistributedDataParallel(self.model)
            self.network.broadcast_buffers = (
                False  # before each step: `agree` does better (as an argument it has two names since torch 2.13)
            )

    def end(self) -> None:
        """Undo `begin`."""
        self.network = self.model

    def part(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
        """What this rank computes of a batch, and the weight of its loss beside those of the others, which is 1 on average.

        All of it on each rank where there are not two images for each of them: norms cannot do with one, nor anybody with none.
        """
        count = len(y)
        if self.ranks == 1 or count < 2 * self.ranks:
            return x, y, 1.0
        mine = self._mine(count)
        return x[mine], y[mine], (mine.stop - mine.start) * self.ranks / count

    def adding(self, *, last: bool) -> AbstractContextManager[None]:
        """What a batch is computed in; gradients are sent in the last one before a step."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

    def draw(self, seed: int, step: int) -> None:
        """Let ranks other than 0 draw for themselves (dropout) what comes after `step`, the same after a resume."""
        if self.rank:
            torch.manual_seed(zlib.crc32(f"{seed} {step} {self.rank}".encode()))

    @torch.no_grad()
    def agree(self, loss: Tensor) -> None:
        """Average `loss` and the running statistics of norms over the ranks, in place; other buffers become those of rank 0."""
        if self.ranks == 1:
            return
        mean_over_ranks(loss)
        norms = [module for module in self.model.modules() if isinstance(module, _NormBase)]
        running = {id(tensor) for norm in norms for tensor in (norm.running_mean, norm.running_var)}
        for buffer in self.model.buffers():
            if id(buffer) in running:
                mean_over_ranks(buffer)
            else:
                dist.broadcast(buffer, 0)

    def accuracy(self, model: nn.Module, batches: Iterable[Pair]) -> float:
        """As `train.accuracy`, each rank looking at its part of every batch; all of them know the whole."""
        if self.ranks == 1:
            return accuracy(model, batches)
        device = next(self.model.parameters()).device
        counts = torch.tensor(count_right(model, self._parts(batches)), device=device)
        dist.all_reduce(counts)
        return share_right(*counts.tolist())

    def _parts(self, batches: Iterable[Pair]) -> Iterator[Pair]:
        for x, y in batches:
            mine = self._mine(len(y))
            if mine.start < mine.stop:
                yield x[mine], y[mine]

    def _mine(self, count: int) -> slice:
        return slice(count * self.rank // self.ranks, count * (self.rank + 1) // self.ranks)


def _check_whole(model: nn.Module) -> None:
    if how := how_spread(model):
        raise SettingError(
            f"fit came with a model {how}",
            allowed="the model inside, on each rank",
            fix="leave the wrapping to fit, which knows of its ghosts",
        )
