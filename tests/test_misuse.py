"""What is passed in the wrong place is named, in three parts."""

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
    "a model for an optimiser": (lambda: anymask.hold(MASK, OPTIMIZER, MODEL), "the optimizer came as Sequential.*order"),
    "an optimiser of no kind": (lambda: anymask.hold(MASK, MODEL, MODEL.parameters()), "the optimizer came as generator.*order"),
    "a path for a mask": (lambda: anymask.hold("a.mask", MODEL, OPTIMIZER), "mask came as str.*load_mask"),
    "a model for an optimiser of a recipe": (
        lambda: anymask.Recipe.preset("best").attach(OPTIMIZER, MODEL, total_steps=1),
        "the model came as SGD.*order",
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


def test_a_batch_of_the_wrong_width_is_refused_by_the_layer_that_it_is_for() -> None:
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    hold = anymask.hold(MASK, MODEL, optimizer)
    running = anymask.Recipe.preset("best:preconditioning").attach(MODEL, optimizer, total_steps=1)
    for wrong in (torch.randn(2, 3), torch.randn(2, 5)):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            MODEL(wrong)
    running.leave()
    hold.release()
