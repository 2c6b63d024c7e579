"""Tiny plans: two classes of a few small images, networks and protocols that take a moment."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anymask.train import Computing

DENSELY = Computing(sparse="off")  # bit for bit the same in each process, whatever it measures

PLAN = """
retries = 1
[protocol]
epochs = 2
batch_size = 16
lr = 0.05
[[block]]
data = "folder"
data_dir = "{images}"
validation = 0.2
model = "resnet8-0.25x"
masks = ["random-erk", "snip"]
sparsity = [0.9]
recipes = ["default", "tost:ghost_activation,label_smoothing"]
seeds = 2
"""
CELLS = 2 * (1 + 2 * 2)
FAILING = """
[[block]]
data = "folder"
data_dir = "{images}"
validation = 0.2
model = "resnet8-0.25x"
masks = "random"
recipes = "default"
seeds = 1
dense = false
[block.protocol]
lr = 1e30
"""


def write_images(folder: Path, *, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for part, number in (("train", 20), ("test", 6)):
        for label in range(2):
            (folder / part / f"class{label}").mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(60 * label, 120 + 60 * label, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / f"class{label}" / f"{index}.png")
    return folder


def write_plan(path: Path, images: Path, text: str = PLAN) -> Path:
    path.write_text(text.replace("{images}", str(images)))
    return path


def failing(error: Exception, tried: list[str]) -> Any:
    """What stands for `Runner.train` where each training fails with `error`."""

    def train(self: Any, cell: Any, name: str, *_: Any, **__: Any) -> None:
        tried.append(name)
        raise error

    return train
