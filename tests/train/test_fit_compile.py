"""Trainings through torch.compile: the numbers of eager ones but for rounding, compiled once for each phase of the recipe."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.exc import TritonMissing

from anymask import Recipe
from anymask.errors import SettingError, UnknownName
from anymask.kernels import available
from anymask.surgery import fingerprint
from anymask.techniques import Preconditioning
from anymask.train import computing
from tests.train.trainings import PROTOCOL, Net, train_once

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # within torch.compile
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")


REAL = torch.compile


def quiet_net() -> Net:
    """Without dropout, for which torch.compile draws other numbers."""
    model = Net()
    model.drop.p = 0.0
    return model


def compiling_by(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Let another backend than Inductor do it, which takes 5 s for each graph."""
    monkeypatch.setattr(computing.torch, "compile", lambda function, dynamic, mode: REAL(function, dynamic=dynamic, backend=backend))


def check_alike(*, by: str = "on", **how: Any) -> None:
    """A compiled training gives what an eager one gives, and leaves the model plain."""
    eager, model = quiet_net(), quiet_net()
    before = fingerprint(model)
    expected, result = (train_once(net, **how, compile=mode) for net, mode in ((eager, "off"), (model, by)))
    torch.testing.assert_close(result.curves["train_loss"], expected.curves["train_loss"], rtol=1e-3, atol=0)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-2, atol=1e-3, msg=name)
    assert fingerprint(model) == before


@needs_compiler
def test_a_compiled_training_gives_what_an_eager_one_gives() -> None:
    check_alike(recipe="default", protocol=replace(PROTOCOL, epochs=1), sparse="off")


@needs_compiler
def test_so_does_a_recorded_one() -> None:
    check_alike(by="fused", recipe="default", protocol=replace(PROTOCOL, epochs=1, accumulate=1), sparse="off")


def test_so_it_does_recorded_with_ghosts_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling_by(monkeypatch, "aot_eager")
    check_alike(by="fused", protocol=replace(PROTOCOL, accumulate=1), sparse="off")


@pytest.mark.parametrize("sparse", ["off", pytest.param("on", marks=pytest.mark.skipif(not available(), reason="no native kernels"))])
def test_so_it_does_with_ghosts_that_come_and_go(sparse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling_by(monkeypatch, "aot_eager")
    check_alike(sparse=sparse)


def test_so_it_does_with_techniques_that_have_to_see_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling_by(monkeypatch, "aot_eager")
    check_alike(recipe=Recipe((Preconditioning(every=5),)), sparse="off")


@pytest.mark.parametrize("mode", ["on", "fused"])
def test_each_phase_is_compiled_once_and_evaluation_is_not(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []  # of how many images

    def count(graph, inputs):
        graphs.append(next(len(x) for x in inputs if x.shape[2:] == (8, 8)))
        return graph.forward

    compiling_by(monkeypatch, count)
    train_once(Net(), protocol=replace(PROTOCOL, accumulate=1), sparse="off", compile=mode)
    # Whole batches of 16 and not the last one of 8, as the recipe begins and after each of the two kinds of ghosts: at 40% and 70%.
    assert graphs == [16] * 3


def test_a_compiled_training_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling_by(monkeypatch, "eager")
    expected = train_once(Net(), compile="on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anymask.train.run.Run.end_epoch", stop_in_epoch(2))
        with pytest.raises(KeyboardInterrupt):
            train_once(Net(), compile="on", file=tmp_path / "c.pt")
    assert train_once(Net(seed=9), compile="on", file=tmp_path / "c.pt").curves == expected.curves


def stop_in_epoch(number: int):
    from anymask.train.run import Run

    whole = Run.end_epoch

    def end_epoch(self: Run, epoch: int, **how: object) -> None:
        whole(self, epoch, **how)
        if epoch == number:
            raise KeyboardInterrupt

    return end_epoch


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="compile"):
        train_once(Net(), compile="yes")

    def broken(_graph, _inputs):
        raise RuntimeError("no compiler here")

    compiling_by(monkeypatch, broken)
    with pytest.raises(SettingError, match="no compiler here"):
        train_once(Net(), compile="on")

    def without_triton(_graph, _inputs):
        raise TritonMissing(None)

    compiling_by(monkeypatch, without_triton)
    with pytest.raises(SettingError, match=r"(?s)torch.compile failed.*[Tt]riton"):
        train_once(Net(), compile="on")
    monkeypatch.setattr(computing, "ranks", lambda: 2)
    with pytest.raises(SettingError, match="2 ranks"):
        train_once(Net(), compile="on")
