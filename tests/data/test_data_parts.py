"""The parts of CIFAR-100 that are tuned and reported on."""

import importlib
import sys
from typing import Any

import pytest
import torch

from anymask.data.splits import Dataset, Split
from tests.data.conftest import REPOSITORY


@pytest.fixture(scope="module")
def tool() -> Any:
    sys.path.append(str(REPOSITORY / "tools"))
    return importlib.import_module("make_cifar100_parts")


def numbered(order: torch.Tensor) -> Split:
    """Images that hold their own number, of two classes."""
    return Split(torch.stack([order // 256, order % 256, order * 0], 1).to(torch.uint8)[:, :, None, None], order % 2)


def numbers(split: Split) -> list[int]:
    images = split.images[:, :, 0, 0].long()
    return (images[:, 0] * 256 + images[:, 1]).tolist()


def test_no_image_is_tuned_and_reported_on_and_all_classes_have_equally_many(tool: Any) -> None:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    parts = tool.parts(Dataset("cifar100", ("a", "b"), numbered(order), numbered(torch.arange(1000, 1100))))
    seen = {(name, file): numbers(split) for name, splits in parts.items() for file, split in splits.items()}
    assert len({image for images in seen.values() for image in images}) == sum(map(len, seen.values()))
    assert {key: len(images) for key, images in seen.items()} == {
        ("tuning", "train"): 250,
        ("tuning", "test"): 100,
        ("report", "train"): 250,
        ("report", "test"): 100,
    }
    assert min(seen["report", "test"]) >= 1000  # the published ones
    for splits in parts.values():
        assert all(split.labels.bincount().unique().numel() == 1 for split in splits.values())
