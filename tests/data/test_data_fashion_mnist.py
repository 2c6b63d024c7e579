import gzip
import importlib.util
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from anymask.data import DATASETS, load
from anymask.data.idx import EMBEDDED, read_embedded
from anymask.errors import DataError, FileFormatError
from tests.data.conftest import REPOSITORY, idx, write_fashion

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_fashion_mnist_5k", REPOSITORY / "tools" / "make_fashion_mnist_5k.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_embedded_part_is_balanced_small_and_licensed():
    data = load("fashion-mnist-5k")
    assert data.train.images.shape == (5000, 1, 28, 28)
    assert data.test.images.shape == (1000, 1, 28, 28)
    assert data.train.labels.bincount().tolist() == [500] * 10
    assert data.test.labels.bincount().tolist() == [100] * 10
    assert len(data.classes) == 10
    assert EMBEDDED.stat().st_size < 2_300_000
    assert "Zalando" in (EMBEDDED.parent / "LICENSE.fashion-mnist").read_text()


def test_the_embedded_classes_are_told_apart_by_their_mean_images():
    data = load("fashion-mnist-5k")
    pixels = data.train.images.flatten(1).float()
    means = torch.stack([pixels[data.train.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(data.test.images.flatten(1).float(), means).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.6  # 0.68; labels of other images would give 0.1


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_embedded_file_is_rebuilt_byte_for_byte_from_the_debian_package(tool):
    assert tool.build(DEBIAN, part="shipped") == EMBEDDED.read_bytes()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_debian_package_is_found_without_a_folder_and_holds_the_embedded_images():
    whole, part = load("fashion-mnist"), load("fashion-mnist-5k")
    assert len(whole.train) == 60_000
    assert whole.test.labels.bincount().tolist() == [1000] * 10
    known = {image.tobytes() for image in whole.train.images.numpy()}
    assert all(image.tobytes() in known for image in part.train.images.numpy())


def test_the_parts_are_disjoint_balanced_and_in_published_order(tool, tmp_path):
    count = 11_000  # images hold their own number
    number = np.arange(count)
    images = np.stack([number // 256, number % 256], axis=1).reshape(count, 1, 2)
    write_fashion(tmp_path / "all", train=images, test=images[:10_000])
    seen = {}
    for part in tool.PARTS:
        (tmp_path / part).write_bytes(tool.build(tmp_path / "all", part=part))
        data = load("fashion-mnist-5k", dir=_as_xz(tmp_path / part))
        numbers = [256 * high + low for high, low in data.train.images.reshape(-1, 2).tolist()]
        assert numbers == sorted(numbers)
        assert [n % 10 for n in numbers] == data.train.labels.tolist()
        assert data.train.labels.bincount().tolist() == [500] * 10
        assert data.test.labels.bincount().tolist() == [{"shipped": 100, "tuning": 900}[part]] * 10
        seen[part] = set(numbers)
    assert seen["shipped"] == set(range(5000))
    assert seen["tuning"] == set(range(5000, 10_000))


def _as_xz(path: Path) -> Path:
    return path.rename(path.with_suffix(".idx.xz"))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("given", ["", "fashion-mnist"])
def test_published_files_are_read_zipped_or_not_from_the_folder_or_its_parent(tmp_path, zipped, given):
    train, test = np.arange(2 * 3 * 4).reshape(2, 3, 4), np.arange(3 * 4).reshape(1, 3, 4)
    write_fashion(tmp_path / "fashion-mnist", train=train, test=test, zipped=zipped)
    data = load("fashion-mnist", dir=tmp_path / given)
    assert data.train.images.tolist() == train[:, None].tolist()
    assert data.test.images.tolist() == test[:, None].tolist()
    assert data.train.labels.tolist() == [0, 1]
    assert data.train.labels.dtype == torch.int64


def test_missing_files_are_named(tmp_path):
    write_fashion(tmp_path, train=np.zeros((2, 3, 4)), test=np.zeros((1, 3, 4)))
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"no fashion-mnist in .*Allowed: .*t10k-labels-idx1-ubyte.* To do: .*--download"):
        load("fashion-mnist", dir=tmp_path)
    with pytest.raises(DataError, match="no fashion-mnist-5k in"):
        load("fashion-mnist-5k", dir=tmp_path / "nothing")


IMAGE = idx(np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    "blob",
    [b"", IMAGE[:3], IMAGE[:9], IMAGE[:-1], b"\x89PNG" + IMAGE, idx(np.zeros((0, 3, 4))), idx(np.zeros(2)), b"\0\0\x08\3" + b"\xff" * 12],
)
def test_a_damaged_idx_file_is_refused(tmp_path, blob):
    write_fashion(tmp_path, train=np.zeros((2, 3, 4)), test=np.zeros((1, 3, 4)))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(blob)
    with pytest.raises(FileFormatError, match="To do: fetch or make the file"):
        load("fashion-mnist", dir=tmp_path)


def test_a_damaged_gz_or_xz_file_is_refused(tmp_path):
    write_fashion(tmp_path, train=np.zeros((2, 3, 4)), test=np.zeros((1, 3, 4)), zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for blob in (gzip.compress(IMAGE)[:-9], b"no gzip at all", gzip.compress(IMAGE)[:12] + b"\xff" * 30):
        path.write_bytes(blob)
        with pytest.raises(FileFormatError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
            load("fashion-mnist", dir=tmp_path)
    part = tmp_path / "part.idx.xz"
    for blob in (EMBEDDED.read_bytes()[:100_000], b"no xz at all", lzma.compress(IMAGE)):
        part.write_bytes(blob)
        with pytest.raises(FileFormatError, match=r"part\.idx\.xz cannot be read"):
            read_embedded(part)


def test_a_folder_in_place_of_the_embedded_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"came with the folder .*--data cifar100"):
        load("fashion-mnist-5k", dir=tmp_path)


def test_every_data_set_has_a_line_about_it():
    assert all(source.about for source in DATASETS.values())
