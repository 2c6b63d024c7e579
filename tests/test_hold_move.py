"""A held mask that moves: what is new is zero everywhere, what stays is as it was, and what knows the tensors need not know."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import anymask
from anymask import Mask
from anymask.errors import MaskError
from anymask.surgery import fingerprint
from tests.test_hold import assert_zero_where_masked
from tests.test_hold_life import held_net, hooks


def another(mask, seed=8):
    generator = torch.Generator().manual_seed(seed)
    return Mask({name: torch.rand(mask[name].shape, generator=generator) < 0.4 for name in mask})


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad", "Rprop"])
def test_weights_gradients_and_slots_are_zero_under_the_new_mask_and_the_rest_stays(kind):
    model, mask, optimizer, hold, x = held_net(getattr(torch.optim, kind), **({"momentum": 0.9} if kind == "SGD" else {}))
    step(model, optimizer, x)
    weights = {name: p.detach().clone() for name, p in hold.parameters.items()}
    slots = {name: {k: s.clone() for k, s in optimizer.state[p].items() if torch.is_tensor(s)} for name, p in hold.parameters.items()}
    new = another(mask)
    hold.move(new)
    assert hold.mask is new
    assert_zero_where_masked(new, model, optimizer)
    for name, p in hold.parameters.items():
        both, grown = mask[name] & new[name], new[name] & ~mask[name]
        assert torch.equal(p[both], weights[name][both])
        assert not p[grown].any()
        for key, slot in optimizer.state[p].items():
            if torch.is_tensor(slot) and slot.shape == p.shape:
                assert torch.equal(slot[both], slots[name][key][both])
    for _ in range(2):
        step(model, optimizer, x)
        assert_zero_where_masked(new, model, optimizer)
    assert all(p[new[name] & ~mask[name]].any() for name, p in hold.parameters.items())  # and the grown ones train


@pytest.mark.parametrize("move", [{"memory_format": torch.channels_last}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}])
def test_a_model_that_was_converted_takes_the_new_mask(move):
    model, mask, optimizer, hold, x = held_net(torch.optim.Adam)
    model.to(**move)
    hold.move(another(mask))
    for _ in range(2):
        step(model, optimizer, x.to(**move))
        assert_zero_where_masked(hold.mask, model, optimizer)


def test_the_masks_are_written_in_place():
    model, mask, _, hold, _ = held_net()
    model.to(memory_format=torch.channels_last)
    before = {name: hold._where(name, p) for name, p in hold.parameters.items()}
    hold.move(another(mask))
    assert all(hold._where(name, p) is before[name] for name, p in hold.parameters.items())
    assert all(torch.equal(kept != 0, hold.mask[name]) for name, kept in before.items())


def test_no_hook_comes_or_goes():
    model, mask, optimizer, hold, _ = held_net()
    before, carried = fingerprint(model), hooks(model, optimizer)
    hold.move(another(mask))
    assert (fingerprint(model), hooks(model, optimizer)) == (before, carried)
    hold.release()
    assert not any(hooks(model, optimizer))


def test_another_model_s_mask_or_a_released_hold_is_refused_and_nothing_moves():
    _, mask, _, hold, _ = held_net()
    with pytest.raises(MaskError, match=r"differs in name or shape: 4\.weight"):
        hold.move(Mask({"0.weight": mask["0.weight"]}))
    with pytest.raises(MaskError, match=r"0\.weight"):
        hold.move(Mask({"0.weight": torch.ones(4, 2), "4.weight": mask["4.weight"]}))
    assert hold.mask is mask
    hold.release()
    with pytest.raises(MaskError, match="after release"):
        hold.move(mask)


def test_what_came_with_a_hold_goes_with_it():
    *_, hold, _ = held_net()
    gone = []
    hold.release_with(SimpleNamespace(remove=lambda: gone.append(True)))
    hold.release()
    hold.release()
    assert gone == [True]


def test_sparse_gradients_move_too():
    rows = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(rows.parameters())
    hold = anymask.hold(Mask({"weight": torch.ones(5, 3)}), rows, optimizer)
    rows(torch.tensor([0, 3])).sum().backward()
    new = Mask({"weight": torch.eye(5, 3)})
    hold.move(new)
    optimizer.step()
    assert not rows.weight[~new["weight"]].any()
    assert torch.equal(rows.weight.grad.to_dense() != 0, new["weight"] & torch.tensor([[True], [False], [False], [True], [False]]))
