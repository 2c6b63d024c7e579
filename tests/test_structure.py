"""Weights, channels and dead filters that a mask keeps."""

import pytest
import torch
from torch import nn

from anymask import Mask
from anymask.connectivity import Layer, structure


def test_structure_counts_weights_channels_and_dead_filters():
    kept = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    kept[0, 1, 0, 1] = kept[0, 1, 1, 1] = kept[2, 1, 0, 0] = True
    found = structure(Mask({"conv": kept, "vector": torch.tensor([1, 0, 1]), "number": torch.tensor(1)}))
    assert found == {
        "conv": Layer((3, 2, 2, 2), kept=3, total=24, outs_kept=2, outs=3, ins_kept=1, ins=2),
        "vector": Layer((3,), kept=2, total=3, outs_kept=2, outs=3, ins_kept=1, ins=1),
        "number": Layer((), kept=1, total=1, outs_kept=1, outs=1, ins_kept=1, ins=1),
    }
    assert (found["conv"].dead, found["conv"].density) == (1, 0.125)


def test_with_a_model_groups_and_transposed_convolutions_are_counted_as_they_are():
    model = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.ConvTranspose2d(6, 4, 1, groups=2))
    kept = {"0.weight": torch.zeros(6, 2, 1, 1), "1.weight": torch.zeros(6, 2, 1, 1)}
    kept["0.weight"][0, 1] = kept["0.weight"][3, 1] = 1  # outputs 0 and 3, inputs 1 and 2 + 1
    kept["1.weight"][0, 1] = kept["1.weight"][1, 1] = kept["1.weight"][5, 0] = 1  # inputs 0, 1, 5; outputs 1 and 2 + 0
    alone, inside = (structure(Mask(kept), given) for given in (None, model))
    assert [(layer.outs_kept, layer.outs, layer.ins_kept, layer.ins) for layer in alone.values()] == [(2, 6, 1, 2), (3, 6, 2, 2)]
    assert [(layer.outs_kept, layer.outs, layer.ins_kept, layer.ins) for layer in inside.values()] == [(2, 6, 2, 4), (2, 4, 3, 6)]


def test_the_linear_layers_of_gpt_2_are_counted_as_they_are():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    kept = Mask({"0.weight": torch.tensor([[0, 1, 1], [0, 1, 1]])})  # (inputs, outputs)
    layer = structure(kept, nn.Sequential(conv1d(3, 2)))["0.weight"]
    assert (layer.outs_kept, layer.outs, layer.ins_kept, layer.ins, layer.dead) == (2, 3, 2, 2, 1)


def test_a_wrapper_does_not_count():
    mask, model = Mask({"0.weight": torch.ones(6, 4, 1, 1)}), nn.Sequential(nn.Conv2d(4, 6, 1))
    assert structure(mask, nn.DataParallel(model)) == structure(mask, model)
