"""Two real processes (gloo, CPU): what one process with twice the batch computes, with the same exact zeros."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from anymask import Recipe
from anymask.techniques import DensityLR
from tests.distributed_worker import mask_of, network, train

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo here")
ROOT = Path(__file__).parents[1]


def two_ranks(scenario: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(ROOT / "tests" / "distributed_worker.py"), scenario, str(folder)]
    done = subprocess.run(
        [*command, *worker], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{scenario}-{rank}.pt", weights_only=True) for rank in range(2)]


def assert_zeros_and_same_ranks(found: list[dict[str, torch.Tensor]]) -> None:
    first, second = found
    mask = mask_of(network())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in mask:
        assert bool((first[name][~mask[name]] == 0).all())
        assert bool((first[name][mask[name]] != 0).any())
        for slot in ("exp_avg", "exp_avg_sq"):
            assert bool((first[f"{slot} of {name}"][~mask[name]] == 0).all())


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2"])
def test_two_ranks_are_one_process_with_twice_the_batch(scenario: str, tmp_path: Path) -> None:
    found = two_ranks(scenario, tmp_path)
    assert_zeros_and_same_ranks(found)
    alone = train(lambda model: model, None)
    start = dict(network().named_parameters())
    for name, value in alone.items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=2e-5)
    assert all(not torch.allclose(alone[name], start[name], rtol=1e-3, atol=2e-5) for name in start)  # it did train


def test_the_scales_of_lrsi_are_the_same_on_ranks_with_other_batches(tmp_path: Path) -> None:
    assert_zeros_and_same_ranks(two_ranks("lrsi", tmp_path))


def test_initial_weights_and_preconditioners_are_those_of_rank_0_whatever_seeds_the_ranks_have(tmp_path: Path) -> None:
    assert_zeros_and_same_ranks(two_ranks("drawn", tmp_path))


def test_steps_of_shards_are_scaled_as_those_of_whole_weights(tmp_path: Path) -> None:
    found = two_ranks("steps", tmp_path)
    assert_zeros_and_same_ranks(found)
    for name, value in train(lambda model: model, None, chosen=Recipe((DensityLR(),))).items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=2e-5)


def test_a_recipe_saved_in_the_middle_goes_on_in_other_processes(tmp_path: Path) -> None:
    two_ranks("save", tmp_path)
    resumed, through = two_ranks("resume", tmp_path), two_ranks("ddp", tmp_path)
    assert_zeros_and_same_ranks(resumed)
    assert all(torch.equal(resumed[0][name], value) for name, value in through[0].items())


def test_what_cannot_work_on_a_model_that_is_spread_is_refused(tmp_path: Path) -> None:
    two_ranks("refusals", tmp_path)
