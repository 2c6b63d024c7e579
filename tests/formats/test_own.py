"""Mask files: what goes in comes out, and a damaged file is refused, never misread and never a crash."""

import base64
import hashlib
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as to_bytes
from safetensors.torch import save as torch_bytes

from anymask.errors import FileFormatError
from anymask.formats import FORMAT, load_mask
from anymask.mask import Mask
from anymask.models import build
from anymask.prunables import prunable
from tests.foundations.test_mask import kept

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def some_mask() -> Mask:
    seed = torch.Generator().manual_seed(0)
    kept = {"conv.weight": torch.rand(3, 2, 3, 3, generator=seed) < 0.5, "größe": torch.rand(5, generator=seed) < 0.5}
    return Mask(kept, info={"method": "snip"})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("masks") / "some.mask"


@pytest.fixture(scope="module")
def blob(file):
    """The bytes of a good file."""
    some_mask().save(file)
    return file.read_bytes()


def read(path: Path, blob: bytes) -> Mask | None:
    path.write_bytes(blob)
    try:
        return load_mask(path)
    except FileFormatError:
        return None


@settings(max_examples=50)
@given(kept(), st.dictionaries(st.text(), PLAIN))
@example({"größe.重み": torch.tensor(True)}, {"method": "ü", "seed": 2**70})
def test_what_is_saved_is_loaded(file, tensors, info):
    mask = Mask(tensors, info=info)
    mask.save(file)
    loaded = load_mask(str(file))
    assert loaded == mask
    assert list(loaded) == list(mask)
    assert loaded.info == info


def test_a_file_has_one_bit_a_weight(tmp_path):
    Mask({"w": torch.ones(100_000)}).save(tmp_path / "m")
    assert 12_500 < (tmp_path / "m").stat().st_size < 13_000


def test_a_mask_of_resnet18_is_under_one_and_a_half_megabytes(tmp_path):
    model = build("resnet18", classes=10)
    seed = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(weight.shape, generator=seed) < 0.1 for name, weight in prunable(model).items()}
    mask = Mask(kept, info={"method": "snip", "seed": 0, "model": "a fingerprint", "versions": {"torch": torch.__version__}})
    mask.save(tmp_path / "m")
    assert mask.total > 11_000_000
    assert (tmp_path / "m").stat().st_size < 1_500_000
    assert load_mask(tmp_path / "m", model=model) == mask


WRITTEN_BY_0_1_0 = """
IAIAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJhbnltYXNrLW1hc2stMSI6IntcImhlYWRlclwiOiBcIntcXFwic2hhcGVzXFxcIjoge1xcXCJjb252LndlaWdo
dFxcXCI6IFsyLCAzLCAyLCAyXSwgXFxcImdyXFxcXHUwMGY2XFxcXHUwMGRmZVxcXCI6IFszXX0sIFxcXCJpbmZvXFxcIjoge1xcXCJtZXRob2RcXFwiOiBc
XFwic25pcFxcXCIsIFxcXCJzcGFyc2l0eVxcXCI6IDAuNSwgXFxcInNlZWRcXFwiOiA3LCBcXFwibW9kZWxcXFwiOiBcXFwiYWJjXFxcIiwgXFxcInZlcnNp
b25zXFxcIjoge1xcXCJhbnltYXNrXFxcIjogXFxcIjAuMS4wXFxcIiwgXFxcInRvcmNoXFxcIjogXFxcIjIuMTMuMFxcXCJ9fX1cIiwgXCJzaGEyNTZcIjog
XCJkNjE1MzAyNmZjMTFkNDk2NWIxZjE0N2M1ODJiNjJmMjVhMmM1YzYzZjkzMjhkMjA0M2Y4ZjQ3OTFmNGI1M2MwXCJ9In0sImNvbnYud2VpZ2h0Ijp7ImR0
eXBlIjoiVTgiLCJzaGFwZSI6WzNdLCJkYXRhX29mZnNldHMiOlswLDNdfSwiZ3LDtsOfZSI6eyJkdHlwZSI6IlU4Iiwic2hhcGUiOlsxXSwiZGF0YV9vZmZz
ZXRzIjpbMyw0XX19kkkkoA==
"""


def test_a_file_of_version_0_1_0_is_read(file):
    mask = read(file, base64.b64decode(WRITTEN_BY_0_1_0))
    assert mask == Mask({"conv.weight": torch.arange(24).reshape(2, 3, 2, 2) % 3 == 0, "größe": torch.tensor([1, 0, 1])})
    versions = {"anymask": "0.1.0", "torch": "2.13.0"}
    assert mask.info == {"method": "snip", "sparsity": 0.5, "seed": 7, "model": "abc", "versions": versions}
    mask.save(file)
    assert file.read_bytes() == base64.b64decode(WRITTEN_BY_0_1_0)


def test_a_file_of_a_later_format_says_so(file):
    file.write_bytes(header_file({"w": [8]}, format="anymask-mask-2"))
    with pytest.raises(FileFormatError, match=rf"its format is anymask-mask-2, and this version reads {FORMAT}.*install a newer anymask"):
        load_mask(file)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    some_mask().save(tmp_path / "m")
    old = (tmp_path / "m").read_bytes()
    with pytest.raises(TypeError):
        Mask({"w": torch.ones(2)}, info={"not": {"json"}}).save(tmp_path / "m")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as if the disk were full
    try:
        with pytest.raises(OSError, match="large"):
            Mask({"w": torch.ones(10**6)}).save(tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "m").read_bytes() == old
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_no_file_says_so(tmp_path):
    for path in (tmp_path / "none.mask", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no mask file at .* To do"):
            load_mask(path)


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused(file, blob):
    assert [cut for cut in range(len(blob)) if read(file, blob[:cut]) is not None] == []


def test_one_flipped_bit_anywhere_is_refused_or_harmless(file, blob):
    assert read(file, blob) == some_mask()
    for place in range(len(blob)):
        flipped = bytearray(blob)
        flipped[place] ^= 1 << place % 8
        assert read(file, bytes(flipped)) in (None, some_mask())


@settings(max_examples=300)
@given(st.data())
def test_any_mutation_is_refused_or_harmless(file, blob, data):
    mutated = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(mutated)))
        mutated[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    assert read(file, bytes(mutated)) in (None, some_mask())


@settings(max_examples=100)
@given(st.binary(max_size=64))
def test_any_bytes_are_refused(file, noise):
    assert read(file, noise) is None


def header_file(shapes, *, info=(), header="", **metadata):
    """A file of ours in every way but what is given, with a right checksum."""
    header = header or json.dumps({"shapes": shapes, "info": info})
    digest = hashlib.sha256(header.encode() + b"\xff").hexdigest()
    return to_bytes(
        {"w": np.array([255], dtype=np.uint8)},
        metadata={metadata.pop("format", FORMAT): json.dumps({"header": header, "sha256": digest, **metadata})},
    )


def test_the_form_that_the_next_tests_bend_is_a_mask(file):
    assert read(file, header_file({"w": [2, 4]})) == Mask({"w": torch.ones(2, 4)})


@pytest.mark.parametrize(
    "shapes",
    [
        {"w": [9]},
        {"w": [0]},
        {"w": [2**32, 2**32]},
        {"w": [2**61, 8]},
        {"w": [2**64]},
        {"w": [-2, -4]},
        {"w": [2.0, 4.0]},
        {"w": ["8"]},
        {"w": "8"},
        {"w": None},
        {"w": [[8]]},
        {"w": [True] * 3 + [None]},
        {"v": [8]},
        {},
        ["w"],
        None,
        3,
    ],
)
def test_shapes_that_do_not_fit_the_bits_are_refused(file, shapes):
    assert read(file, header_file(shapes)) is None


@pytest.mark.parametrize(
    "bent", [{"format": "other-1"}, {"header": "{"}, {"header": "[" * 5000}, {"sha256": "0" * 64}, {"info": 3}, {"info": "ab"}]
)
def test_a_header_that_is_not_ours_is_refused(file, bent):
    assert read(file, header_file({"w": [8]}, **bent)) is None


def test_other_safetensors_are_refused(file):
    file.write_bytes(torch_bytes({"w": torch.ones(3)}))
    with pytest.raises(
        FileFormatError, match=rf"{file} cannot be read as a mask .*\(no mask, and no matrix .*\).* a whole file of format {FORMAT}"
    ):
        load_mask(file)
    assert read(file, torch_bytes({"w": torch.ones(3)}, metadata={"format": FORMAT})) is None


def test_equal_masks_are_equal_files(tmp_path):
    mask = Mask({"a": torch.eye(3), "b": torch.ones(2)}, info={"method": "x", "seed": 1})
    contents = set()
    for i in range(8):
        mask.save(tmp_path / f"{i}.mask")
        contents.add((tmp_path / f"{i}.mask").read_bytes())
    assert len(contents) == 1
