"""Trainings by recorded steps. On a CPU what is recorded is called again, so all but the CUDA graph itself is held here, bit for bit."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from anymask import Recipe, hold
from anymask.errors import SettingError
from anymask.kernels import available
from anymask.surgery import fingerprint
from anymask.techniques import DensityLR, GhostActivation, Preconditioning
from anymask.train import checkpoint, graphs
from anymask.train.graphs import WARM, NotRecordedError, Recorder
from anymask.train.run import Run
from tests.train.test_fit_compile import stop_in_epoch
from tests.train.trainings import PROTOCOL, RECIPE, Net, mask_of, train_once

SINGLE = replace(PROTOCOL, accumulate=1)
ON = pytest.param("on", marks=pytest.mark.skipif(not available(), reason="no native kernels"))


@pytest.mark.parametrize("sparse", ["off", ON])
@pytest.mark.parametrize("recipe", ["default", RECIPE, Recipe((DensityLR(), Preconditioning(every=5)))], ids=["default", "ghosts", "steps"])
def test_a_recorded_training_is_the_same(recipe: Recipe | str, sparse: str) -> None:
    plain, model = Net(), Net()
    before = fingerprint(model)
    how = {"recipe": recipe, "protocol": SINGLE, "sparse": sparse}
    expected, result = train_once(plain, **how), train_once(model, **how, compile="graph")
    assert result.curves == expected.curves
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert fingerprint(model) == before


def test_most_steps_are_replayed_and_phases_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, warm = [], []
    record, by_itself = Recorder._record, Recorder._by_itself
    monkeypatch.setattr(Recorder, "_by_itself", lambda self, x, y: warm.append(by_itself(self, x, y)))
    monkeypatch.setattr(Recorder, "_record", lambda self, x, y: recorded.append((self._phase, len(x))) or record(self, x, y))
    train_once(Net(), protocol=replace(SINGLE, epochs=40), compile="graph")
    # 7 batches an epoch, of which the last one is smaller: both kinds in each of the four phases.
    assert len(set(recorded)) == len(recorded) == 8
    assert len(warm) == 8 * WARM


def test_steps_in_which_a_technique_looks_are_not_recorded_and_each_is_counted() -> None:
    recipe = Recipe((Preconditioning(every=5),))
    by_hand = []

    class Counted(Recorder):
        def make(self, x: Tensor, y: Tensor, *, phase: object) -> bool:
            by_hand.append(phase is None)
            return super().make(x, y, phase=phase)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anymask.train.run.Recorder", Counted)
        train_once(Net(), recipe=recipe, protocol=SINGLE, compile="graph", sparse="off")
    assert by_hand == [step % 5 == 0 for step in range(35)]


def test_replayed_steps_are_counted() -> None:
    model, data = Net(), torch.ones(4, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = hold(mask_of(model), model, optimizer)
    running = Recipe((Preconditioning(every=5),)).attach(model, optimizer, total_steps=20)
    phases = []
    for step in range(20):
        phases.append(running.recording)
        if phases[-1] is None or step % 5 == 1:  # by hand in the step after a look, as one that warms up
            running.loss(model(data), torch.zeros(4, dtype=torch.long)).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            running.replayed()
        running.step()
    assert [phase is None for phase in phases] == [step % 5 == 0 for step in range(20)]
    assert len({phase for phase in phases if phase is not None}) == 1  # new matrices lie where the first did
    running.finish()
    held.release()


def test_techniques_that_say_nothing_of_recordings_are_never_recorded() -> None:
    recipe = Recipe.preset("best-slow").without("distillation").without("preconditioning")
    assert _phases(recipe)[0] is not None
    from anymask.techniques import HAM

    assert set(_phases(Recipe((HAM(),)))) == {None}


def _phases(recipe: Recipe) -> list[object]:
    found: list[object] = []

    class Noted(Recorder):
        def make(self, x: Tensor, y: Tensor, *, phase: object) -> bool:
            found.append(phase)
            return super().make(x, y, phase=phase)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anymask.train.run.Recorder", Noted)
        train_once(Net(), recipe=recipe, protocol=SINGLE, compile="graph", sparse="off")
    return found


@pytest.mark.parametrize("modes", [("graph", "graph"), ("graph", "off"), ("off", "graph")])
def test_one_that_is_stopped_goes_on_either_way(modes: tuple[str, str], tmp_path: Path) -> None:
    expected = train_once(Net(), protocol=SINGLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anymask.train.run.Run.end_epoch", stop_in_epoch(2))
        with pytest.raises(KeyboardInterrupt):
            train_once(Net(), protocol=SINGLE, compile=modes[0], file=tmp_path / "c.pt")
    assert train_once(Net(seed=9), protocol=SINGLE, compile=modes[1], file=tmp_path / "c.pt").curves == expected.curves


def test_rates_that_are_tensors_are_saved_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_device(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"])
            group["capturable"] = True

    monkeypatch.setattr("anymask.train.run.rates_on_device", on_device)
    result = train_once(Net(), protocol=SINGLE, compile="graph", file=tmp_path / "c.pt")
    groups = torch.load(tmp_path / "c.pt", weights_only=True)["optimizer"]["param_groups"]
    assert all(type(group["lr"]) is float and group["capturable"] is False for group in groups)
    torch.testing.assert_close(result.curves["train_loss"], train_once(Net(), protocol=SINGLE).curves["train_loss"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: {"protocol": PROTOCOL}, "accumulate as 2"),
        (lambda: {"protocol": replace(SINGLE, precision="float16")}, "GradScaler"),
        (lambda: {"protocol": SINGLE, "moving": "rigl"}, "a mask that moves"),
    ],
)
def test_what_cannot_be_recorded_is_refused(change: Callable[[], dict[str, object]], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        train_once(Net(), compile="graph", **change())


def test_all_that_a_recorded_step_reads_and_writes_stays_where_it_is() -> None:
    """A CUDA graph knows addresses, not names."""
    recipe = Recipe((GhostActivation(), DensityLR(), Preconditioning(every=5)))
    places: dict[tuple[object, int], list[dict[str, int]]] = {}
    begun: list[Run] = []
    begin = Run.begin

    class Noted(Recorder):
        def make(self, x: Tensor, y: Tensor, *, phase: object) -> bool:
            made = super().make(x, y, phase=phase)
            if phase is not None and self._kinds[x.shape].made > WARM:
                places.setdefault((phase, len(x)), []).append(_places(begun[0], self._kinds[x.shape]))
            return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anymask.train.run.Recorder", Noted)
        patch.setattr(Run, "begin", lambda self, *args, **how: (begun.append(self), begin(self, *args, **how))[1])
        train_once(Net(), recipe=recipe, protocol=replace(SINGLE, epochs=20), compile="graph", sparse="off", diagnose="on")
    assert len(places) == 4  # two phases of the ghost, two sizes of batches
    for found in places.values():
        assert len(found) > 1
        assert all(place == found[0] for place in found)


def _places(run: Run, kind: object) -> dict[str, int]:
    assert run.hold is not None
    assert run.watch is not None
    assert isinstance(kind, graphs._Kind)
    tensors = {"loss": run.loss, "x": kind.x, "y": kind.y, "squares": run.watch._squares, "steps": run.watch._steps}
    tensors |= {f"weight {name}": tensor for name, tensor in [*run.model.named_parameters(), *run.model.named_buffers()]}
    tensors |= {f"kept {name}": tensor for name, tensor in run.hold._kept.items()}
    for number, state in enumerate(run.optimizer.state.values()):
        tensors |= {f"slot {number} {name}": slot for name, slot in state.items() if isinstance(slot, Tensor)}
    for name, (_, attached) in run.recipe._live.items():
        if name == "preconditioning":
            tensors |= {f"matrix {layer}": matrix for layer, matrix in attached._matrices.items()}
        if name == "ghost_activation":
            tensors["strength"] = attached._haunted.ghosts[0].strength
    assert sum(name.startswith(("kept", "slot", "matrix")) for name in tensors) > 8
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


class _Graph:
    """Stands in for torch.cuda.CUDAGraph in what happens when recording fails, for which there has to be no GPU."""

    def capture_begin(self, *_: object, capture_error_mode: str) -> None:
        pass

    def capture_end(self) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("error", [RuntimeError("not permitted when stream is capturing\nmore"), torch.cuda.OutOfMemoryError("full")])
def test_a_step_that_cannot_be_recorded_says_why(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3, 4))
    steps: list[int] = []

    def step(_x: Tensor, _y: Tensor) -> None:
        steps.append(1)
        if len(steps) > WARM:
            raise error

    recorder = Recorder(step, device="cuda")
    for _ in range(WARM):
        recorder.make(torch.ones(2), torch.ones(2), phase=())
    with pytest.raises(type(error) if isinstance(error, torch.cuda.OutOfMemoryError) else NotRecordedError) as raised:
        recorder.make(torch.ones(2), torch.ones(2), phase=())
    assert str(error).split("\n", maxsplit=1)[0] in str(raised.value)
    assert gc.isenabled()
    assert not torch.backends.cudnn.benchmark


def test_what_compiles_anew_is_not_recorded() -> None:
    """Another training of this process may make torch.compile forget all, between two steps of this one."""
    made, compiled = [], [0]
    recorder = Recorder(lambda _x, _y: made.append(compiled[0]), device="cpu", compiled=lambda: compiled[0])
    recorded = []
    record = recorder._record
    recorder._record = lambda x, y: recorded.append(compiled[0]) or record(x, y)
    for step in range(10):
        if step == WARM:
            compiled[0] += 1
        recorder.make(torch.ones(2), torch.ones(2), phase=())
    assert len(made) == 10
    assert recorded == [1]
    assert made[WARM] == 1


def test_on_a_gpu_checkpoints_take_a_twentieth_of_the_time_and_one_is_there_when_it_is_stopped(tmp_path: Path) -> None:
    saved, epochs = [], []

    def stop(epoch: int, _: object) -> None:
        epochs.append(epoch)
        if epoch == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_dear", lambda self: len(saved) > 0)
        save = checkpoint.save
        patch.setattr(checkpoint, "save", lambda path, state: (saved.append(state["progress"]["step"]), save(path, state))[1])
        with pytest.raises(KeyboardInterrupt):
            train_once(Net(), protocol=SINGLE, file=tmp_path / "c.pt", on_epoch=stop)
    assert saved == [7, 28]
    result = train_once(Net(seed=9), protocol=SINGLE, file=tmp_path / "c.pt")
    assert result.curves == train_once(Net(), protocol=SINGLE).curves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anymask.train.run.ranks", lambda: 2)  # where one rank raises, others may not, and saving is done by all
        Run.save_what_is_new(SimpleNamespace(saved=(0.0, 0.0, -1), step=7, save=None))
    assert not Run._dear(SimpleNamespace(saved=(time.monotonic(), 1.0, 7), device="cpu"))
    assert Run._dear(SimpleNamespace(saved=(time.monotonic() - 10, 1.0, 7), device="cuda"))
    assert not Run._dear(SimpleNamespace(saved=(time.monotonic() - 30, 1.0, 7), device="cuda"))


def test_on_step_is_called_after_each_step() -> None:
    steps: list[int] = []
    count = Run._count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_count", lambda self: (count(self), steps.append(0))[0])
        train_once(Net(), on_step=lambda: steps.append(1))
    assert steps == [0, 1] * 20


def test_without_a_gpu_there_are_no_graphs() -> None:
    assert not Recorder(lambda x, y: None, device="cpu")._cuda
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    graphs.rates_on_device(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
