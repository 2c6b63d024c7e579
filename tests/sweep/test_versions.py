"""Which code a row says that it was made by."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from anymask.sweep.compare import versions


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
def test_a_row_names_the_commit_of_the_code_that_runs_and_not_of_one_made_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYMASK_COMMIT", "begun")
    assert versions()["commit"] == "begun"
    monkeypatch.setenv("ANYMASK_COMMIT", "later")
    assert versions()["commit"] == "begun"
