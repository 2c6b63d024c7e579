"""Ctrl-C in the middle of a change: the change is whole or undone, and no function mode stays."""

import asyncio
import signal
import threading

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import anymask
from anymask import holding
from anymask.interrupts import Mode, uninterrupted, withdraw
from anymask.kernels import available, why_not
from anymask.prunables import compact
from anymask.sparse import as_dense, converting


def test_ctrl_c_comes_at_the_end_and_the_handler_is_as_before() -> None:
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        done += [signal.raise_signal(signal.SIGINT), "whole"]
    assert done == [None, "whole"]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="mine"), uninterrupted():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_event_loop_hears_of_it_once() -> None:
    heard = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, heard.append, "Ctrl-C")
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0.05)
        loop.remove_signal_handler(signal.SIGINT)

    asyncio.run(main())
    assert heard == ["Ctrl-C"]


def test_elsewhere_than_in_the_main_thread_it_does_nothing() -> None:
    done: list[bool] = []

    def work() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT) is before)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def interrupted_call() -> None:
    """What Ctrl-C in a module that has entered a mode leaves: the mode."""
    TorchFunctionMode().__enter__()
    raise KeyboardInterrupt


def test_a_mode_takes_dead_ones_along_and_a_withdrawn_one_leaves_those_above_it() -> None:
    depth = torch._C._len_torch_function_stack()
    with pytest.raises(KeyboardInterrupt), Mode():
        interrupted_call()
    assert torch._C._len_torch_function_stack() == depth
    below = TorchFunctionMode().__enter__()
    with TorchFunctionMode() as above:
        withdraw(below)
        withdraw(below)
        assert torch.overrides._get_current_function_mode_stack()[depth:] == [above]
    assert torch._C._len_torch_function_stack() == depth


def test_a_hold_that_is_stopped_before_it_began_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    net = nn.Linear(4, 4)
    optimizer, mask = torch.optim.SGD(net.parameters(), lr=0.1), anymask.Mask({"weight": torch.eye(4)})
    monkeypatch.setattr(holding, "_zero", stop)
    with pytest.raises(KeyboardInterrupt):
        anymask.hold(mask, net, optimizer)
    assert not net.weight._post_accumulate_grad_hooks
    assert holding.held(optimizer) is None


@pytest.mark.skipif(not available(), reason=why_not())
def test_layers_that_are_dense_for_a_while_are_sparse_again_after_ctrl_c_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mask = anymask.Mask({"0.weight": torch.eye(4), "1.weight": torch.eye(4)})
    anymask.to_sparse(net, mask, torch.ones(2, 4), measure=False)
    values, densify = [p.clone() for p in net.parameters()], converting.densify

    def interrupted(*given: object) -> None:
        signal.raise_signal(signal.SIGINT)
        densify(*given)

    monkeypatch.setattr(converting, "densify", interrupted)
    with pytest.raises(KeyboardInterrupt), as_dense(net):
        raise AssertionError("the block was entered")
    assert len(compact(net)) == 2
    calls = []

    def broken(*given: object) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError("no more")
        densify(*given)

    monkeypatch.setattr(converting, "densify", broken)
    with pytest.raises(MemoryError, match="no more"), as_dense(net):
        raise AssertionError("the block was entered")
    assert [layer.weight.shape for layer in net] == [(4,), (4,)]
    assert all(torch.equal(p, value) for p, value in zip(net.parameters(), values, strict=True))
