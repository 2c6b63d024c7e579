"""Trainings that end their process by a fault in compiled code, as one of oneDNN did: the plan goes on without them."""

import json
import signal
from pathlib import Path

import pytest

from anymask.cli.sweep import _summary
from anymask.sweep import Outcome, read_plan, sweep
from tests.sweep.plans import DENSELY, PLAN, write_images, write_plan

CRASHING = """
import os, signal
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes=10, channels=3):
        super().__init__(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

    def forward(self, x):
        if self.training:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().forward(x)
"""


def test_what_crashes_fails_in_another_process_each_time_and_the_rest_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing_net.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    one = {"seeds = 2": "seeds = 1\ndense = false", '["random-erk", "snip"]': '"random"', "epochs = 2": "epochs = 1"}
    text = PLAN
    for before, after in one.items():
        text = text.replace(before, after)
    first, block = text.split("[[block]]")
    crashing = block.replace("resnet8-0.25x", "crashing_net:Net").replace(', "tost:ghost_activation,label_smoothing"', "")
    images = write_images(tmp_path / "images")
    plan = read_plan(write_plan(tmp_path / "plan.toml", images, f"{first}[[block]]{crashing}[[block]]{block}"))
    outcome = sweep(plan, tmp_path / "run", computing=DENSELY, workers=2)
    assert (len(outcome.finished), outcome.left, outcome.died) == (2, (), ())
    (failed,) = outcome.failed
    assert (failed.task.cell.model, failed.tries) == ("crashing_net:Net", 2)
    assert failed.reason == "Crashed: its process died by SIGSEGV, of a fault in compiled code; where, is said above"
    lines = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [failed.task.name] * 2


def test_how_a_worker_died_is_said_in_words(tmp_path: Path) -> None:
    said = list(_summary(Outcome((), (), (), died=(-signal.SIGSEGV, -signal.SIGKILL, 7)), tmp_path))
    assert "A worker process died by SIGSEGV, of a fault in compiled code; where, is said above." in said
    assert "A worker process died by SIGKILL, which the system sends when memory is full, among others." in said
    assert "A worker process died with exit code 7." in said
