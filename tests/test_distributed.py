"""Two real processes (gloo, CPU): what one process with twice the batch computes, with the same exact zeros."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

import anymask
from anymask import Recipe
from anymask.techniques import DensityLR
from tests.distributed_worker import batches, mask_of, network, train

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo here")
ROOT = Path(__file__).parents[1]
FIRST, AFTER = ("ddp", "fsdp2", "lrsi", "drawn", "steps", "save", "refitted", "refusals"), ("resume",)
Found = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What both ranks found, by scenario; started once for all, because that takes longer than what they do."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            start(FIRST, folder)
            start(AFTER, folder)
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)] for name in FIRST + AFTER}


def start(scenarios: tuple[str, ...], folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(ROOT / "tests" / "distributed_worker.py"), str(folder), *scenarios]
    done = subprocess.run(
        [*command, *worker], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_zeros_and_same_ranks(both: Found) -> None:
    first, second = both
    mask = mask_of(network())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in mask:
        assert bool((first[name][~mask[name]] == 0).all())
        assert bool((first[name][mask[name]] != 0).any())
        for slot in ("exp_avg", "exp_avg_sq"):
            assert bool((first[f"{slot} of {name}"][~mask[name]] == 0).all())


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2"])
def test_two_ranks_are_one_process_with_twice_the_batch(scenario: str, found: dict[str, Found]) -> None:
    assert_zeros_and_same_ranks(found[scenario])
    alone = train(lambda model: model, None)
    start = dict(network().named_parameters())
    for name, value in alone.items():
        torch.testing.assert_close(found[scenario][0][name], value, rtol=1e-3, atol=2e-5)
    assert all(not torch.allclose(alone[name], start[name], rtol=1e-3, atol=2e-5) for name in start)  # it did train


def test_the_scales_of_lrsi_are_the_same_on_ranks_with_other_batches(found: dict[str, Found]) -> None:
    assert_zeros_and_same_ranks(found["lrsi"])


def test_initial_weights_and_preconditioners_are_those_of_rank_0_whatever_seeds_the_ranks_have(found: dict[str, Found]) -> None:
    assert_zeros_and_same_ranks(found["drawn"])


def test_steps_of_shards_are_scaled_as_those_of_whole_weights(found: dict[str, Found]) -> None:
    assert_zeros_and_same_ranks(found["steps"])
    for name, value in train(lambda model: model, None, chosen=Recipe((DensityLR(),))).items():
        torch.testing.assert_close(found["steps"][0][name], value, rtol=1e-3, atol=2e-5)


def test_a_recipe_saved_in_the_middle_goes_on_in_other_processes(found: dict[str, Found]) -> None:
    assert_zeros_and_same_ranks(found["resume"])
    assert all(torch.equal(found["resume"][0][name], value) for name, value in found["ddp"][0].items())


def test_rank_0_refits_for_all_ranks(found: dict[str, Found]) -> None:
    model = network().eval()
    anymask.reconstruct(model, mask_of(model), data=batches(0))
    for one in found["refitted"]:
        assert all(torch.equal(one[name], value) for name, value in model.named_parameters())


def test_what_cannot_work_on_a_model_that_is_spread_is_refused(found: dict[str, Found]) -> None:
    assert found["refusals"] == [{}, {}]  # else the ranks would have failed
