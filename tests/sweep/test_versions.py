"""Which code a row says that it was made by."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from anymask.config import Bench, Experiment
from anymask.sweep import Runner
from anymask.sweep.compare import versions
from anymask.train import Protocol


@pytest.fixture
def asked_anew() -> Iterator[None]:
    versions.cache_clear()
    yield
    versions.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_a_machine_without_git_says_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ANYMASK_COMMIT", raising=False)
    assert versions()["commit"] is None


@pytest.mark.usefixtures("asked_anew")
def test_a_row_names_the_commit_of_the_code_that_runs_and_not_of_one_made_meanwhile(
    monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path
) -> None:
    bench = Bench(Experiment(data="folder", data_dir=images, validation=0.2, device="cpu"), Protocol(epochs=1))
    monkeypatch.setenv("ANYMASK_COMMIT", "begun")
    Runner(bench, tmp_path)
    monkeypatch.setenv("ANYMASK_COMMIT", "later")
    assert versions()["commit"] == "begun"
