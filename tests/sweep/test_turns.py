"""Threads that take turns: one runs at a time, in order, each with random numbers of its own, until one fails or all are told to end."""

import threading

import pytest
import torch

from anymask.sweep.run import Stopped
from anymask.sweep.turns import Turns, taking_turns


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
