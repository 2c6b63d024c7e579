"""A recipe that has no part in a training, or not the whole of one, says so."""

import pytest
import torch
import torch.nn.functional as F

import anymask
from anymask import Recipe
from anymask.errors import DataError, TechniqueError
from tests.test_recipe import loader, net


class OtherSteps(torch.optim.Optimizer):
    """Of the form of the usual SAM: its own `step` is never called."""

    def __init__(self, params, base: torch.optim.Optimizer) -> None:
        super().__init__(params, {})
        self.base = base

    def second_step(self) -> None:
        self.base.step()


def test_an_optimiser_that_steps_by_other_names_is_found_out_and_the_one_inside_is_right() -> None:
    model, base = net()
    sam, mask = OtherSteps(model.parameters(), base), anymask.prune(model, "random", sparsity=0.5)
    anymask.hold(mask, model, sam)
    running = Recipe.preset("best:density_lr").attach(model, sam, total_steps=99)
    for _ in range(19):
        sam.second_step()
        running.step()
    with pytest.raises(TechniqueError, match=r"density_lr heard of no step of this OtherSteps, and step\(\) was called 20 times"):
        running.step()
    with pytest.raises(TechniqueError, match="heard of no step"):
        running.finish()
    assert Recipe().attach(model, base, total_steps=1).finish() is model  # it has left all the same

    anymask.hold(mask, model, base)
    running = Recipe.preset("best:density_lr").attach(model, base, total_steps=25)
    for _ in range(25):
        sam.second_step()
        running.step()
    assert running.finish() is model


def test_a_short_training_of_which_no_step_was_heard_is_found_out_at_its_end() -> None:
    model, optimizer = net()
    anymask.hold(anymask.prune(model, "random", sparsity=0.5), model, optimizer)
    running = Recipe.preset("best:density_lr").attach(model, optimizer, total_steps=2)
    running.step()
    running.step()
    with pytest.raises(TechniqueError, match="heard of no step"):
        running.finish()


def test_steps_that_a_scaler_skips_at_the_beginning_are_no_error() -> None:
    model, optimizer = net()
    anymask.hold(anymask.prune(model, "random", sparsity=0.5), model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    running = Recipe.preset("best:density_lr").attach(model, optimizer, total_steps=25)
    for step in range(18):
        loss = model(torch.randn(2, 1, 8, 8)).sum() * (float("inf") if step < 17 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        running.step()
        if step == 0:
            state = running.state_dict()
    assert running.finish(early=True) is model
    running = Recipe.preset("best:density_lr").attach(model, optimizer, total_steps=25, state=state)
    running.step()
    assert running.finish(early=True) is model


def test_a_loop_that_leaves_out_the_loss_of_the_recipe_is_refused_at_its_first_step() -> None:
    model, optimizer = net()
    recipe = Recipe.preset("tost:label_smoothing,ghost_activation")
    running = recipe.attach(model, optimizer, total_steps=2)
    F.cross_entropy(model(torch.randn(2, 1, 8, 8)), torch.tensor([0, 1])).backward()
    optimizer.step()
    with pytest.raises(TechniqueError, match=r"call backward\(\) on what `recipe.loss.*'tost:-lrsi,-ghost_skip,-label_smoothing'"):
        running.step()
    running.loss(model(torch.randn(2, 1, 8, 8)), torch.tensor([0, 1])).backward()
    running.step()


@pytest.mark.parametrize("recipe", ["best:density_lr", "tost:lrsi"])
def test_a_recipe_for_numbers_wants_their_loss(recipe: str) -> None:
    model, optimizer = net()
    data = [(x, torch.randn(8, 3)) for x, _ in loader(1)]
    anymask.hold(anymask.prune(model, "random", sparsity=0.5), model, optimizer)

    def begin(**loss) -> None:
        running = Recipe.preset(recipe).attach(model, optimizer, total_steps=2, data=data, **loss)
        try:
            running.loss(model(data[0][0]), data[0][1])
        finally:
            running.leave()

    with pytest.raises(DataError, match="and the loss is cross entropy"):
        begin()
    begin(loss=F.mse_loss)


def test_what_is_found_counts_the_weights_of_the_mask_that_another_optimiser_trains() -> None:
    model, _ = net()
    optimizer = torch.optim.SGD(model[:5].parameters(), lr=0.1)
    anymask.hold(anymask.prune(model, "random", sparsity=0.5), model, optimizer)
    found = Recipe.preset("best:density_lr,preconditioning").attach(model, optimizer, total_steps=1).found
    assert found["density_lr"].startswith("updates of 2 tensors of the 3 of the mask")
    assert found["preconditioning"].startswith("2 of 3 masked weights")
