"""What is written down is run: docstrings, the README's Python and commands, and the parts made from ledgers."""

import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import anymask
from anymask.cli import main
from anymask.kernels import available
from anymask.techniques import TECHNIQUES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = [m.name for m in pkgutil.walk_packages(anymask.__path__, "anymask.") if not m.name.endswith("__main__")]
PYTHON = {
    f"{page}-{number}": code
    for page in ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL))
}
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]


NATIVE = {"anymask.kernels.native", "anymask.sparse.converting", "docs/speed.md-0"}  # their examples need the native kernels


def needs_kernels(place: str) -> None:
    if place in NATIVE and not available():
        pytest.skip("the native kernels were not built here (no C compiler)")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_kernels(name)
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_public_functions_and_classes_have_an_example_that_is_run() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    public = {name: getattr(anymask, name) for name in set(anymask.__all__) - {"__version__", "Hold"}}
    for name, thing in {**public, **TECHNIQUES}.items():
        assert finder.find(thing, name)[0].examples, name


@pytest.mark.parametrize("place", PYTHON)
def test_the_python_of_the_pages_runs(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_kernels(place)
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[place], place, "exec"), {})


def test_the_commands_of_the_readme_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = [command for command in COMMANDS if command.startswith("anymask ")]
    assert ours
    for command in ours:
        assert main(shlex.split(command)[1:]) == 0, command


def test_every_other_command_of_the_readme_is_a_target_of_the_makefile() -> None:
    others = [command for command in COMMANDS if not command.startswith("anymask ")]
    assert others == ["make demo", "make test"]
    for command in others:
        dry = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert dry.stdout


def test_the_demo_is_settled_and_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--config", str(ROOT / "configs" / "demo.toml"), "--out", "nowhere", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for mask in ("random-erk", "snip", "synflow", "dense"):
        assert mask in shown


def test_parts_made_from_ledgers_are_up_to_date() -> None:
    made = subprocess.run([sys.executable, ROOT / "tools" / "make_docs.py", "--check"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr


def test_links_inside_the_repository_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
