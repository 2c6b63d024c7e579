"""What is passed in the wrong place is named, in three parts."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import anymask
from anymask.errors import AnymaskError

MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)
MASK = anymask.prune(MODEL, "random", sparsity=0.5)
X = torch.randn(2, 4)
MISUSES = {
    "a model for an optimiser": (lambda: anymask.hold(MASK, OPTIMIZER, MODEL), "the optimizer came as Sequential.*after the model"),
    "an optimiser of no kind": (lambda: anymask.hold(MASK, MODEL, MODEL.parameters()), "the optimizer came as generator.*whose hooks"),
    "no optimiser": (lambda: anymask.hold(MASK, MODEL, None), "the optimizer came as NoneType"),
    "a state dict for a model": (lambda: MASK.check(MODEL.state_dict()), "the model came as OrderedDict.*the model itself"),
    "a path for a mask": (lambda: anymask.hold("a.mask", MODEL, OPTIMIZER), "mask came as str.*load_mask"),
    "a model for an optimiser of a recipe": (
        lambda: anymask.Recipe.preset("best").attach(OPTIMIZER, MODEL, total_steps=1),
        "the model came as SGD.*in its place",
    ),
    "an optimiser of no kind of a recipe": (
        lambda: anymask.Recipe.preset("best").attach(MODEL, [], total_steps=1),
        "the optimizer came as list",
    ),
    "an optimiser to prune": (lambda: anymask.prune(OPTIMIZER, "magnitude", sparsity=0.5), "the model came as SGD"),
    "a path for a mask to ship": (lambda: anymask.ship(MODEL, "a.mask", example=X, to="net.anymask"), "mask came as str.*load_mask"),
    "a DataLoader to fit": (lambda: anymask.fit(MODEL, DataLoader([(X, 0)]), mask=MASK), "train came as DataLoader.*data.Batches.*README"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_what_is_in_the_wrong_place_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, says = MISUSES[name]
    with pytest.raises(AnymaskError, match=says):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(4, 8), (2, 3)), (nn.Linear(4, 8), (2, 5)), (nn.Conv2d(4, 8, 1), (2, 3, 9, 9)), (nn.Conv2d(4, 8, 1), (2, 3))],
)
def test_a_batch_of_the_wrong_shape_is_named_where_preconditioning_looks(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anymask.hold(anymask.prune(model, "random", sparsity=0.5), model, optimizer)
    running = anymask.Recipe.preset("best:preconditioning").attach(model, optimizer, total_steps=1)
    with pytest.raises(AnymaskError, match=f"the input of 0.weight came to preconditioning as {re.escape(str(shape))}.*Allowed: 4 "):
        model(torch.randn(shape))
    running.leave()
