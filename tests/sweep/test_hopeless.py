"""Errors after which nothing that is left can be trained end a sweep: a full disk, a lost GPU, a step that cannot be recorded."""

import errno
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anymask.errors import AnymaskError
from anymask.runlog import Ledger
from anymask.sweep import Cell, Runner, read_plan, sweep
from anymask.sweep.hopeless import check_disk
from anymask.train import checkpoint
from anymask.train.graphs import NotRecordedError
from tests.sweep.plans import CELLS, DENSELY, failing, write_images, write_plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plan(tmp_path_factory.mktemp("plan") / "plan.toml", write_images(tmp_path_factory.mktemp("images")))


def test_a_step_that_cannot_be_recorded_ends_the_sweep_and_is_noted(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(self: Any, cell: Cell, *_: Any, **__: Any) -> None:
        raise NotRecordedError("a step could not be recorded", allowed="others", fix="leave compile at 'off'")

    monkeypatch.setattr(Runner, "train", train)
    with pytest.raises(NotRecordedError):
        sweep(read_plan(plan), tmp_path, computing=replace(DENSELY, compile="graph"))
    assert [row["type"] for row in Ledger(tmp_path / "failures.jsonl").rows()] == ["NotRecordedError"]


@pytest.mark.parametrize("file", [None, "/full/ledger.jsonl"])
def test_a_full_disk_ends_the_sweep_and_is_named(file: str | None, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(Runner, "train", failing(OSError(errno.ENOSPC, "No space left on device", file), tried))
    with pytest.raises(AnymaskError, match=f"No space left on device: {file or tmp_path}"):
        sweep(read_plan(plan), tmp_path, computing=DENSELY)
    assert len(tried) == 1
    assert not (tmp_path / "failures.jsonl").exists()


def test_a_full_disk_is_seen_behind_what_torch_save_says_of_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12 * 1024, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:  # and not RuntimeError, "unexpected pos 64 vs 0"
            checkpoint.save(tmp_path / "c.pt", {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(AnymaskError, match=f"File too large: {tmp_path}"):
        check_disk(raised.value, tmp_path)
    wrapped = RuntimeError("what a library makes of it")
    wrapped.__context__ = raised.value
    with pytest.raises(AnymaskError, match=f"File too large: {tmp_path}"):
        check_disk(wrapped, tmp_path)
    check_disk(RuntimeError("another"), tmp_path)


@pytest.mark.parametrize("lost", [False, True])
def test_a_gpu_that_does_nothing_more_ends_the_sweep(lost: bool, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    tried: list[str] = []
    monkeypatch.setattr(Runner, "train", failing(RuntimeError("CUDA error"), tried))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    if not lost:
        assert len(sweep(read_plan(plan), tmp_path, computing=DENSELY).failed) == CELLS
        return
    with pytest.raises(AnymaskError, match=r"does nothing more in this process \(CUDA error: an illegal memory access was encountered\)"):
        sweep(read_plan(plan), tmp_path, computing=DENSELY)
    assert len(tried) == len(Ledger(tmp_path / "failures.jsonl").rows()) == 1
