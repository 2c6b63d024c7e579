"""Imports go down only, and optional packages are imported where they are used: one module each, inside a function."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anymask

SOURCE = Path(anymask.__file__).parent
PROJECT = Path(__file__).parents[1]
OPTIONAL = {  # package: the one module that may import it
    "plotly": "report/page.py",
    "PIL": "data/images.py",
    "pooch": "data/download.py",
    "msgpack": "formats/packed.py",
    "torch.utils.tensorboard": "train/loop.py",
    "tensorboard": None,
    "lightning": "integrations/lightning.py!",  # whose class is one of theirs, so at the top
    "pytorch_lightning": None,
    "transformers": "integrations/transformers.py!",
    "torchvision": None,
    "onnx": "shipping/onnxfile.py",
    "onnxscript": "shipping/onnxfile.py",
    "onnxruntime": "shipping/onnxfile.py",
    "ray": "sweep/on_ray.py",
}


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


# -- optional packages -------------------------------------------------------------------------------------------------


def imported(nodes: list[ast.AST]) -> set[str]:
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def is_of(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def where(package: str, source: Path) -> list[str]:
    """The files that import `package`, with "!" after the name of one that does so outside its functions."""
    found = []
    for file in sorted(source.rglob("*.py")):
        tree = ast.parse(file.read_text())
        functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {node for function in functions for node in ast.walk(function)}
        everywhere = list(ast.walk(tree))
        if any(is_of(name, package) for name in imported(everywhere)):
            outside = any(is_of(name, package) for name in imported([node for node in everywhere if node not in inside]))
            found.append(file.relative_to(source).as_posix() + "!" * outside)
    return found


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_is_imported_in_one_module_inside_a_function(package):
    assert where(package, SOURCE) == ([OPTIONAL[package]] if OPTIONAL[package] else [])


def test_an_import_elsewhere_or_at_the_top_would_be_seen(copied):
    add(copied / "anymask" / "data/images.py", "\nimport PIL.Image\n")
    add(copied / "anymask" / "mask.py", "\ndef later():\n    from PIL import Image\n")
    assert where("PIL", copied / "anymask") == ["data/images.py!", "mask.py"]
