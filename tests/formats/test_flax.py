"""Trees of JAX: their layout, their names, how they are packed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anymask.errors import FileFormatError, MaskError
from anymask.formats import load_mask
from anymask.formats.names import matched
from anymask.mask import Mask
from tests.formats.seeds import FLAX_NAMES, BFloat16, flax_bytes, flax_tree, kept, net


def test_masks_that_jaxpruner_packed_are_unpacked_by_the_shapes_of_the_parameters(tmp_path):
    tree = flax_tree(kept())
    weights = {module: {"kernel": np.ones(leaf["kernel"].shape, np.float32)} for module, leaf in tree.items()}
    masks = {module: {"kernel": np.packbits(leaf["kernel"])} for module, leaf in tree.items()}
    (tmp_path / "m").write_bytes(flax_bytes({"params": weights, "opt_state": {"0": {"masks": {"params": masks}}}}))
    assert load_mask(tmp_path / "m", model=net()) == Mask(kept())
    (tmp_path / "m").write_bytes(flax_bytes({"masks": masks}))
    with pytest.raises(FileFormatError, match="no mask"):
        load_mask(tmp_path / "m")


def test_zeros_of_bfloat16_and_chunks_are_read(tmp_path):
    kernel = np.array([[0x3F80, 0], [0x8000, 0x4000], [0, 0x3F80]], np.uint16).view(BFloat16)  # 1 0, -0 2, 0 1
    flat = kernel.reshape(-1)
    chunks = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 2}, "chunks": {"0": flat[:4], "1": flat[4:]}}
    for value in (kernel, chunks):
        (tmp_path / "m").write_bytes(flax_bytes({"params": {"out": {"kernel": value}}}))
        assert load_mask(tmp_path / "m")["out.weight"].int().tolist() == [[1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("keys", ["['params']['{}']['kernel']", "params.{}.kernel", "{}/kernel"])
def test_keys_of_an_npz_may_be_joined_in_three_ways(tmp_path, keys):
    tree = flax_tree(kept())
    np.savez(tmp_path / "m.npz", **{keys.format(module): tree[module]["kernel"] for module in tree})
    mask = load_mask(tmp_path / "m.npz")
    assert {FLAX_NAMES[name]: t.tolist() for name, t in mask.items()} == {name: t.tolist() for name, t in kept().items()}


def layers(**shapes):
    """A model of linear layers."""
    return nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


def save_tree(path: Path, **shapes):
    path.write_bytes(flax_bytes({"params": {name: {"kernel": np.eye(*shape, dtype=np.uint8)} for name, shape in shapes.items()}}))
    return path


@pytest.mark.parametrize(
    ("tree", "model", "names"),
    [
        ({"Dense_0": (2, 3), "Dense_1": (3, 4)}, {"fc2": (3, 4), "fc1": (2, 3)}, {"fc1": (3, 2), "fc2": (4, 3)}),  # by shape
        ({"fc_1": (2, 3), "fc_2": (2, 3)}, {"fc2": (2, 3), "fc1": (2, 3)}, {"fc1": (3, 2), "fc2": (3, 2)}),  # by words and numbers
        ({"query": (2, 2), "out": (2, 2)}, {"output": (2, 2), "querys": (2, 2)}, {"querys": (2, 2), "output": (2, 2)}),  # nearest
    ],
)
def test_names_of_another_framework_are_matched_by_shape_and_name(tmp_path, tree, model, names):
    mask = load_mask(save_tree(tmp_path / "m", **tree), model=layers(**model))
    assert {name: tuple(t.shape) for name, t in mask.items()} == {f"{name}.weight": shape for name, shape in names.items()}


@pytest.mark.parametrize(
    ("tree", "model"),
    [
        ({"Dense_0": (2, 2), "Dense_1": (2, 2)}, {"dense1": (2, 2), "dense2": (2, 2)}),  # flax counts from 0, and torch does not
        ({"Dense_1": (2, 2)}, {"dense1": (2, 2), "dense2": (2, 2)}),
        ({"a_1": (2, 2), "a_2": (2, 2)}, {"a1": (2, 2), "b1": (2, 2)}),
        ({"left": (2, 2), "right": (2, 2)}, {"up": (2, 2), "down": (2, 2)}),
        ({"query": (2, 2)}, {"query_a": (2, 2), "query_b": (2, 2)}),
        ({"fc": (2, 3)}, {"fc": (3, 2)}),
    ],
)
def test_names_that_leave_a_choice_are_not_guessed(tmp_path, tree, model):
    with pytest.raises(MaskError, match="does not fit"):
        load_mask(save_tree(tmp_path / "m", **tree), model=layers(**model))


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"),
    [
        ({"params.fc.weight": (2, 3)}, {"fc": (2, 3), "other": (3, 2)}, {"params.fc.weight": "other.weight"}),  # the shape comes first
        ({"left.weight": (2, 2), "lefts.weight": (2, 2)}, {"leftx": (2, 2), "right": (2, 2)}, {}),  # one nearest for two
    ],
)
def test_a_match_has_the_shape_and_is_nobody_elses(ours, theirs, pairs):
    assert matched(ours, layers(**theirs), loose=True) == pairs


def test_a_kernel_among_weights_is_none_of_flax(tmp_path):
    masks = {"blur.kernel": torch.eye(2, 3), "fc.weight": torch.eye(3, 2)}
    torch.save(masks, tmp_path / "m")
    assert load_mask(tmp_path / "m") == Mask(masks)


def test_a_transposed_convolution_of_flax_is_refused(tmp_path):
    (tmp_path / "m").write_bytes(flax_bytes({"up": {"kernel": np.eye(2, dtype=np.uint8).reshape(1, 1, 2, 2)}}))
    with pytest.raises(FileFormatError, match=r"up\.weight is of a transposed convolution"):
        load_mask(tmp_path / "m", model=nn.ModuleDict({"up": nn.ConvTranspose2d(2, 2, 1)}))
    assert load_mask(tmp_path / "m", model=nn.ModuleDict({"up": nn.Conv2d(2, 2, 1)})).kept == 2
