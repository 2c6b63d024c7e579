"""One training on two real processes (gloo, CPU): what one process finds, and resumed with another number of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from anymask.kernels import available
from anymask.train import Protocol
from anymask.train.spread import Spread
from tests.train.spread_worker import FEW, LATER, MIDDLE, demo, still, stopping, taught, train
from tests.train.trainings import Net

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo here")
ROOT = Path(__file__).parents[2]
Found = list[dict[str, Any]]


def on_two_ranks(part: str, folder: Path) -> Found:
    """What both ranks found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.train.spread_worker"]
    where = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": where}
    done = subprocess.run([*command, part, str(folder)], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr.partition("torch.distributed.elastic")[0][-4000:]
    assert "Warning" not in done.stderr
    return [torch.load(folder / f"{part}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["mask"] == theirs["mask"]
    for name, value in theirs["state"].items():
        torch.testing.assert_close(ours["state"][name], value, rtol=1e-3, atol=2e-5, msg=lambda said, name=name: f"{name}: {said}")
    assert ours["curves"]["train_loss"] == pytest.approx(theirs["curves"]["train_loss"], rel=1e-4)
    assert ours["curves"]["validation_accuracy"] == pytest.approx(theirs["curves"]["validation_accuracy"], abs=1.5 / 41)


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert all(torch.equal(ours["state"][name], value) for name, value in theirs["state"].items())
    assert {**ours, "state": None} == {**theirs, "state": None}


def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    how: dict[str, Any] = {"checkpoint_every": 1}
    whole = train(still())
    with stopping(MIDDLE):
        train(still(), checkpoint_file=tmp_path / "one-two-one.pt", **how)
    found = on_two_ranks("first", tmp_path)
    for name in found[0]:  # every rank has the very same weights, mask and results
        same({**found[0][name], "asked": 0}, {**found[1][name], "asked": 0})
    ours = found[0]
    _the_numbers_are_those_of_one_process(ours, whole)
    same(ours["stopped"], ours["undisturbed"])
    _batch_norm_and_dropout_train_as_well(ours)
    if available():
        assert ours["sparse"]["sparse_layers"] == ours["auto"]["sparse_layers"] == 3
        close(ours["sparse"], whole)
        close(ours["auto"], whole)
        assert (ours["auto"]["asked"], found[1]["auto"]["asked"]) == (3, 0)

    close(train(still(), checkpoint_file=tmp_path / "one-two-one.pt", **how), whole)
    with stopping(LATER):
        train(still(), checkpoint_file=tmp_path / "two-one-two.pt", **how)
    again = on_two_ranks("second", tmp_path)
    same(*(found["two-one-two"] for found in again))
    close(again[0]["two-one-two"], whole)


def _the_numbers_are_those_of_one_process(ours: dict[str, Any], whole: dict[str, Any]) -> None:
    start = still().state_dict()
    assert all(not torch.allclose(value, start[name], rtol=1e-2, atol=1e-3) for name, value in whole["state"].items())  # it did train
    close(ours["still static"], whole)
    close(ours["still rigl"], train(still(), moving="rigl"))
    assert ours["still rigl"]["mask"] != ours["still static"]["mask"]
    close(ours["few"], train(still(), count=FEW))
    close(ours["taught"], taught())
    close(ours["adamw"], train(still(), protocol=Protocol(epochs=2, batch_size=16, optimizer="adamw", lr=2e-3)))


def _batch_norm_and_dropout_train_as_well(ours: dict[str, Any]) -> None:
    alone = demo()
    assert ours["demo"]["mask"] == alone["mask"]
    assert ours["demo"]["accuracies"]["test"] == pytest.approx(alone["accuracies"]["test"], abs=0.04)
    assert ours["undisturbed"]["accuracies"]["test"] > 0.6


def test_a_process_alone_has_nothing_to_share() -> None:
    model = Net()
    spread, loss = Spread(model), torch.tensor(3.0)
    spread.begin()
    x, y = torch.ones(4, 1), torch.ones(4)
    assert spread.part(x, y) == (x, y, 1.0)
    spread.agree(loss)
    assert (spread.network, float(loss)) == (model, 3.0)
    before = torch.get_rng_state()
    spread.draw(0, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_parts_of_a_batch_are_all_of_it_and_their_weights_are_one_on_average() -> None:
    for ranks in (2, 3, 8):
        for count in (1, ranks, 2 * ranks - 1, 2 * ranks, 2 * ranks + 1, 64):
            x, y, parts = torch.arange(count)[:, None], torch.arange(count), []
            for rank in range(ranks):
                spread = Spread(Net())
                spread.rank, spread.ranks = rank, ranks
                parts.append(spread.part(x, y))
            assert sum(weight for _, _, weight in parts) == pytest.approx(ranks)
            assert all(torch.equal(a[:, 0], b) for a, b, _ in parts)
            if count < 2 * ranks:
                assert all(torch.equal(b, y) for _, b, _ in parts)
            else:
                assert torch.equal(torch.cat([b for _, b, _ in parts]), y)
                assert all(len(b) >= 2 and weight == pytest.approx(len(b) * ranks / count) for _, b, weight in parts)
