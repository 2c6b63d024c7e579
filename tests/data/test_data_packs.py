"""The real images, in the publishers' layouts; skipped where the packs are not on this machine."""

import pytest
import torch

from anymask.data import load, statistics
from anymask.errors import UnknownName


def test_cifar100_has_its_published_size_and_well_known_statistics(unpacked):
    data = load("cifar100", dir=unpacked("cifar100"))
    assert data.train.labels.bincount().tolist() == [500] * 100
    assert data.test.labels.bincount().tolist() == [100] * 100
    mean, std = statistics(data.train)
    assert mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=1e-4)
    assert std == pytest.approx((0.2673, 0.2564, 0.2762), abs=1e-4)


def test_a_part_of_cifar10_is_read(unpacked):
    data = load("cifar10", dir=unpacked("cifar10-10k") / "cifar-10-10k")
    assert data.train.images.shape == (10_000, 3, 32, 32)
    assert data.test.labels.bincount().tolist() == [200] * 10
    assert "airplane" in data.classes
    blue = data.train.images.float().mean(dim=(2, 3))[:, 2]
    assert blue[data.train.labels == data.classes.index("airplane")].mean() > blue.mean() + 10  # sky


def test_tiny_imagenet_is_read(unpacked):
    root = unpacked("tiny-10k") / "tiny-imagenet-200"
    kept = (root / "wnids.txt").read_text().split()[:20]  # decoding all 12,000 takes 8 s
    (root / "wnids.txt").write_text("\n".join(kept))
    notes = (root / "val" / "val_annotations.txt").read_text().splitlines()
    (root / "val" / "val_annotations.txt").write_text("\n".join(line for line in notes if line.split("\t")[1] in kept))
    data = load("tiny-imagenet", dir=root)
    assert data.train.images.shape == (1000, 3, 64, 64)
    assert data.train.labels.tolist() == sorted(torch.arange(20).tolist() * 50)
    assert data.test.labels.bincount().tolist() == [10] * 20
    assert all(0.3 < mean < 0.6 for mean in statistics(data.train)[0])


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'cifar100' or 'cifar10'"):
        load("cifar-100")
