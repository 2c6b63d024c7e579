"""Small trainings that the tests of the trainer share; also what the killed process runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from anymask import Mask, Recipe, fit, prune
from anymask.data import Augment, Batches, Split
from anymask.pruning.dynamic import DYNAMIC, Dynamic
from anymask.schedules import Schedule
from anymask.techniques import GhostActivation, GhostSkip, LabelSmoothing, LRsI, RescaleSettings
from anymask.train import Protocol, Result

RECIPE = Recipe(
    (
        LRsI(settings=RescaleSettings(iterations=2)),
        GhostActivation(Schedule("cosine", end="70%")),
        GhostSkip(Schedule("linear", end="40%"), kind="learned"),
        LabelSmoothing(Schedule("linear", end="80%")),
    ),
    name="all-seams",
)
EVERY = {"every": "2it", "end": "75%"}  # the mask moves in each of the first four epochs
MOVING: dict[str, Dynamic | None] = {"static": None, **{name: replace(row, **EVERY) for name, row in DYNAMIC.items()}}
PROTOCOL = Protocol(epochs=5, batch_size=16, accumulate=2, clip=1.0, warmup="1ep", lr=0.05)


class Net(nn.Module):
    """With batch norm (buffers) and dropout (random state)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
                *(nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
            )
            self.drop, self.fc = nn.Dropout(0.2), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(x).mean((2, 3))))


def images(count: int, *, seed: int) -> Split:
    """Four classes, told apart by their texture: plain, rows, columns, chessboard."""
    generator = torch.Generator().manual_seed(seed)
    labels, row, column = torch.arange(count) % 4, torch.arange(8)[:, None], torch.arange(8)[None]
    textures = torch.stack([row * 0 + column * 0, row + column * 0, row * 0 + column, row + column]) % 2
    pixels = torch.randint(0, 100, (count, 1, 8, 8), generator=generator) + 120 * textures[labels][:, None]
    return Split(pixels.to(torch.uint8), labels)


def batches() -> tuple[Batches, Batches, Batches]:
    train = Batches(images(104, seed=1), batch_size=16, shuffle=True, augment=Augment(pad=1), seed=3)
    return train, Batches(images(40, seed=2), batch_size=20), Batches(images(40, seed=4), batch_size=20)


def mask_of(model: nn.Module) -> Mask:
    return prune(model, "random-erk", sparsity=0.6, seed=0)


def train_once(
    model: nn.Module,
    *,
    recipe: Recipe | str = RECIPE,
    mask: Mask | None = None,
    seed: int = 0,
    file: Path | None = None,
    every: int | None = None,
    moving: str = "static",
    sparse: str = "auto",
    protocol: Protocol = PROTOCOL,
    compile: str = "off",
    diagnose: str = "off",
    deterministic: bool = False,
    teacher: nn.Module | None = None,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> Result:
    train, validation, test = batches()
    return fit(
        model,
        train,
        mask=None if moving == "gmp" else mask or mask_of(Net()),
        rewire=MOVING[moving],
        sparsity=0.6 if moving == "gmp" else None,
        recipe=recipe,
        teacher=teacher,
        protocol=protocol,
        validation=validation,
        test=test,
        sparse=sparse,
        compile=compile,
        diagnose=diagnose,
        deterministic=deterministic,
        seed=seed,
        checkpoint_file=file,
        checkpoint_every=every,
        on_step=on_step,
        on_epoch=on_epoch,
    )


def train_and_save(folder: Path, moving: str) -> None:
    """Train with a checkpoint every other step, and leave the weights, the mask and curves in `folder`/done.pt."""
    torch.set_num_threads(1)
    (folder / "started").touch()
    model = Net()
    result = train_once(model, file=folder / "checkpoint.pt", every=2, moving=moving)
    assert result.mask is not None
    done = {"model": model.state_dict(), "mask": dict(result.mask.items()), "curves": result.curves, "accuracy": result.accuracies()}
    torch.save(done, folder / "part.pt")
    (folder / "part.pt").rename(folder / "done.pt")
