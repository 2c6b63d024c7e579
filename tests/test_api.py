"""The public face: exact names, and an import that does no work."""

import subprocess
import sys
from pathlib import Path

import pytest

import anymask

NAMES = [
    "Diagnostics",
    "Hold",
    "Mask",
    "Recipe",
    "Rewiring",
    "__version__",
    "fit",
    "hold",
    "load",
    "load_mask",
    "prunable",
    "prune",
    "reconstruct",
    "rewire",
    "ship",
    "to_dense",
    "to_semi_structured",
    "to_sparse",
]
# torch alone takes a second to import: nothing that a command line's --help does not need may come with the package
HEAVY = ["torch", "numpy", "scipy", "safetensors", "plotly", "rich", "cyclopts", "yaml", "PIL", "pooch", "tensorboard", "torchvision"]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_names_are_exactly_these():
    assert anymask.__all__ == NAMES
    assert [name for name in dir(anymask) if name in NAMES] == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_each_name_is_the_object_of_that_name(name):
    found = getattr(anymask, name)
    assert callable(found)
    assert found.__name__ == name
    assert found.__module__.startswith("anymask.")
    assert found.__doc__


def test_every_name_is_right_whatever_was_imported_before():
    names = "[name for name in anymask.__all__ if not callable(getattr(anymask, name))]"
    code = f"from anymask import *; import anymask, anymask.cli, anymask.sweep; print({names})"
    assert python(code) == "['__version__']"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = anymask.prun


def test_the_import_does_no_work():
    code = "import sys, anymask; dir(anymask); print([m for m in sys.modules if m.startswith('anymask')])"
    assert python(code) == "['anymask.version', 'anymask']"


def test_the_import_brings_nothing_heavy():
    assert python(f"import sys, anymask; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_holding_a_mask_needs_torch_only():
    code = "import sys; from anymask import Hold, Mask, hold, prunable; print([m for m in {} if m in sys.modules])"
    assert python(code.format([name for name in HEAVY if name not in {"torch", "numpy"}])) == "[]"


def test_the_version_is_that_of_the_project():
    lines = (Path(__file__).parent.parent / "pyproject.toml").read_text().splitlines()
    assert f'version = "{anymask.__version__}"' in lines
