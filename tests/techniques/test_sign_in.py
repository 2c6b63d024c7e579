"""Sign-In beside others that look at the gradient, an optimiser that has its slots already, and a mask that moves."""

import pytest
import torch
from torch import nn

from anymask import Hold, Mask, Recipe, hold, prune
from anymask.techniques import SignIn

X, Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


def held(kind: type[torch.optim.Optimizer], **settings: object) -> tuple[nn.Module, torch.optim.Optimizer, Hold]:
    torch.manual_seed(0)
    model = nn.Linear(8, 4, bias=False)
    optimizer = kind(model.parameters(), lr=0.1, **settings)
    return model, optimizer, hold(prune(model, "random", sparsity=0.5), model, optimizer)


@pytest.mark.parametrize("every", ["5%", "100%"])
def test_after_its_step_the_gradient_is_that_of_the_weight_again(every: str) -> None:
    model, optimizer, _ = held(torch.optim.SGD)
    recipe = Recipe((SignIn(every=every),)).attach(model, optimizer, total_steps=9)
    for _ in range(3):
        optimizer.zero_grad()
        recipe.loss(model(X), Y).backward()
        before = model.weight.grad.clone()
        optimizer.step()
        recipe.step()
        torch.testing.assert_close(model.weight.grad, before)


def test_a_fused_optimiser_with_momentum_takes_the_factors_in_the_middle_of_a_training() -> None:
    ends = []
    for fused in (False, True):
        model, optimizer, _ = held(torch.optim.SGD, momentum=0.9, fused=fused)
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        recipe = Recipe((SignIn(),)).attach(model, optimizer, total_steps=2)
        for _ in range(2):
            optimizer.zero_grad()
            recipe.loss(model(X), Y).backward()
            optimizer.step()
            recipe.step()
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(*ends)


def test_slots_of_the_factors_begin_at_0_where_a_mask_that_moves_grows() -> None:
    model, optimizer, carried = held(torch.optim.AdamW)
    recipe = Recipe((SignIn(),)).attach(model, optimizer, total_steps=4)
    seen: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        _, factor = optimizer.param_groups[0]["params"]
        seen.append(optimizer.state[factor]["exp_avg_sq"].clone())

    def step() -> None:
        optimizer.zero_grad()
        recipe.loss(model(X), Y).backward()
        optimizer.step()
        recipe.step()

    step()
    before = carried.mask["weight"]
    between = before.roll(1, 0)
    carried.move(Mask({"weight": between}))
    step()
    carried.move(Mask({"weight": before}))  # grown again, where they had slots
    handle = optimizer.register_step_pre_hook(look)  # after the recipe's, when the factors have joined
    step()
    handle.remove()
    assert not seen[0][before & ~between].any()
    assert seen[0][before & between].all()
