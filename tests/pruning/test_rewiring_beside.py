"""Masks that move beside gradient accumulation, in a training that goes on, and under a recipe that works on steps."""

import pytest
import torch
from torch import nn

import anymask
from anymask.pruning.dynamic import dense_mask
from anymask.pruning.gradients import DenseGradients
from anymask.techniques import SAM, DensityLR
from tests.pruning.test_rewiring_by_hand import LR, batches, mask_of, net


def test_gradients_that_are_0_where_kept_are_not_forgotten_by_those_of_the_next_batch():
    weight = nn.Parameter(torch.ones(1, 4))
    kept = torch.tensor([[True, True, False, False]])
    for none in (True, False):
        heard = DenseGradients({"w": weight}, {"w": kept})
        for row in ([0.0, 0.0, 9.0, 0.0], [1.0, 1.0, 0.0, 2.0]):
            (weight * torch.tensor(row)).sum().backward()
            weight.grad.mul_(kept)  # as a hold does
        assert heard.mean()["w"].tolist() == [[1.0, 1.0, 9.0, 2.0]]
        weight.grad = None if none else torch.zeros_like(weight)
        (weight * torch.tensor([1.0, 0.0, 0.0, 0.0])).sum().backward()
        assert heard.mean()["w"].tolist() == [[1.0, 0.0, 0.0, 0.0]]
        weight.grad = None
        heard.remove()


@pytest.mark.parametrize("name", ["rigl", "gmp"])
def test_a_rewiring_goes_on_from_its_state_at_whatever_step_it_is(name):
    how = {"total_steps": 10, "every": "1it", "end": "70%"} | ({"sparsity": 0.5} if name == "gmp" else {})
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    first = anymask.rewire(anymask.hold(dense_mask(model) if name == "gmp" else mask_of(), model, optimizer), name, **how)
    for x in batches(9):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    again = net()
    carried = anymask.hold(first.mask, again, torch.optim.SGD(again.parameters(), lr=LR))
    rewiring = anymask.rewire(carried, name, **how, start=9, state=first.state_dict())
    assert (rewiring.position, rewiring.mask, rewiring.settled) == (9, first.mask, True)


@pytest.mark.parametrize("first", ["rewire", "recipe"])
def test_a_mask_moves_by_what_the_whole_step_with_its_recipe_has_made_of_the_weights(first):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(mask_of(), model, optimizer)
    recipe = anymask.Recipe((DensityLR(power=2.0), SAM(rho=0.1)))
    parts = {
        "rewire": lambda: anymask.rewire(hold, "set", total_steps=9, every="1it", fraction=0.5),
        "recipe": lambda: recipe.attach(model, optimizer, total_steps=9),
    }
    made = {part: parts[part]() for part in sorted(parts, key=lambda part: part != first)}
    seen = []
    before = hold.move
    hold.move = lambda mask: (seen.append({n: p.detach().clone() for n, p in hold.parameters.items()}), before(mask))
    old = {name: p.detach().clone() for name, p in hold.parameters.items()}
    made["recipe"].loss(model(batches(1)[0]), torch.zeros(10).long()).backward()
    gradients = {name: p.grad.clone() for name, p in hold.parameters.items()}
    optimizer.step()
    factors = DensityLR(power=2.0).factors(mask_of())
    for name, weight in seen[0].items():
        whole = old[name] - LR * factors[name] * gradients[name]
        if first == "rewire":  # after it SAM has moved them, as its docstring says
            torch.testing.assert_close(weight, whole)
        else:
            assert (weight - whole).norm() < 0.11
