"""How trainings of one process share it and its time: when they stop between two epochs, and whom they wait for."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from anymask.data import Batches
from anymask.ranks import by_rank_0
from anymask.sweep.claims import clear_halves
from anymask.train import Computing, Protocol, fit


@dataclass
class Pace:
    """What trainings keep to, and so do those that make what they need: masks and teachers.

    Args:
        wait: for another process that makes what is needed; else Busy is raised.
        between: called before each round of a lottery ticket, and after epochs with needs=, the seconds of one; it may raise to stop there.
        on_step: called after each step.
        streams: how many trainings are beside each other in this process.
    """

    wait: bool = True
    between: Callable[..., None] = lambda **_: None
    on_step: Callable[[], None] | None = None
    streams: int = 1

    def after(self, *, epochs: int, since: float | None = None) -> Callable[[int, Any], None]:
        """What to call after each epoch, by its number from 1: `between(needs=)` with the seconds of an epoch, but after the last one.

        Args:
            since: when the first one began, by time.monotonic(); None where much else came before it, which is not to count.

        Example:
            >>> after = Pace(between=lambda needs: print("another one?")).after(epochs=2)
            >>> after(1, {})
            another one?
            >>> after(2, {})
        """
        last = since

        def after(epoch: int, _figures: Any) -> None:
            nonlocal last
            took = 0.0 if last is None else time.monotonic() - last
            last = time.monotonic()
            if epoch < epochs:
                self.between(needs=took)

        return after

    def fit(self, model: nn.Module, train: Batches, *, protocol: Protocol, computing: Computing, file: Path, **how: Any) -> None:
        """Train with the default recipe what other trainings need; one that was stopped goes on from `file`, which stays."""
        by_rank_0(lambda: clear_halves(file))
        how |= {"on_epoch": self.after(epochs=protocol.epochs, since=time.monotonic()), "on_step": self.on_step, **asdict(computing)}
        fit(model, train, recipe="default", protocol=protocol, checkpoint_file=file, **how)
