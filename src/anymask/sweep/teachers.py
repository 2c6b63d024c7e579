"""The networks that recipes with distillation learn from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from anymask.config import Bench
from anymask.ranks import by_rank_0, leads
from anymask.runlog import atomic, settings_id
from anymask.sweep.claims import clear_halves, make_once
from anymask.sweep.pace import Pace
from anymask.train import Computing


class Teachers:
    """Trains the dense network of a seed, once for all masks and recipes, and keeps its weights in `folder`.

    It has the initialisation, the images and the protocol of that seed's trainings, the default recipe, and the weights of the epoch that
    is best on validation images.
    """

    def __init__(self, bench: Bench, folder: Path, computing: Computing, pace: Pace) -> None:
        self.bench, self.folder, self.computing, self.pace = bench, folder, replace(computing, sparse="auto", diagnose="off"), pace

    def of(self, seed: int) -> nn.Module:
        """The teacher of `seed`, trained if it was not yet; a training that is stopped goes on. A checkpoint to begin with is a teacher."""
        if self.bench.checkpoint(seed) is not None:
            return self.bench.model(seed)
        file = self.file(seed)
        if not by_rank_0(file.exists):
            make_once(file, lambda: self._train(seed, file), wait=self.pace.wait)
        model = self.bench.model(seed)
        model.load_state_dict(by_rank_0(lambda: load_file(file)))
        return model

    def file(self, seed: int) -> Path:
        """Where the weights of the teacher of `seed` are kept."""
        return self.folder / f"dense-seed{seed}-{settings_id({**self.bench.settings(seed), 'seed': seed})}.safetensors"

    def _train(self, seed: int, file: Path) -> None:
        model, unfinished = self.bench.model(seed), file.with_suffix(".pt")
        by_rank_0(lambda: clear_halves(file))
        train, validation, _ = self.bench.batches(seed)
        how: dict[str, Any] = {"file": unfinished, "validation": validation, "seed": seed}
        self.pace.fit(model, train, protocol=self.bench.protocol, computing=self.computing, **how)
        if leads():
            write_weights(model, file)
            unfinished.unlink(missing_ok=True)


def write_weights(model: nn.Module, path: Path) -> None:
    """The state dict, row by row in memory (trained as channels_last), so that its bytes depend on the values alone."""
    state = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in model.state_dict().items()}
    with atomic(path) as file:
        file.write(to_bytes(state, metadata={"format": "pt"}))
