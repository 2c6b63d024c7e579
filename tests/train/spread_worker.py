"""What each rank of tests/train/test_fit_spread.py does: `torchrun spread_worker.py PART FOLDER`; it leaves PART-RANK.pt in FOLDER."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from anymask import Mask, Recipe, data, fit, models, prune
from anymask.cli.ranks import leave
from anymask.data import Augment, Batches, Split
from anymask.errors import SettingError, TechniqueError
from anymask.kernels import available
from anymask.prunables import bare
from anymask.schedules import Schedule
from anymask.sparse import converting, tuning
from anymask.sweep.run import Clock, Worker
from anymask.techniques import Distillation, GhostActivation, GhostSkip, LabelSmoothing, LRsI, Preconditioning, RescaleSettings
from anymask.train import Computing, Protocol, Result
from anymask.train.run import Run
from anymask.train.spread import Spread
from tests.train.trainings import MOVING, RECIPE, Net, images, mask_of

FREE = Recipe(
    (
        LRsI(settings=RescaleSettings(iterations=2)),
        GhostActivation(Schedule("cosine", end="70%")),
        GhostSkip(Schedule("linear", end="40%"), kind="free"),
        LabelSmoothing(Schedule("linear", end="80%")),
    ),
    name="free",
)
PROTOCOL = Protocol(epochs=4, batch_size=16, accumulate=2, clip=1.0, warmup="1ep", lr=0.05)  # of 101 images: 4 steps an epoch
UNEVEN, FEW = 101, 99  # the last batch: 5 images, 2 + 3 on two ranks; 3 images, which each rank computes whole
MIDDLE, LATER = 5, 11  # steps of 16, each within an epoch


class Stopped(Exception):
    """A training that was stopped."""


def still() -> nn.Module:
    """Norms without batches and no dropout: nothing that two ranks compute otherwise than one process."""
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(2, o), nn.ReLU()) for i, o in ((1, 8), (8, 12)))
    return nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))


def train(model: nn.Module, *, count: int = UNEVEN, moving: str = "static", recipe: Recipe = FREE, **how: Any) -> dict[str, Any]:
    """Train on `count` images, and tell all that came of it."""
    batches = Batches(images(count, seed=1), batch_size=16, shuffle=True, augment=Augment(pad=1), seed=3)
    held_out = Batches(images(41, seed=2), batch_size=20)  # a last batch of one image: none for rank 0
    mask = mask_of(bare(model))
    how = {"protocol": PROTOCOL, "sparse": "off", "rewire": MOVING[moving]} | how
    return told(model, fit(model, batches, mask=mask, recipe=recipe, validation=held_out, test=held_out, **how))


def told(model: nn.Module, result: Result) -> dict[str, Any]:
    assert result.mask is not None
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = {"accuracies": result.accuracies(), "curves": result.curves, "sparse_layers": result.sparse_layers}
    return {"state": state, "mask": mask_hash(result.mask), **seen}


def mask_hash(mask: Mask) -> str:
    return hashlib.sha256(b"".join(name.encode() + mask[name].numpy().tobytes() for name in mask)).hexdigest()


@contextmanager
def stopping(step: int) -> Iterator[None]:
    """The training in the block ends with its checkpoint of that step, on every rank."""
    kept = Run.save

    def save(run: Run) -> None:
        kept(run)
        if run.step == step:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(Run, "save", save)
        yield
        pytest.fail("it was not stopped")


def demo() -> dict[str, Any]:
    """A network with batch norm on real images, as the command line trains it."""
    found = data.load("fashion-mnist-5k")
    mean, std = data.statistics(found.train)
    how: dict[str, Any] = {"mean": mean, "std": std}
    batches = Batches(Split(found.train.images[:1280], found.train.labels[:1280]), batch_size=64, shuffle=True, seed=0, **how)
    test = Batches(found.test, batch_size=500, **how)
    model = models.build("demonet", classes=10, channels=1, seed=0)
    mask = prune(model, "snip", sparsity=0.9, data=batches, seed=0)
    return told(model, fit(model, batches, mask=mask, recipe="tost", protocol=Protocol(epochs=3, batch_size=64), test=test))


def drawing(file: Path, *, stop: int | None = None) -> dict[str, Any]:
    """A network with batch norm and dropout, stopped and begun again or not; each rank begins elsewhere, and all as rank 0."""
    how: dict[str, Any] = {"checkpoint_file": file, "checkpoint_every": 1}
    if stop is not None:
        with stopping(stop):
            train(Net(), **how)
    return train(Net(seed=dist.get_rank()), **how)


def taught() -> dict[str, Any]:
    """By a teacher that is asked about each image once, each rank about those of its part."""
    teacher = still()
    for parameter in teacher.parameters():
        parameter.detach().mul_(2)
    return train(still(), recipe=Recipe((Distillation(asks="once"),)), teacher=teacher)


def measured_by_rank_0() -> dict[str, Any]:
    """Rank 1 would find every layer slower sparse, and is not asked."""
    asked = []

    def times(*_: Any) -> tuning.Times:
        asked.append(1)
        return tuning.Times(3.0, 3.0, 1.0) if dist.get_rank() == 0 else tuning.Times(1.0, 1.0, 3.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converting, "times", times)
        return {**train(still(), sparse="auto"), "asked": len(asked)}


def refusals() -> None:
    """What cannot be trained on several ranks says so."""
    with pytest.raises(SettingError, match="within DistributedDataParallel"):
        train(nn.parallel.DistributedDataParallel(Net()))
    with pytest.raises(SettingError, match="on 2 ranks"):
        Worker([], Path("nowhere"), retries=0, computing=Computing(), clock=Clock())
    with pytest.raises(TechniqueError, match='use kind="free"'):
        train(Net(), recipe=RECIPE)


def statistics() -> None:
    """Each rank has its own while it trains, of its part of the batch; the mean is kept."""
    net, x = nn.Sequential(nn.BatchNorm1d(1, momentum=1.0), nn.Linear(1, 1)), torch.arange(8.0)[:, None]
    spread, loss = Spread(net), torch.tensor(float(dist.get_rank()))
    spread.begin()
    for _ in range(2):
        spread.network(spread.part(x, x)[0]).sum().backward()
    assert net[0].running_mean.item() == (1.5, 5.5)[dist.get_rank()]
    spread.agree(loss)
    assert (net[0].running_mean.item(), int(net[0].num_batches_tracked), float(loss)) == (3.5, 2, 0.5)


def first(folder: Path) -> dict[str, Any]:
    """Trainings of their own, and those that one process goes on with, or began."""
    refusals()
    statistics()
    with stopping(MIDDLE):
        train(still(), checkpoint_file=folder / "two-one-two.pt", checkpoint_every=1)
    with stopping(LATER):
        train(still(), checkpoint_file=folder / "one-two-one.pt", checkpoint_every=1)
    found = {f"still {moving}": train(still(), moving=moving) for moving in ("static", "rigl")}
    found["few"] = train(still(), count=FEW)
    found["adamw"] = train(still(), protocol=Protocol(epochs=2, batch_size=16, optimizer="adamw", lr=2e-3))
    found["taught"] = taught()
    found["preconditioned"] = train(still(), recipe=Recipe((Preconditioning(every=3),)))  # by what rank 0 saw of its part
    found["undisturbed"] = drawing(folder / "undisturbed.pt")
    found["stopped"] = drawing(folder / "stopped.pt", stop=MIDDLE)
    if available():
        found["sparse"] = train(still(), sparse="on")
        found["auto"] = measured_by_rank_0()
    return {**found, "demo": demo()}


def second(folder: Path) -> dict[str, Any]:
    """What one process went on with."""
    return {"two-one-two": train(still(), checkpoint_file=folder / "two-one-two.pt", checkpoint_every=1)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    part, place = sys.argv[1], Path(sys.argv[2])
    torch.save({"first": first, "second": second}[part](place), place / f"{part}-{dist.get_rank()}.pt")
    dist.barrier()
    leave()
