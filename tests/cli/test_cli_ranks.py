"""The command line under torchrun, on two real processes: one run folder, one voice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from anymask.cli.app import COMMANDS
from anymask.cli.ranks import refused

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo here")
RANK_1_FAILS = """
import os, sys
from anymask.cli import main
from anymask.errors import SettingError
from anymask.train.run import Run

def fail(*_, **__):
    raise SettingError("rank 1 came to its end", allowed="none of this", fix="nothing")

if os.environ["RANK"] == "1":
    Run.end_epoch = fail
sys.exit(main())
"""


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_compare_on_two_ranks_is_one_comparison_with_the_masks_of_one_process(anymask, small, tmp_path):
    command = [
        "compare",
        "--masks",
        "rigl+2it",
        "--sparsity",
        "0.9",
        "--recipes",
        "default",
        "tost",
        "--seeds",
        "1",
        "--epochs",
        "2",
        "--no-dense",
        *small,
    ]
    ours, theirs = tmp_path / "two", tmp_path / "one"
    said = torchrun("-m", "anymask", *command, "--out", ours)
    assert said.returncode == 0, said.stderr
    assert said.stdout == (ours / "table.md").read_text()
    assert [line[:6].strip() for line in said.stderr.splitlines()] == ["2 trai", "[1/2]", "[2/2]", "Table:", "Page:"]
    assert len({row["id"] for row in rows(ours)}) == 2
    assert all(row["machine"]["ranks"] == 2 for row in rows(ours))
    assert (ours / "report.html").exists()
    assert not list((ours / "unfinished").glob("*"))
    assert anymask(*command, "--out", theirs).code == 0
    assert [row["id"] for row in rows(ours)] == [row["id"] for row in rows(theirs)]
    masks = sorted(path.relative_to(ours) for path in (ours / "masks").iterdir())
    assert len(masks) == 1
    assert all((ours / mask).read_bytes() == (theirs / mask).read_bytes() for mask in masks)
    again = anymask(*command, "--out", ours)  # one process goes on from what two have finished
    assert (again.code, again.err.splitlines()[0]) == (0, "2 trainings, 2 finished already")


def test_a_lottery_ticket_is_found_and_trained_by_two_ranks_in_one_folder(small, tmp_path):
    out = tmp_path / "t"
    said = torchrun("-m", "anymask", "train", "--mask", "lottery-rewind", "--sparsity", "0.3", "--epochs", "1", "--out", out, *small)
    assert said.returncode == 0, said.stderr
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "mask.mask", "ledger.jsonl"}
    (row,) = rows(out)
    assert row["density"]["overall"] == pytest.approx(0.7, abs=1e-3)
    assert said.stdout.count("test accuracy") == 1


def test_what_one_rank_meets_is_said_once_and_ends_them_all(small, tmp_path):
    script = tmp_path / "rank_1_fails.py"
    script.write_text(RANK_1_FAILS)
    said = torchrun(script, "train", "--mask", "snip", "--sparsity", "0.9", "--epochs", "1", "--out", tmp_path / "t", *small)
    assert said.returncode == 1  # torchrun's own, which names those of its processes
    assert said.stderr.count("Error: rank 1 came to its end\nAllowed: none of this\nTo do: nothing\n") == 1
    assert "exitcode  : 2 " in said.stderr
    assert "closed by peer" not in said.stderr
    assert not (tmp_path / "t" / "ledger.jsonl").exists()


def test_what_all_ranks_meet_is_said_once():
    said = torchrun("-m", "anymask", "train", "--mask", "snip", "--epochs", "0", "--out", "nowhere")
    assert said.stderr.count("Error: epochs came as 0\nAllowed: a number >= 1\nTo do: set epochs higher\n") == 1
    assert said.stderr.count("\nAllowed: ") == 1
    assert "exitcode  : 2 " in said.stderr


def test_commands_that_train_no_network_are_refused_on_several_ranks():
    said = []
    codes = [refused([command], said.append) for command in COMMANDS]
    assert [command for command, code in zip(COMMANDS, codes, strict=True) if code == 0] == ["compare", "train"]
    assert any("anymask prune was started on several ranks" in text for text in said)
    assert refused([], said.append) == refused(["--help"], said.append) == refused(["trian"], said.append) == 0
