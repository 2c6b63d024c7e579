"""The help teaches: every command has examples, and they are right."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anymask import Mask
from anymask.cli import main
from anymask.cli.app import COMMANDS, make_app

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    line.strip()
    for command in COMMANDS.values()
    for line in command.more.replace("\\\n", " ").splitlines()
    if line.strip().startswith("anymask ")
]
CHEAP = ("--dry-run", "anymask inspect synflow.mask", "anymask list")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the files that examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text("epochs = 20\n")
    for name in ("my.mask", "snip.mask", "synflow.mask"):
        Mask({"weight": torch.eye(2)}).save(name)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_examples_as_they_are_written_within_80_columns(anymask, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    said = anymask(name, "--help")
    assert said.code == 0
    assert COMMANDS[name].more.strip() in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    assert 2 <= COMMANDS[name].more.count("\n  anymask ") <= 5


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_in_the_help_is_a_command_that_parses(here, example):
    make_app().parse_args(shlex.split(example)[1:], exit_on_error=False, print_error=False)


def test_the_cheap_examples_of_the_help_run_as_they_are_written(anymask, here):
    ran = [example for example in EXAMPLES if any(words in example for words in CHEAP)]
    assert len(ran) >= 5
    for example in ran:
        said = anymask(*shlex.split(example)[1:])
        assert (said.code, said.out != "") == (0, True), said


def test_help_shows_what_stands_under_each_field_of_the_settings(anymask):
    said = anymask("compare", "--help")
    for text in ("Mask methods (also grasp", "The images: fashion-mnist-5k", "Passes over the training images", "default tost best]"):
        assert text in said.out
    panels = [said.out.index(f"─ {title} ─") for title in ("Run", "Grid", "Data and network", "Protocol")]
    assert panels == sorted(panels)


def test_compare_help_says_how_to_add_grasp_and_the_lottery_ticket_and_what_that_costs(anymask):
    said = anymask("compare", "--help")
    assert "grasp lottery" in said.out
    assert "log(1 - sparsity) / log(0.8)" in said.out


def test_the_first_help_and_the_version_come_without_torch():
    code = "import sys; from anymask.cli import main; main(['--help']); main(['--version']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("0.1.0\n")


def test_no_command_shows_the_help(anymask):
    said = anymask()
    assert said.code == 0
    assert "Usage: anymask COMMAND" in said.out


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("masks", ("random-erk", "synflow", "arXiv 2006.05467", "lottery")),
        ("recipes", ("default", "tost", "ToST: LRsI")),
        ("techniques", ("lrsi", "ghost_skip", "arXiv 2206.12755")),
        ("models", ("demonet", "resnet18", "mobilenetv2", "6n + 2")),
        ("data", ("fashion-mnist-5k", "cifar100", "folder")),
    ],
)
def test_list_shows_the_names_with_a_line_about_each(anymask, kind, names):
    said = anymask("list", kind)
    assert said.code == 0
    for name in names:
        assert name in said.out


def test_python_m_anymask_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "anymask", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0.1.0\n")


def test_the_demo_preset_is_three_masks_three_seeds_and_a_dense_reference(capsys):
    assert main(["compare", "--config", str(ROOT / "configs" / "demo.toml"), "--out", "nowhere", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 * (1 + 3 * 2)
    assert {line.split(",")[0] for line in lines} == {"dense", "random-erk 0.98", "snip 0.98", "synflow 0.98"}
