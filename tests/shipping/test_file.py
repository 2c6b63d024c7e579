"""The file: what is written is read again, and whatever was done to it is refused in three parts."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as safetensors
from torch import nn

from anymask import Mask
from anymask.errors import AnymaskError, FileFormatError
from anymask.shipping import file, gaps
from anymask.shipping.making import ship
from anymask.shipping.ops import OPS, Wrong
from anymask.shipping.plan import halves, stored, whole
from anymask.shipping.runtime import load
from tests.shipping.nets import network, plan_of, trained_like


class Net(nn.Module):
    """Small, with most kinds of operations."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(nn.functional.relu6(nn.functional.max_pool2d(self.conv(x), 2)))
        return self.last(torch.cat([x, x * 2], 1).mean([2, 3]))


@pytest.fixture(scope="module")
def plan():
    return plan_of(trained_like(Net(), density=0.4), torch.randn(2, 2, 6, 6))


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16", "int8"])
def blob(plan, request):
    return file.packed(stored(plan, request.param))


def parts(blob):
    """The header and the tensors of a file."""
    seal = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"][file.FORMAT]
    return json.loads(json.loads(seal)["header"]), safetensors.load(blob)


def same(a, b):
    """Whether two plans are equal, array by array."""
    arrays = zip(a.arrays, b.arrays, strict=True)
    equal = all(x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x) for x, y in arrays)
    return (a.input, a.steps, a.values, a.info) == (b.input, b.steps, b.values, b.info) and equal


def refused(path, *words):
    with pytest.raises(FileFormatError) as caught:
        load(path)
    assert all(word in str(caught.value) for word in (path.name, "Allowed:", "To do:", *words)), str(caught.value)


# -- positions ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sets(st.integers(0, 5000)), max_size=4), st.integers(1, 10**9))
def test_positions_as_gaps_are_the_same_positions(layers, stretch):
    positions = [np.array(sorted(layer), np.int64) * (stretch if len(layer) < 5 else 1) for layer in layers]
    positions = [layer[layer < 10**8] for layer in positions]
    coded = np.concatenate([np.zeros(0, np.uint8), *map(gaps.code, positions)])
    packed = gaps.compressed(coded)
    unpacked = gaps.decompressed(packed, kept=sum(map(len, positions)), total=len(positions) * 10**8)
    for found, wanted in zip(gaps.decode(unpacked, [len(layer) for layer in positions]), positions, strict=True):
        assert found.tolist() == wanted.tolist()


@given(st.lists(st.integers(0, 255), max_size=30), st.lists(st.integers(0, 9), max_size=4))
def test_any_bytes_are_ascending_positions_or_refused(coded, counts):
    try:
        found = gaps.decode(np.array(coded, np.uint8), counts)
    except Wrong:
        return
    assert [len(layer) for layer in found] == counts
    assert all((np.diff(layer, prepend=-1) > 0).all() for layer in found)
    assert np.concatenate([np.zeros(0, np.uint8), *map(gaps.code, found)]).tolist() == coded


def test_positions_that_unpack_to_more_than_there_can_be_are_refused():
    bomb = gaps.compressed(np.full(1 << 25, gaps.ESCAPE, np.uint8))
    with pytest.raises(Wrong, match="more than there can be"):
        gaps.decompressed(bomb, kept=10, total=1000)
    with pytest.raises(Wrong, match="more than there can be"):
        gaps.decompressed(bomb, kept=10, total=1 << 50)
    with pytest.raises(Wrong, match="cannot be unpacked"):
        gaps.decompressed(np.zeros(9, np.uint8), kept=10, total=1000)


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16", "int8"])
def test_what_is_written_is_read_again(plan, values, tmp_path):
    (tmp_path / "net.anymask").write_bytes(file.packed(stored(plan, values)))
    assert same(file.read(tmp_path / "net.anymask"), stored(plan, values))


def test_equal_networks_are_equal_files_and_info_is_kept(tmp_path):
    files = [tmp_path / f"{number}.anymask" for number in range(2)]
    for path in files:
        ship(nn.Linear(2, 2).requires_grad_(False).apply(_ones), None, example=torch.ones(1, 2), to=path, info={"seed": 1})
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load(files[0]).plan.info == {"seed": 1}


def _ones(module):
    module.weight.fill_(1)
    module.bias.fill_(1)


def test_a_layer_of_no_weights_and_a_dense_one(tmp_path):
    for kept in (torch.zeros(3, 70, 3, 3), torch.ones(3, 70, 3, 3)):
        model, mask = nn.Sequential(nn.Conv2d(70, 3, 3)), Mask({"0.weight": kept})
        mask.apply(model)
        done = ship(model, mask, example=torch.ones(1, 70, 4, 4), to=tmp_path / "net.anymask", values="float32")
        assert done.kept == kept.sum()
        assert done.difference < 1e-4


def test_an_own_file_has_all_operations_among_those_that_are_known():
    model = network("resnet20-0.25x")
    assert {type(step.op) for step in plan_of(model, torch.randn(2, 3, 32, 32)).steps} <= set(OPS.values())


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20))
def test_bfloat16_is_that_of_torch(numbers):
    array = np.array(numbers, np.float32)
    torch.testing.assert_close(torch.from_numpy(whole(halves(array))), torch.from_numpy(array).bfloat16().float(), rtol=0, atol=0)


@settings(max_examples=300)
@given(data=st.data())
def test_a_changed_byte_is_refused_or_changes_nothing(plan, data, tmp_path_factory):
    """Only blanks at the end of the header can be changed so that it reads the same."""
    path, blob = tmp_path_factory.getbasetemp() / "changed.anymask", bytearray(file.packed(stored(plan, "float16")))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(blob) - 1))
        blob[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(blob)
    try:
        found = load(path).plan
    except FileFormatError:
        return
    assert same(found, stored(plan, "float16"))


def test_a_file_cut_off_anywhere_is_refused(blob, tmp_path):
    path = tmp_path / "cut.anymask"
    for length in {*range(0, 40), *range(0, len(blob), max(1, len(blob) // 60)), len(blob) - 1}:
        path.write_bytes(blob[:length])
        refused(path)
    path.write_bytes(blob + b"0")
    refused(path)


def test_other_files_are_refused_with_what_they_are(tmp_path):
    path = tmp_path / "net.anymask"
    for kind, named, words in ((FileNotFoundError, path, "no shipped network at"), (IsADirectoryError, tmp_path, "is a folder")):
        with pytest.raises(kind, match=words) as caught:
            load(named)
        assert isinstance(caught.value, AnymaskError)
        assert str(named) in caught.value.came
    Mask({"weight": torch.eye(2)}).save(path)
    refused(path, "a safetensors file of something else")
    torch.save({"a": torch.eye(2)}, path)
    refused(path, "another kind of file")
    path.write_bytes(safetensors.save({}, metadata={"anymask-program-2": "{}"}))
    refused(path, "its format is anymask-program-2", "newer anymask")


# -- files whose checksum is right and that lie nevertheless -------------------------------------------------------------


def _conv(header, **changed):
    next(step for step in header["steps"] if step[0] == "conv")[2].update(changed)


LIES = {
    "unknown operation": (lambda h, t: h["steps"].append(["fft", [0], {}]), "'fft', which this version does not have"),
    "unknown setting": (lambda h, t: _conv(h, mode="x"), "conv with 'mode'"),
    "missing setting": (lambda h, t: h["steps"][0][2].pop("outputs"), "outputs"),
    "wrong type": (lambda h, t: _conv(h, groups=True), "groups of conv is 'True'"),
    "negative": (lambda h, t: _conv(h, padding=[-1, 0]), "padding of conv is"),
    "fraction": (lambda h, t: _conv(h, stride=[1.5, 1]), "stride of conv is"),
    "stride 0": (lambda h, t: _conv(h, stride=[0, 1]), "a kernel, stride, dilation or groups of 0"),
    "groups": (lambda h, t: _conv(h, groups=3), "3 groups of 2 channels"),
    "huge number": (lambda h, t: _conv(h, outputs=10**30), "outputs of conv is"),
    "huge layer": (lambda h, t: _conv(h, outputs=2**31 - 1), "at most 268,435,456"),
    "huge vector": (lambda h, t: h["steps"].append(["linear", [len(h["steps"])], {"outputs": 2**30, "inputs": 3}]), "at most 268,435,456"),
    "huge map": (lambda h, t: _conv(h, padding=[2**29, 2**29]), "at most 268,435,456"),
    "huge dilation": (
        lambda h, t: _conv(h, kernel=[1, 3], dilation=[1, 2**30], stride=[1, 2**10], padding=[0, 2**30]),
        "a padded map of",
    ),
    "huge stride": (lambda h, t: _conv(h, stride=[2**30, 1]), "at a stride"),
    "huge kernel": (lambda h, t: _conv(h, kernel=[2**20, 1], padding=[2**19, 0]), "a kernel (1048576, 1)"),
    "kernel of many places": (lambda h, t: _conv(h, kernel=[2**10, 2**10], padding=[2**9, 2**9]), "a kernel (1024, 1024)"),
    "pool of many places": (
        lambda h, t: h["steps"].extend(
            [
                ["pad", [0], {"by": [0, 0, 2**9, 2**9, 2**9, 2**9]}],
                ["avg-pool", [len(h["steps"]) + 1], {"kernel": [2**10, 2**10], "stride": [1, 1]}],
            ]
        ),
        "a kernel (1024, 1024)",
    ),
    "table of a tall kernel": (
        lambda h, t: _conv(h, outputs=2**10, kernel=[2**14, 8], padding=[2**13, 8], kept=2**16),
        "65536 weights kept of a kernel (16384, 8), 16384 rows high",
    ),
    "many steps": (lambda h, t: h["steps"].extend([["clamp", [0], {}]] * 10_000), "at most 10,000 are allowed"),
    "huge pool": (
        lambda h, t: h["steps"].append(["avg-pool", [0], {"kernel": [2**30, 1], "stride": [1, 1], "padding": [2**29, 0]}]),
        "padded map",
    ),
    "huge adaptive pool": (lambda h, t: h["steps"].append(["adaptive-pool", [0], {"size": [2**13, 2**13]}]), "an output of (8192, 8192)"),
    "dimensions": (lambda h, t: h["steps"].append(["reshape", [0], {"to": [1] * 70}]), "70 dimensions"),
    "huge input": (lambda h, t: h.update(input=[2, 2**30, 2**30]), "at most 268,435,456"),
    "no input": (lambda h, t: h.update(input=[]), "for an input ()"),
    "empty input": (lambda h, t: h.update(input=[2, 0, 6]), ""),
    "vector": (lambda h, t: h.update(input=[2]), "a map (C, H, W) is needed"),
    "later value": (lambda h, t: h["steps"][0].__setitem__(1, [3]), "not made before it"),
    "no value": (lambda h, t: h["steps"][0].__setitem__(1, []), "0 inputs"),
    "not a list": (lambda h, t: h["steps"][0].__setitem__(1, "0"), "inputs of conv"),
    "not a step": (lambda h, t: h["steps"].append(1), ""),
    "more kept": (lambda h, t: _conv(h, kept=60), "values are"),
    "most kept": (lambda h, t: _conv(h, kept=2**30), "weights kept of a weight"),
    "values as": (lambda h, t: h.update(values="int4"), "values stored as 'int4'"),
    "other type": (lambda h, t: h.update(values="float32"), "where float32"),
    "scales": (lambda h, t: h.update(values="int8"), "tensors constants, positions, values"),
    "missing tensor": (lambda h, t: t.pop("constants"), "tensors positions, values"),
    "short tensor": (lambda h, t: t.update(constants=t["constants"][1:]), "constants are float16"),
    "infinite": (lambda h, t: t["values"].__setitem__(0, np.inf), "values that are not finite"),
    "positions": (lambda h, t: t.update(positions=t["positions"].astype(np.int16)), "positions are int16"),
    "out of range": (
        lambda h, t: t.update(positions=_recoded(t["positions"], lambda c: np.concatenate([c[:-1], np.full(3, 255, np.uint8), c[-1:]]))),
        "positions that are cut off, or more than there can be",
    ),
    "beyond": (lambda h, t: t.update(positions=_recoded(t["positions"], lambda c: np.append(c[:-1], c[-1] + 20))), "position "),
    "fewer": (lambda h, t: t.update(positions=_recoded(t["positions"], lambda c: c[:-1])), "positions, where"),
    "no steps": (lambda h, t: h.pop("steps"), "steps"),
    "info": (lambda h, t: h.update(info=[]), ""),
    "activation": (lambda h, t: h["steps"].append(["activation", [0], {"kind": "sine"}]), "an activation 'sine'"),
    "not a number": (lambda h, t: h["steps"].append(["clamp", [0], {"low": "0"}]), "low of clamp"),
    "reshape": (lambda h, t: h["steps"].append(["reshape", [0], {"to": [5]}]), "brought to (5,)"),
    "window": (lambda h, t: h["steps"].append(["max-pool", [0], {"kernel": [2**30, 1], "stride": [1, 1]}]), "smaller than the window"),
}


def _recoded(packed, change):
    coded = gaps.decompressed(packed, kept=10**6, total=10**6)
    return gaps.compressed(change(coded).astype(np.uint8))


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(plan, lie, tmp_path):
    change, words = LIES[lie]
    header, tensors = parts(file.packed(stored(plan, "float16")))
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    change(header, tensors)
    path = tmp_path / "lie.anymask"
    path.write_bytes(file.sealed(json.dumps(header), tensors))
    refused(path, words)
