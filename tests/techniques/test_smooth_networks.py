"""Ghost activations on transformers and on networks that are smooth already."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymask.errors import TechniqueError
from anymask.surgery import fingerprint
from anymask.techniques import Context, GhostActivation


def attach(model: nn.Module, example: object = None):
    return GhostActivation().attach(Context(model, None, F.cross_entropy, example=example))


class Transformer(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], *, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, activation=act, batch_first=True) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_smooth_networks_are_refused_by_what_they_have_and_left_alone() -> None:
    model = Transformer(F.gelu, layers=3)
    before = fingerprint(model)
    with pytest.raises(TechniqueError, match=r"smooth already: 3 gelu(.|\n)*leave it out of the recipe"):
        attach(model, torch.randn(2, 5, 8))
    assert fingerprint(model) == before
    with pytest.raises(TechniqueError, match="smooth already: 2 silu"):
        attach(nn.Sequential(nn.SiLU(), nn.SiLU()))
    with pytest.raises(TechniqueError, match="no ReLUs: 1 hardswish"):
        attach(nn.Sequential(nn.Hardswish()), torch.randn(2, 3))


def test_a_transformer_layer_with_relu_has_its_fast_path_seen_through() -> None:
    model, x = Transformer(F.relu, layers=2), torch.randn(2, 5, 8)
    plain = model.eval()(x)
    attached = attach(model, x)
    assert attached.found == "2 ReLU"
    assert not torch.allclose(model(x), plain, atol=1e-3)
