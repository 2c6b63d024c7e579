"""Files made to run code, or to take more memory or time than they are worth, are refused; nothing in them is run."""

import io
import json
import pickle
import resource
import struct
import time
import zipfile
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from anymask.errors import FileFormatError
from anymask.formats import load_mask, load_weights
from tests.formats.seeds import flax_bytes

BIG = 1 << 30


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), "w")


def torch_zip(value, path):
    torch.save(value, path)


def torch_legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


def newest_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


def object_array(value, path):
    with open(path, "wb") as file:
        np.savez(file, a=np.array([value], dtype=object))


@pytest.mark.parametrize("load", [load_mask, load_weights])
@pytest.mark.parametrize("write", [torch_zip, torch_legacy, plain_pickle, newest_pickle, object_array])
@pytest.mark.parametrize("name", ["mask.pth", "mask.safetensors", "mask.npz"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, load, write, name):
    proof = tmp_path / "was run"
    write({"fc.weight_mask": torch.eye(2), "more": Runs(proof)}, tmp_path / name)
    with pytest.raises(FileFormatError, match="nothing was run"):
        load(tmp_path / name)
    assert not proof.exists()
    with open(tmp_path / name, "rb") as file:
        if write is torch_zip:
            torch.load(file, weights_only=False)["more"].close()
            assert proof.exists()  # it does run where it is let


def test_a_pickled_model_says_what_to_save_instead(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "m")  # as Torch-Pruning's README does
    with pytest.raises(FileFormatError, match=r"Sequential, which is no tensor.*torch\.save\(model\.state_dict\(\), path\)"):
        load_mask(tmp_path / "m")


# -- bombs: a small file, and a large claim ----------------------------------------------------------------------------


def repeated_view(path):
    torch.save({"w": torch.zeros(1).expand(BIG, BIG)}, path)


def many_views(path):
    one = torch.zeros(1000)
    torch.save({f"w{i}": one.expand(100, 1000) for i in range(1000)}, path)


def add_zeros(archive, name, head=b""):
    """A file of 256 MiB, written piece by piece: the memory of this process must not have grown before the file is read."""
    with archive.open(name, "w") as file:
        file.write(head)
        for _ in range(256):
            file.write(bytes(1 << 20))


def zip_of_zeros(path):
    torch.save({"w": torch.eye(2)}, path)
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.infolist():
            if entry.filename.endswith("data/0"):
                add_zeros(archive, entry.filename)
            else:
                archive.writestr(entry.filename, source.read(entry))


def overlapping_files(path):
    """20,000 files of 1 MiB in the place of one."""
    torch.save({"w": torch.zeros(1 << 18)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += [entry for entry in archive.filelist if entry.file_size >= 1 << 20] * 20_000
        archive.writestr("m/more", b"")  # a change, so that the directory is written


def npy(shape, content=b"", dtype="|u1"):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def npz_of_zeros(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        add_zeros(archive, "w.npy", npy((256 << 10, 1 << 10)))


def npz_claim(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", npy((BIG, BIG), b"few"))


def npz_overflow(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", npy((1 << 32, 1 << 32), b""))  # 2**64 numbers, 0 in 64 bits


def npz_negative(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", npy((-1, 4), b""))


def safetensors_claim(path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [BIG, BIG], "data_offsets": [0, 4 * BIG * BIG]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def msgpack_claims(path):
    path.write_bytes(b"\x81\xa1w" + (b"\xdd" + struct.pack(">I", BIG)) * 400)


def msgpack_lists(path):
    """Lists in lists, each of which may be as long as the file: 32 MiB of places for each of 400."""
    path.write_bytes(b"\x81\xa1w" + (b"\xdd" + struct.pack(">I", 1 << 22)) * 400 + b"\xc0" * (1 << 22))


def msgpack_array(path):
    array = msgpack.ExtType(1, msgpack.packb(((BIG, BIG), "float32", b"1234")))
    path.write_bytes(msgpack.packb({"params": {"fc": {"kernel": array}}}))


def msgpack_nested(path):
    path.write_bytes(b"\x81\xa1w" * 100_000 + b"\xc0")


def json_nested(path):
    path.write_bytes(b'{"weight_map": ' + b"[" * 100_000)


def packed_masks(path):
    params = {"fc": {"kernel": np.zeros((0, 1 << 40), np.uint8)}}
    path.write_bytes(flax_bytes({"params": params, "masks": {"fc": {"kernel": np.zeros(0, np.uint8)}}}))


def laughs(path):
    tree = {"w": torch.eye(2)}
    for _ in range(12):
        tree = {str(i): tree for i in range(20)}  # 20**12 ways to the one tensor
    torch.save(tree, path)


def circle(path):
    tree = {"rest": {}}
    tree["rest"]["again"] = tree
    torch.save(tree, path)


BOMBS = [
    repeated_view,
    many_views,
    zip_of_zeros,
    overlapping_files,
    npz_of_zeros,
    npz_claim,
    npz_overflow,
    npz_negative,
    safetensors_claim,
    msgpack_claims,
    msgpack_lists,
    msgpack_array,
    msgpack_nested,
    json_nested,
    packed_masks,
    laughs,
    circle,
]


def address_space():
    """The most kibibytes that this process has had reserved: memory that is asked for, but never written, counts here only."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmPeak:")[2].split()[0])


@pytest.mark.parametrize("bomb", BOMBS, ids=[bomb.__name__ for bomb in BOMBS])
def test_a_claim_larger_than_the_file_takes_neither_memory_nor_time(tmp_path, bomb):
    bomb(tmp_path / "m")
    memory, space, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, address_space(), time.process_time()
    with pytest.raises(FileFormatError):
        load_mask(tmp_path / "m")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < 64
    assert (address_space() - space) / 1024 < 1024
    assert time.process_time() - began < 5


def test_an_archive_that_was_compressed_since_is_refused_and_not_misread(tmp_path):
    torch.save({"w": torch.randint(256, (64, 64), dtype=torch.uint8)}, tmp_path / "m")  # which compression does not make smaller
    source = zipfile.ZipFile(io.BytesIO((tmp_path / "m").read_bytes()))
    with zipfile.ZipFile(tmp_path / "m", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
    with pytest.raises(FileFormatError, match="an archive that is compressed"):
        load_mask(tmp_path / "m")


def test_a_tensor_that_many_ways_lead_to_is_read_once(tmp_path):
    tree = {"w": torch.eye(2)}
    for _ in range(6):
        tree = {str(i): tree for i in range(100)}  # 10**12 ways
    torch.save(tree, tmp_path / "m")
    assert dict.fromkeys(load_mask(tmp_path / "m")) == {"0.0.0.0.0.0.w": None}


def test_masks_that_compress_well_are_no_bomb(tmp_path):
    np.savez_compressed(tmp_path / "m.npz", **{"w.weight": np.eye(2000, dtype=np.float32)})
    assert (tmp_path / "m.npz").stat().st_size < 100_000
    assert load_mask(tmp_path / "m.npz").kept == 2000
