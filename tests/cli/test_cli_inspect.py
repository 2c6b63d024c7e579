"""`anymask inspect` of masks: what they keep, what they cut off, what they have in common, and the page."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import save_file

from anymask import Mask, models, prunable
from anymask.connectivity import reachable
from tests.cli.test_cli_mistakes import check

MODEL = "resnet8-0.25x"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """one.mask and two.mask, of two layers each, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Mask({"a": torch.tensor([[1, 1], [0, 0]]), "b": torch.zeros(5)}, info={"method": "mine", "kinds": ["x", "y"]}).save("one.mask")
    Mask({"a": torch.tensor([[1, 0], [1, 0]]), "b": torch.ones(5)}).save("two.mask")
    return tmp_path


def made(sparsity, seed=0, **info):
    """A random mask of `MODEL` with 7 classes for grey images."""
    random = torch.Generator().manual_seed(seed)
    weights = prunable(models.build(MODEL, classes=7, channels=1))
    return Mask({name: torch.rand(w.shape, generator=random) >= sparsity for name, w in weights.items()}, info=info)


def cells(text):
    """The fields of all lines of all tables."""
    return [[word.strip() for word in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def test_it_shows_what_is_kept_layer_by_layer(anymask, here):
    said = anymask("inspect", "one.mask")
    assert cells(said.out) == [
        ["a", "2 x 2", "2", "4", "50.00%", "1/2", "2/2", "1", ""],
        ["b", "5", "0", "5", "0.00%", "0/5", "0/1", "5", ""],
        ["all", "", "2", "9", "22.22%", "", "", "6", ""],
    ]
    assert "Sparsity 77.7778%, 2 of 9 weights kept; 6 of 7 filters dead.\n" in said.out
    assert "nothing passes, in: b" in said.out
    assert "Made by: method mine, kinds x y\n" in said.out


def test_two_masks_are_compared_layer_by_layer(anymask, here):
    said = anymask("inspect", "one.mask", "two.mask")
    assert cells(said.out)[6:] == [
        ["a", "1", "3", "0.333", "2", "0.500"],
        ["b", "0", "5", "0.000", "5", "0.000"],
        ["all", "1", "8", "0.125", "7", "0.222"],
    ]


def test_of_more_masks_each_pair_is_compared(anymask, here):
    (here / "more").mkdir()
    Mask({"a": torch.ones(2, 2), "b": torch.zeros(5)}).save("more/one.mask")
    said = anymask("inspect", "one.mask", "two.mask", "more/one.mask")
    assert cells(said.out)[-3:] == [
        ["(1) one.mask", "1.000", "0.125", "0.500"],
        ["(2) two.mask", "0.125", "1.000", "0.222"],
        ["(3) more/one.mask", "0.500", "0.222", "1.000"],
    ]


def test_masks_of_different_networks_are_refused_before_anything_is_shown(anymask, here):
    Mask({"a": torch.ones(4)}).save("other.mask")
    for files in (("one.mask", "other.mask"), ("one.mask", "two.mask", "other.mask")):
        check(anymask("inspect", *files), "not the same in both: a, b")


def test_a_network_that_the_mask_names_tells_what_is_unreachable(anymask, tmp_path):
    mask = made(0.97, network={"model": MODEL, "classes": 7, "input": [1, 28, 28]})
    mask.save(tmp_path / "my.mask")
    found = reachable(mask, models.build(MODEL, classes=7, channels=1), torch.zeros(1, 1, 28, 28))
    assert found.kept < mask.kept
    said = anymask("inspect", tmp_path / "my.mask")
    shown = {line[0]: line[-1] for line in cells(said.out)}
    assert shown == {
        **{name: str(int(mask[name].sum() - found[name].sum())) for name in mask},
        "all": str(mask.kept - found.kept),
    }
    assert f"effective sparsity {100 * found.sparsity:.6g}%, as {mask.kept - found.kept} kept weights lie on no path" in said.out
    assert f"Network: {MODEL}, 7 classes, input 1 x 28 x 28\n" in said.out


def test_a_network_on_the_command_line_goes_before_the_one_in_the_file(anymask, tmp_path):
    mask = made(0.97, network={"model": MODEL, "classes": 7, "input": [1, 28, 28]})
    mask.save(tmp_path / "my.mask")
    said = anymask("inspect", tmp_path / "my.mask", "--model", MODEL, "--input", 1, 4, 4)
    assert f"Network: {MODEL}, 7 classes, input 1 x 4 x 4\n" in said.out
    found = reachable(mask, models.build(MODEL, classes=7, channels=1), torch.zeros(1, 1, 4, 4))
    assert cells(said.out)[-1][-1] == str(mask.kept - found.kept)


def test_a_file_of_elsewhere_is_matched_with_the_network_that_is_given(anymask, tmp_path):
    model = models.build(MODEL, classes=7, channels=1, seed=0)
    made(0.9).apply(model)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()} | {"steps": torch.zeros(1)}
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    for path in (folder, folder / "model.safetensors"):
        said = anymask("inspect", path, "--model", MODEL, "--input", 1, 28, 28)
        assert said.code == 0, said.err
        assert {line[0] for line in cells(said.out)} == {"all", *made(0.9)}
        assert f"Network: {MODEL}, 7 classes" in said.out


def test_without_a_network_it_says_how_to_give_it(anymask, here):
    assert "Unreachable weights need the network, which this file does not name: give --model NAME --input C H W\n" in (
        anymask("inspect", "one.mask").out
    )


@pytest.mark.parametrize(
    "said_of_itself",
    [
        {"model": "nonsense", "classes": 7, "input": [1, 28, 28]},
        {"model": MODEL, "classes": 9, "input": [1, 28, 28]},
        {"model": MODEL, "classes": 7, "input": [1, 10**6, 10**6]},
        {"model": "resnet20-999x", "classes": 10**9, "input": [1, 28, 28]},
        {"model": MODEL, "classes": 7, "input": [1, 28]},
        {"model": MODEL, "classes": True, "input": [1, 28, 28]},
        {"model": MODEL, "classes": 7, "input": "1 28 28"},
        {"model": 8, "classes": 7, "input": [1, 28, 28]},
        ["demonet"],
    ],
    ids=json.dumps,
)
def test_a_network_in_a_file_that_cannot_be_used_is_not_believed(anymask, tmp_path, said_of_itself):
    made(0.5, network=said_of_itself).save(tmp_path / "my.mask")
    said = anymask("inspect", tmp_path / "my.mask")
    assert said.code == 0
    assert cells(said.out)[-1][-1] == ""
    assert "Unreachable weights" in said.out


WRONG = [
    ("inspect one.mask --model resnt20 --input 3 32 32", "resnet20"),
    ("inspect one.mask --model resnet20 --input 3 32 32", "not in the model: a"),
    ("inspect one.mask --model resnet20", "--model came without --input"),
    ("inspect one.mask --input 3 32 32", "--input came without --model"),
    ("inspect one.mask --model resnet20 --input 3 32", "--input requires 3"),
    ("inspect one.mask --model resnet20 --input 3 32.5 32", "a whole number"),
    ("inspect one.mask --model resnet20 --input 3 0 32", "the input came as 3 0 32"),
    ("inspect one.mask --model resnet20 --input 3 4000 4000", "at most 1,048,576"),
    ("inspect one.mask one.mask", "one.mask came twice"),
    ("inspect one.mask --out two.mask", "ends in .html"),
    ("inspect . --out page.html", "no such ledger: ledger.jsonl"),
    ("inspect ledger.jsonl --out page.html", "--out came without a mask file"),
    ("inspect ledger.jsonl --model resnet20 --input 3 32 32", "--model came without a mask file"),
]


@pytest.mark.parametrize(("command", "named"), WRONG)
def test_what_is_wrong_is_named(anymask, here, command, named):
    if "ledger.jsonl" in command:
        (here / "ledger.jsonl").touch()
    before = {path: path.read_bytes() for path in here.iterdir()}
    check(anymask(*command.split()), named)
    assert {path: path.read_bytes() for path in here.iterdir()} == before


def test_the_page_lies_beside_the_first_mask_or_where_it_is_told(anymask, here):
    said = anymask("inspect", "one.mask", "two.mask", "--page")
    assert (said.code, said.err) == (0, "Page: one.html\n")
    assert "one.mask and two.mask" in (here / "one.html").read_text()
    assert anymask("inspect", "two.mask", "--out", "new/my.html").code == 0
    assert {path.name for path in here.iterdir()} == {"one.mask", "two.mask", "one.html", "new"}
    assert (here / "new" / "my.html").is_file()


def test_a_page_that_is_there_is_only_replaced_when_told_so(anymask, here):
    (here / "one.html").write_text("mine")
    for words in (["one.mask", "--page"], ["two.mask", "--out", "one.html"]):
        check(anymask("inspect", *words), "one.html is there already", "--force")
    assert (here / "one.html").read_text() == "mine"
    assert anymask("inspect", "one.mask", "--page", "--force").code == 0
    assert (here / "one.html").read_text() != "mine"


def test_without_plotly_the_masks_are_shown_and_what_to_install_is_said(anymask, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    said = anymask("inspect", "one.mask", "--page")
    assert said.code == 2
    assert "22.22%" in said.out
    assert "pip install 'anymask[report]'" in said.err
    assert not (here / "one.html").exists()


def test_no_number_is_cut_where_lines_are_short(anymask, tmp_path, monkeypatch):
    made(0.9, network={"model": MODEL, "classes": 7, "input": [1, 28, 28]}).save(tmp_path / "my.mask")
    monkeypatch.setenv("COLUMNS", "60")
    assert "…" not in anymask("inspect", tmp_path / "my.mask").out  # off a terminal: as wide as it has to be
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    said = anymask("inspect", tmp_path / "my.mask").out
    assert "…" not in said
    assert max(map(len, re.sub(r"\x1b\[[\d;]*m", "", said).splitlines())) <= 60
