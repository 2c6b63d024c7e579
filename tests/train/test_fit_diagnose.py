"""Diagnostics of the trainer: recorded, resumed, and not felt by the training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from anymask import Diagnostics, fit
from anymask.diagnostics import sharpness
from anymask.errors import SettingError, UnknownName
from anymask.kernels import available
from anymask.train import Protocol, Result
from tests.train.trainings import MOVING, PROTOCOL, RECIPE, Net, batches, mask_of, train_once

native = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")
SCALARS = {"dead_relus", "effective_rank", "sign_flips", "sign_flips_from_start", "distance_overall"}


def without(curves: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in curves.items() if name != "diagnostics"}


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(torch.equal(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("moving", MOVING)
def test_the_training_is_bit_equal_with_and_without(moving: str) -> None:
    plain, watched = Net(), Net()
    expected, result = train_once(plain, moving=moving), train_once(watched, moving=moving, diagnose="sharpness")
    assert same(watched, plain)
    assert without(result.curves) == expected.curves
    assert result.accuracies() == expected.accuracies()
    assert result.mask == expected.mask
    check_shape(result, epochs=PROTOCOL.epochs, more={"sharpness"})


@native
def test_the_training_on_sparse_layers_is_bit_equal_with_and_without() -> None:
    plain, watched = Net(), Net()
    train_once(plain, sparse="on")
    result = train_once(watched, sparse="on", diagnose="sharpness")
    assert same(watched, plain)
    assert result.sparse_layers > 0
    check_shape(result, epochs=PROTOCOL.epochs, more={"sharpness"})


def check_shape(result: Result, *, epochs: int, more: set[str]) -> None:
    """Every curve has a plain value for each epoch."""
    found = json.loads(json.dumps(result.curves["diagnostics"], allow_nan=False))
    layers = set(mask_of(Net()))
    assert set(found) == SCALARS | more | {"gradient_norm", "distance"}
    assert set(found["gradient_norm"]) == set(found["distance"]) == layers
    curves = [*(found[name] for name in SCALARS | more), *found["gradient_norm"].values(), *found["distance"].values()]
    assert all(len(curve) == epochs and all(isinstance(value, float) for value in curve) for curve in curves)


def test_what_is_measured_is_the_plain_network_on_the_first_training_batch_while_ghosts_act() -> None:
    model, (train, _, _) = Net(), batches()
    how: dict[str, Any] = {"last_step": 4, "diagnose": "sharpness", "sparse": "off"}
    result = fit(model, train, mask=mask_of(Net()), recipe=RECIPE, protocol=PROTOCOL, **how)
    assert 0 < result.curves["strength"]["ghost_activation"][-1] < 1
    x, y = next(iter(train))
    found, last = result.curves["diagnostics"], Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), x).epoch()
    assert found["dead_relus"] == [last["dead_relus"]]
    assert found["effective_rank"] == [last["effective_rank"]]
    assert found["sharpness"] == pytest.approx([sharpness(model, x, y, mask=result.mask)], rel=1e-4)


@pytest.mark.parametrize(("begun", "came"), [("off", "on"), ("on", "off"), ("on", "sharpness")])
def test_a_checkpoint_that_was_begun_with_another_diagnose_is_refused(tmp_path: Path, begun: str, came: str) -> None:
    train_once(Net(), file=tmp_path / "c.pt", diagnose=begun)
    with pytest.raises(SettingError, match=f"diagnose='{begun}', and '{came}' came"):
        train_once(Net(), file=tmp_path / "c.pt", diagnose=came)


def test_a_dense_training_is_diagnosed_over_all_weights_and_told_figures_are_numbers_alone() -> None:
    told: list[dict[str, Any]] = []
    train, _, _ = batches()
    how: dict[str, Any] = {"recipe": "default", "protocol": Protocol(epochs=2, lr=0.05), "diagnose": "on"}
    result = fit(Net(), train, **how, on_epoch=lambda _, figures: told.append(figures))
    check_shape(result, epochs=2, more=set())
    assert [set(figures) for figures in told] == [{"epoch", "train_loss", "validation_accuracy", "lr"}] * 2


def test_another_value_of_diagnose_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownName, match="sharpness"):
        train_once(Net(), diagnose="sharp")
