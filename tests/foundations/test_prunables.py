"""Which parameters a mask may cover."""

import pytest
from torch import nn

from anymask.errors import MaskError, SettingError
from anymask.prunables import prunable


class Tied(nn.Module):
    """Embedding, layers 1 and 10, and a decoder that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layer10 = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.layer1 = nn.ConvTranspose1d(4, 4, 1)
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.embedding.weight


def test_convolutions_of_every_kind_and_linear_layers_in_the_models_order():
    convs = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    model = nn.Sequential(*(conv(2, 2, 1) for conv in convs), nn.BatchNorm1d(2), nn.Embedding(2, 2), nn.Linear(2, 2), nn.PReLU())
    assert list(prunable(model)) == [f"{n}.weight" for n in (0, 1, 2, 3, 4, 5, 8)]
    assert list(prunable(model, kinds=["linear"])) == ["8.weight"]
    assert list(prunable(model, kinds=["conv"])) == [f"{n}.weight" for n in range(6)]
    assert prunable(model)["8.weight"] is model[8].weight


def test_a_tied_weight_is_there_once_under_its_first_name():
    assert list(prunable(Tied())) == ["embedding.weight", "layer10.0.weight", "layer1.weight"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["layer1"], ["embedding.weight", "layer10.0.weight"]),
        (["layer10"], ["embedding.weight", "layer1.weight"]),
        (["layer10.0", "layer10.0.weight"], ["embedding.weight", "layer1.weight"]),
        (["embedding.weight", "layer1.weight"], ["layer10.0.weight"]),
    ],
)
def test_exclude_takes_whole_names_of_modules_and_parameters(exclude, left):
    assert list(prunable(Tied(), exclude=exclude)) == left


@pytest.mark.parametrize("settings", [{"exclude": ["layer"]}, {"exclude": ["layer1", "typo"]}, {"exclude": [""]}, {"kinds": ["cnov"]}])
def test_names_that_are_not_there_are_refused(settings):
    with pytest.raises(SettingError):
        prunable(Tied(), **settings)


@pytest.mark.parametrize(
    ("model", "settings"), [(nn.ReLU(), {}), (nn.Linear(1, 1), {"kinds": ["conv"]}), (Tied(), {"exclude": list(prunable(Tied()))})]
)
def test_nothing_to_prune_is_refused(model, settings):
    with pytest.raises(MaskError, match="no weight that a mask may cover"):
        prunable(model, **settings)
