"""Threads that take turns: one runs at a time, in order, each with random numbers of its own, until one fails or all are told to end."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.eval_frame

from anymask import Mask, Recipe, hold
from anymask.pauses import pauses
from anymask.sweep.run import Stopped
from anymask.sweep.turns import Turns, taking_turns
from anymask.techniques import Preconditioning
from anymask.techniques.rescale import RescaleSettings, rescale
from anymask.train import accuracy, checkpoint


def test_one_runs_at_a_time_and_all_come_round() -> None:
    inside: list[int] = []
    order: list[int] = []
    begun: list[int] = []

    def work(turns: Turns) -> None:
        begun.append(1)
        while len(begun) < 3:
            turns.rest(0.0)
        for _ in range(24):
            inside.append(1)
            assert len(inside) == 1
            order.append(threading.get_ident())
            inside.pop()
            turns.step()

    taking_turns(work, 3, device="cpu")
    turns = [order[at] for at in range(0, 72, 8)]
    assert order == [name for name in turns for _ in range(8)]
    assert turns[:3] == turns[3:6] == turns[6:]


def test_each_draws_what_it_would_draw_alone() -> None:
    drawn: dict[int, list[float]] = {}

    def work(turns: Turns) -> None:
        seed = len(drawn)
        drawn[seed] = []
        torch.manual_seed(seed)
        for _ in range(20):
            drawn[seed].append(float(torch.rand(())))
            turns.rest(0.0)

    with torch.random.fork_rng(devices=[]):
        taking_turns(work, 3, device="cpu")
        for seed, numbers in drawn.items():
            torch.manual_seed(seed)
            assert numbers == [float(torch.rand(())) for _ in range(20)]


def test_what_one_raises_ends_the_others() -> None:
    ended: list[str] = []

    def work(turns: Turns) -> None:
        try:
            turns.rest(0.1)
            if not ended:
                ended.append("first")
                raise MemoryError
            while True:
                turns.step()
        except Stopped:
            ended.append("other")
            raise

    with pytest.raises(MemoryError):
        taking_turns(work, 3, device="cpu")
    assert ended == ["first", "other", "other"]


def test_who_has_not_begun_does_not_begin_when_all_are_to_end() -> None:
    begun: list[int] = []

    def work(turns: Turns) -> None:
        begun.append(1)
        if len(begun) == 1:
            threading.Event().wait(0.1)  # until the others wait
        turns.stopped = True
        raise MemoryError

    with pytest.raises(MemoryError):
        taking_turns(work, 3, device="cpu")
    assert begun == [1]


def test_who_rests_lets_others_run() -> None:
    log: list[str] = []

    def work(turns: Turns) -> None:
        if not log:
            log.append("rests")
            turns.rest(0.1)
            log.append("rested")
        else:
            log.append("runs")

    taking_turns(work, 2, device="cpu")
    assert log == ["rests", "runs", "rested"]


def test_who_computes_aside_lets_others_run_and_draws_on_as_if_alone() -> None:
    log: list[str] = []
    drawn: list[float] = []

    def work(turns: Turns) -> None:
        first = not log
        log.append("begins")
        if first:
            torch.manual_seed(1)
            with turns.aside():
                for _ in range(1000):
                    if "others" not in log:
                        threading.Event().wait(0.01)
                log.append("back")
            drawn.append(float(torch.rand(())))
        else:
            torch.manual_seed(2)
            torch.rand(5)
            log.append("others")

    with torch.random.fork_rng(devices=[]):
        taking_turns(work, 2, device="cpu")
        assert log == ["begins", "begins", "others", "back"]
        torch.manual_seed(1)
        assert drawn == [float(torch.rand(()))]


def test_no_turn_is_passed_on_where_torch_compile_is_kept_out() -> None:
    """Which is so for the whole process: others would be kept out, too, and the one that leaves last would put back what it found."""
    stances: list[str] = []

    def pause() -> None:
        stances.append(torch._dynamo.eval_frame._stance.stance)

    @contextmanager
    def aside() -> Iterator[None]:
        pause()
        yield

    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = hold(Mask({"weight": torch.ones(2, 4)}), model, optimizer)
    forward = torch.compile(model, backend="eager")
    with pauses(pause, aside), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
        running = Recipe((Preconditioning(every=2),)).attach(model, optimizer, total_steps=4)
        for _ in range(4):
            with running.watched():
                forward(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            running.step()
    assert len(stances) == 4  # in each of two looks before the forward pass, and for the roots
    assert set(stances) == {"default"}
    held.release()
    torch.compiler.reset()


def test_work_that_fails_aside_ends_all_with_its_error() -> None:
    def work(turns: Turns) -> None:
        with turns.aside():
            raise MemoryError

    with pytest.raises(MemoryError):
        taking_turns(work, 2, device="cpu")


def test_the_work_of_techniques_before_a_training_passes_turns_on() -> None:
    """Else the GPU would wait for the seconds in which one training learns its scales."""
    passed: list[int] = []
    rested = Turns.rest
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    images, settings = [(x, torch.arange(4) % 2)], RescaleSettings(iterations=4)

    def rest(turns: Turns, seconds: float) -> None:
        assert torch.backends.cuda.flash_sdp_enabled()  # what is of the whole process is as others know it
        passed.append(threading.get_ident())
        rested(turns, seconds)

    def work(_: Turns) -> None:
        torch.manual_seed(0)  # one of eighty such networks has no gradient
        rescale(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)), images, settings=settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Turns, "rest", rest)
        with torch.random.fork_rng(devices=[]):
            taking_turns(work, 2, device="cpu")
    assert [passed.count(thread) for thread in dict.fromkeys(passed)] == [4, 4]
    assert any(a != b for a, b in pairwise(passed))


def test_validation_passes_turns_on_after_each_batch() -> None:
    passed: list[int] = []
    batches = [(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))] * 5
    with pauses(lambda: passed.append(1), nullcontext):
        accuracy(torch.nn.Linear(3, 2), batches)
    assert len(passed) == 5


def test_roots_of_covariances_are_computed_aside() -> None:
    log: list[str] = []

    @contextmanager
    def aside() -> Iterator[None]:
        log.append("left")
        yield
        log.append("back")

    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = hold(Mask({"weight": torch.ones(2, 4)}), model, optimizer)
    with pauses(lambda: None, aside):
        running = Recipe((Preconditioning(every=2),)).attach(model, optimizer, total_steps=4)
        for _ in range(4):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            running.step()
    assert log == ["left", "back"] * 2
    held.release()


def test_a_checkpoint_is_written_aside_and_whole_where_all_are_to_end_meanwhile(tmp_path) -> None:
    file, log = tmp_path / "checkpoint.pt", []

    def work(turns: Turns) -> None:
        @contextmanager
        def aside() -> Iterator[None]:
            log.append(file.exists())
            turns.stopped = True
            with turns.aside():
                yield
                log.append(file.exists())

        model = torch.nn.BatchNorm1d(2)
        with pauses(lambda: None, aside):
            checkpoint.save(file, {"model": model.state_dict(), "steps": [3, (torch.ones(2), None)]})

    taking_turns(work, 1, device="cpu")
    assert log == [False, True]
    saved = checkpoint.load(file, device="cpu")
    assert saved["steps"][0] == 3
    assert torch.equal(saved["steps"][1][0], torch.ones(2))
    assert saved["model"]._metadata == torch.nn.BatchNorm1d(2).state_dict()._metadata


def test_a_number_is_read_from_the_gpu_when_it_has_arrived_and_others_run_until_then(monkeypatch) -> None:
    log: list[str] = []

    class Event:  # of a GPU, which there may be none of
        def __init__(self, *, blocking: bool) -> None:
            assert blocking

        def record(self) -> None:
            log.append("told")

        def synchronize(self) -> None:
            log.append("done")

    @contextmanager
    def aside() -> Iterator[None]:
        log.append("left")
        yield
        log.append("back")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    batches = [(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))]
    with pauses(lambda: log.append("batch"), aside):
        accuracy(torch.nn.Linear(3, 2), batches)
    assert log == ["batch", "told", "left", "done", "back"]
