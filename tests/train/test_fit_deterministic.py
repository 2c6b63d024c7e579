"""`deterministic`: PyTorch's deterministic algorithms while something is trained, or a mask is made, and not a moment longer."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anymask import Mask, prune
from anymask.config import Bench, Experiment
from anymask.errors import SettingError
from anymask.sweep import masks
from anymask.train import Computing, Protocol
from anymask.train.computing import same_bits
from tests.train.trainings import Net, train_once


def on() -> bool:
    return torch.are_deterministic_algorithms_enabled()


@pytest.fixture(params=["default", "warn"])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """What the user has set."""
    torch.set_deterministic_debug_mode(request.param)
    yield torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")


def test_they_are_on_while_it_trains_and_the_users_setting_is_there_again_after(mode: int) -> None:
    seen: list[bool] = []
    plain, net = Net(), Net()
    expected = train_once(plain)
    result = train_once(net, deterministic=True, on_step=lambda: seen.append(on()))
    assert set(seen) == {True}
    assert torch.get_deterministic_debug_mode() == mode
    assert result.curves == expected.curves
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))


def test_they_are_off_again_after_a_training_that_failed(mode: int) -> None:
    def fail() -> None:
        raise ValueError("in a step")

    with pytest.raises(ValueError, match="in a step"):
        train_once(Net(), deterministic=True, on_step=fail)
    assert torch.get_deterministic_debug_mode() == mode


def test_of_threads_beside_each_other_the_last_one_turns_them_off(mode: int) -> None:
    inside, leave, still = threading.Event(), threading.Event(), list[bool]()

    def other() -> None:
        with same_bits(True):
            inside.set()
            leave.wait(20)
            still.append(on())

    thread = threading.Thread(target=other)
    with same_bits(True):
        thread.start()
        inside.wait(20)
    leave.set()
    thread.join()
    assert still == [True]
    assert torch.get_deterministic_debug_mode() == mode


def test_what_has_no_deterministic_algorithm_is_named() -> None:
    with pytest.raises(SettingError, match=r"^deterministic came, and put_ does not have a deterministic implementation\. Allowed"):
        train_once(Net(), deterministic=True, on_step=lambda: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)))


@pytest.mark.parametrize("asked", [True, False])
def test_a_mask_is_made_with_them(asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(model: nn.Module, *args: Any, **how: Any) -> Mask:
        seen.append(on())
        return prune(model, *args, **how)

    monkeypatch.setattr(masks, "prune", watched)
    bench = Bench(Experiment("fashion-mnist-5k", device="cpu"), Protocol())
    maker = masks.Masks(bench, lambda *_: tmp_path / "m", Computing(deterministic=asked))
    maker.make("random", sparsity=0.9, seed=0, model=bench.model(0))
    assert (seen, on()) == ([asked], False)
