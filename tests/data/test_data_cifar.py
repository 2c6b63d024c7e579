import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anymask.data import cifar, load
from anymask.errors import DataError, FileFormatError
from tests.data.conftest import cifar_rows, python2, write_cifar10


def write_cifar100(folder: Path, dump) -> None:
    folder.mkdir()
    (folder / "train").write_bytes(dump({"fine_labels": [1, 0], "coarse_labels": [0, 0], "data": cifar_rows(2)}))
    (folder / "test").write_bytes(dump({"fine_labels": [1], "coarse_labels": [0], "data": cifar_rows(1, seed=1)}))
    (folder / "meta").write_bytes(dump({"fine_label_names": ["apple", "bee"], "coarse_label_names": ["thing"]}))


def dump_as_bytes(record) -> bytes:
    return pickle.dumps({key.encode(): value for key, value in record.items()}, protocol=2)


DUMPS = {
    "python 2, numpy 1": python2,
    "python 2, numpy 2": lambda record: python2(record, numpy="numpy._core"),
    "python 3, text keys": lambda record: pickle.dumps(record, protocol=2),
    "python 3, bytes keys": dump_as_bytes,
}


@pytest.mark.parametrize("given", ["", "cifar-100-python"])
@pytest.mark.parametrize("dump", DUMPS.values(), ids=DUMPS)
def test_cifar100_is_read_in_every_spelling(tmp_path, dump, given):
    write_cifar100(tmp_path / "cifar-100-python", dump)
    data = load("cifar100", dir=tmp_path / given)
    assert data.classes == ("apple", "bee")
    assert data.train.labels.tolist() == [1, 0]
    assert data.train.images.numpy().tobytes() == cifar_rows(2).tobytes()
    assert data.test.images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("batches", [1, 5])
def test_cifar10_is_the_batches_that_are_there_in_their_order(tmp_path, batches):
    write_cifar10(tmp_path, batches=batches)
    data = load("cifar10", dir=tmp_path)
    assert len(data.train) == 3 * batches
    for number in range(1, batches + 1):
        assert data.train.images[3 * number - 3 : 3 * number].numpy().tobytes() == cifar_rows(3, seed=number).tobytes()
    assert data.test.labels.tolist() == [2, 1]


@pytest.fixture
def five(tmp_path):
    """CIFAR-10 of two batches whose labels fit their three classes."""
    write_cifar10(tmp_path)
    return tmp_path


class Touch:
    """What a hostile pickle does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Call:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_is_refused_and_runs_nothing(five, protocol):
    marker = five / "touched"
    (five / "data_batch_2").write_bytes(pickle.dumps({"data": cifar_rows(1), "labels": [0], "x": Touch(marker)}, protocol=protocol))
    with pytest.raises(FileFormatError, match="which no CIFAR file needs"):
        load("cifar10", dir=five)
    assert not marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        Call(eval, "1"),
        Call(getattr, "a", "upper"),
        Call(np.frombuffer, b"a"),
        Call(np.load, "x"),
        Call(torch.load, "x"),
        Call(bytearray, 9),
    ],
)
def test_nothing_else_can_be_named_in_a_pickle(five, call):
    (five / "test_batch").write_bytes(pickle.dumps(call, protocol=4))
    with pytest.raises(FileFormatError, match="which no CIFAR file needs"):
        load("cifar10", dir=five)


@pytest.mark.parametrize("state", [b"}X\x06\0\0\0markedK\x01s", b"N}X\x06\0\0\0markedK\x01s\x86"], ids=["in __dict__", "in __slots__"])
@pytest.mark.parametrize("name", cifar._PERMITTED, ids=".".join)
def test_a_pickle_cannot_set_attributes_of_what_it_may_name(five, name, state):
    (five / "test_batch").write_bytes(b"\x80\x02c" + "\n".join(name).encode() + b"\n" + state + b"b.")
    with pytest.raises(FileFormatError, match="cannot be read as a CIFAR file"):
        load("cifar10", dir=five)
    assert not any(hasattr(value, "marked") for value in cifar._PERMITTED.values())


def test_the_numbers_in_old_dtypes_reach_numpy_as_booleans(monkeypatch):
    seen = []
    monkeypatch.setattr(cifar, "np", SimpleNamespace(dtype=lambda *arguments: seen.extend(arguments)))
    cifar._PERMITTED["numpy", "dtype"](b"u1", 0, 1)
    assert seen == ["u1", False, True]
    assert all(type(value) is bool for value in seen[1:])


GOOD = {"data": cifar_rows(2), "labels": [0, 1]}


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"not a pickle",
        pickle.dumps(GOOD, protocol=2)[:-500],
        pickle.dumps([1, 2]),
        python2({"data": cifar_rows(2)}),
        python2({**GOOD, "labels": [0]}),
        python2({**GOOD, "labels": [0, "cat"]}),
        python2({**GOOD, "data": cifar_rows(2)[:, :100]}),
        python2({**GOOD, "data": cifar_rows(2).astype(np.float32)}),
        python2({**GOOD, "data": [1, 2]}),
    ],
)
def test_a_damaged_file_is_refused(five, blob):
    (five / "test_batch").write_bytes(blob)
    with pytest.raises(FileFormatError, match=r"test_batch cannot be read as a CIFAR file"):
        load("cifar10", dir=five)


def test_labels_without_a_class_are_refused(five):
    (five / "test_batch").write_bytes(python2({**GOOD, "labels": [0, 3]}))
    with pytest.raises(DataError, match="labels 0 to 3 and 3 classes"):
        load("cifar10", dir=five)


@pytest.mark.parametrize(
    ("missing", "message"), [("batches.meta", "no cifar10 in"), ("test_batch", "no test_batch in"), ("data_batch_*", "no data_batch_1")]
)
def test_missing_files_are_named(five, missing, message):
    for path in five.glob(missing):
        path.unlink()
    with pytest.raises(DataError, match=f"{message}.*Allowed: .*To do: "):
        load("cifar10", dir=five)
