"""What the user can mend is said in three lines on stderr, with exit code 2 and the nearest right name."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anymask import Mask
from anymask.cli.errors import explain, is_out_of_memory
from anymask.cli.outcome import writable

MISTAKES = [
    ("compar", "compare"),
    ("--versoin", "--version"),
    ("compare --epoch 3", "--epochs"),
    ("compare --epoch=3", "--epochs"),
    ("compare --masks synflw", "synflow"),
    ("compare --masks snip,grsp", "grasp"),
    ("compare --recipes tst", "tost"),
    ("compare --recipes tost:lrs", "lrsi"),
    ("compare --data fashion --dry-run", "fashion-mnist"),
    ("compare --optimizer sdg", "sgd"),
    ("compare --precision float3", "float32"),
    ("train --mask snp --out t", "snip"),
    ("train --mask snip --recipe tots --out t", "tost"),
    ("prune snp --sparsity 0.9 --out m.mask", "snip"),
    ("prune snip --sparsity 0.9 --model resnt18 --out m.mask", "resnet18"),
    ("compare --sparse outo --dry-run", "auto"),
    ("train --mask snip --sparse offf --out t", "off"),
    ("list mask", "masks"),
]
WRONG = [
    ("compare extra", "extra"),
    ("compare --epochs", "--epochs"),
    ("compare --epochs x", "'x'"),
    ("compare --epochs 2.5", "2.5"),
    ("compare --epochs 0", "epochs came as 0"),
    ("compare --masks", "--masks"),
    ("compare --sparsity 1.5", "1.5"),
    ("compare --sparsity much", "much"),
    ("compare --warmup 5", "'5'"),
    ("compare --device warp:1 --dry-run", "warp:1"),
    ("compare --data cifar10 --data-dir /nowhere --dry-run", "/nowhere"),
    ("compare --config nowhere.toml", "nowhere.toml"),
    ("inspect", "without a file"),
    ("inspect nowhere.mask", "nowhere.mask"),
    ("inspect nowhere/ledger.jsonl", "nowhere/ledger.jsonl"),
    ("prune snip --sparsity 0.9", "--out"),
    ("train --mask dense --sparsity 0.9 --out t", "0.9"),
    ("train --mask dense --sparse on --out t", "without a mask"),
    ("train --mask rigl --sparse on --out t", "with a mask that moves"),
    ("compare --masks snip gmp --sparse on", "with a mask that moves"),
    ("compare --precision bfloat16 --sparse on --dry-run", "with precision bfloat16"),
    ("compare --clip inf --dry-run", "0 for none"),
    ("compare --lr inf --dry-run", "lr came as inf"),
    ("compare --masks= --dry-run", "--masks came empty"),
    ("compare --sparsity= --dry-run", "--sparsity came empty"),
    ("compare --first-seed 18446744073709551616 --dry-run", "seed came as 18446744073709551616"),
    ("train --mask snip --seed 18446744073709551616 --out t", "seed came as 18446744073709551616"),
    ("train --mask snip --seed -1 --out t", "seed came as -1"),
    ("prune snip+erk --scope uniform --sparsity 0.9 --out m.mask", "scope came as 'uniform' with snip+erk"),
    ("prune lottery+2:4 --pattern 4x1 --out m.mask", "pattern came as '4x1' with lottery+2:4"),
]


def check(said, *words):
    """Three lines, exit code 2, nothing on stdout; each of `words` is in them."""
    assert said.code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    error = said.err[said.err.index("Error: ") :].splitlines()
    assert [line.split(":")[0] for line in error] == ["Error", "Allowed", "To do"]
    for word in words:
        assert word in said.err


@pytest.mark.parametrize(("command", "nearest"), MISTAKES)
def test_a_name_mistyped_is_answered_with_the_nearest(anymask, tmp_path, monkeypatch, command, nearest):
    monkeypatch.chdir(tmp_path)
    said = anymask(*command.split())
    check(said, "unknown", "did you mean")
    assert nearest in said.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "named"), WRONG)
def test_a_wrong_value_is_named(anymask, tmp_path, monkeypatch, command, named):
    monkeypatch.chdir(tmp_path)
    check(anymask(*command.split()), named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["/proc/nothing/new", "a.toml/new"])
@pytest.mark.parametrize("command", ["sweep a.toml", "compare", "train --mask snip", "prune snip --sparsity 0.5"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(anymask, tmp_path, monkeypatch, command, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text("[[block]]\n")
    file = "/x.mask" if command.startswith("prune") else ""
    check(anymask(*command.split(), "--out", out + file), f"--out came as {out}, where nothing can be written")
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml"]


@pytest.mark.parametrize("command", ["sweep a.toml", "study a.toml", "compare", "train --mask snip", "prune snip", "report"])
def test_an_out_that_is_empty_is_not_taken_for_the_current_folder(anymask, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    check(anymask(*command.split(), "--out", ""), "--out came empty")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_be_made_is_left_to_whoever_writes(tmp_path):
    writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


FILES = {
    "key.toml": (b"epoch = 3\n", ("epoch", "did you mean 'epochs'", "key.toml")),
    "key.yaml": (b"mask: [snip]\n", ("did you mean 'masks'", "key.yaml")),
    "nested.toml": (b"[protocol]\nepochs = 3\n", ("protocol",)),
    "config.toml": (b'config = "other.toml"\n', ("config",)),
    "type.toml": (b'epochs = "many"\n', ("--epochs", "'many'")),
    "float.yaml": (b"epochs: 2.5\n", ("2.5",)),
    "list.toml": (b"epochs = [1, 2]\n", ("epochs", "list.toml")),
    "table.toml": (b"epochs = { a = 1 }\n", ("epochs", "table.toml")),
    "bool.toml": (b'dense = "maybe"\n', ("maybe", "bool.toml")),
    "null.yaml": (b"epochs:\n", ("epochs", "null.yaml")),
    "date.toml": (b"epochs = 2020-01-01\n", ("epochs", "date.toml")),
    "nan.toml": (b"lr = nan\n", ("nan",)),
    "damaged.toml": (b"epochs = = 3\n", ("damaged.toml", "line 1")),
    "twice.yaml": (b"epochs: 2\nepochs: 3\n", ("twice.yaml", "epochs is there twice")),
    "damaged.yaml": (b"a: b\nepochs: [\n", ("damaged.yaml", "line 3")),
    "binary.toml": (b"\xff\xfe\x00", ("binary.toml",)),
    "sequence.yaml": (b"- 3\n", ("sequence.yaml",)),
    "code.yaml": (b"epochs: !!python/object/apply:os.system ['touch owned']\n", ("code.yaml",)),
    "deep.toml": (b"a = " + b"[" * 9000, ("deep.toml",)),
    "deep.yaml": (b"[" * 2000, ("deep.yaml",)),
    "settings.json": (b"{}", ("settings.json", ".toml")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_settings_that_is_wrong_is_said_to_be(anymask, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    check(anymask("compare", "--config", name, "--dry-run"), *words)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing in it was run


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_said_to_be(anymask, tmp_path):
    (tmp_path / "mine.toml").write_text("epochs = 3\n")
    (tmp_path / "mine.toml").chmod(0)
    check(anymask("compare", "--config", tmp_path / "mine.toml"), "Permission denied", "mine.toml")


def test_a_folder_instead_of_a_file_is_said_to_be(anymask, tmp_path):
    (tmp_path / "folder.toml").mkdir()
    check(anymask("compare", "--config", tmp_path / "folder.toml"), "folder.toml")
    (tmp_path / "file").write_text("")
    check(anymask("prune", "random", "--sparsity", "0.9", "--out", tmp_path / "file" / "m.mask"), str(tmp_path / "file"))


@pytest.mark.parametrize("damage", ["junk", "cut", "empty", "header"])
def test_a_damaged_mask_file_is_refused_wherever_it_is_given(anymask, tmp_path, damage):
    path = tmp_path / "my.mask"
    Mask({"weight": torch.eye(8)}).save(path)
    whole = path.read_bytes()
    path.write_bytes({"junk": b"\x80\x04junk" * 50, "cut": whole[:-1], "empty": b"", "header": b"\xff" * 8 + whole[8:]}[damage])
    for command in (("inspect", path), ("train", "--mask", path, "--out", tmp_path / "t")):
        check(anymask(*command), "my.mask", "anymask-mask-1")


def test_a_damaged_ledger_is_refused_and_named(anymask, tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"id": "a"}\nnot json\n')
    check(anymask("inspect", tmp_path), "line 2")
    (tmp_path / "ledger.jsonl").write_text('{"id": "a"}\n')
    check(anymask("inspect", tmp_path))


def test_a_file_that_is_there_is_only_replaced_when_told_so(anymask, tmp_path, small):
    out = tmp_path / "m.mask"
    out.write_text("mine")
    command = ("prune", "random", "--sparsity", "0.9", "--out", out, *small)
    check(anymask(*command), "m.mask", "--force")
    assert out.read_text() == "mine"
    assert anymask(*command, "--force").code == 0
    assert "90.00%" not in out.read_text(errors="replace")


def test_memory_that_runs_out_is_told_from_a_bug():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert "--batch-size" in explain(caught.value)
    assert not is_out_of_memory(RuntimeError("a bug of ours"))


def test_a_full_disk_is_said_to_be_and_what_is_kept():
    assert "what was finished is kept" in explain(OSError(errno.ENOSPC, "No space left on device"))


def test_a_sparsity_beside_mask_files_alone_is_refused(anymask, tmp_path):
    Mask({"fc.weight": torch.ones(10, 4)}).save(tmp_path / "m.mask")
    check(anymask("compare", "--masks", tmp_path / "m.mask", "--sparsity", 0.5, "--dry-run"), "--sparsity", "a file has its own")


def test_a_reader_that_has_left_is_no_error():
    command = f"{sys.executable} -m anymask compare --dry-run | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (141, "")
    assert "Error" not in done.stderr


def test_a_mistake_in_a_process_of_its_own_exits_with_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "anymask", "compar"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean compare" in done.stderr
    assert "Traceback" not in done.stderr
