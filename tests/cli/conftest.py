"""A folder of 60 + 20 tiny images in two classes, easy to tell apart, and the command line in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from anymask.cli import main


@dataclass(frozen=True)
class Said:
    """What one command gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def anymask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run one command here, with wide lines: `anymask("list masks")`."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of a training that takes a moment."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", 30), ("test", 10)):
        for label in range(2):
            _write(root / part / f"class{label}", label, number, generator)
    return ["--data", "folder", "--data-dir", str(root), "--model", "resnet8-0.25x", "--batch-size", "27", "--lr", "0.02"]


def _write(folder: Path, label: int, number: int, generator: torch.Generator) -> None:
    folder.mkdir(parents=True)
    for index in range(number):
        image = torch.randint(0, 128, (12, 12), generator=generator, dtype=torch.uint8)
        image[6 * label : 6 * label + 6] += 100
        Image.fromarray(image.numpy()).save(folder / f"{index}.png")
