"""Imports go down only, and an optional package is imported in one module; that it is inside a function ruff sees (TID253)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anymask

SOURCE = Path(anymask.__file__).parent
PROJECT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's contracts of pyproject.toml, on the package that lies in `folder`."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache", "--no-logo"]
    return subprocess.run([*command, "--config", PROJECT / "pyproject.toml"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "anymask", ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    return tmp_path


def add(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_the_contracts_are_kept(copied):
    said = lint(copied)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "Contracts: 2 kept, 0 broken." in said.stdout


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("mask.py", "\nfrom anymask.pruning import prune\n", "anymask.mask is not allowed to import anymask.pruning"),
        ("errors.py", "\ndef later():\n    from anymask import registry\n", "anymask.errors is not allowed to import anymask.registry"),
        ("techniques/base.py", "\nimport anymask.pruning.search\n", "anymask.techniques is not allowed to import anymask.pruning"),
        ("data/batches.py", "\nimport torchvision\n", "anymask.data.batches -> torchvision"),
        ("newcomer.py", "", "anymask.newcomer"),
    ],
)
def test_a_broken_layer_is_reported(copied, file, text, says):
    (copied / "anymask" / file).touch()
    add(copied / "anymask" / file, text)
    said = lint(copied)
    assert said.returncode == 1, said.stdout + said.stderr
    assert says in " ".join(said.stdout.split())
