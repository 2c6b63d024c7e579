"""The moving average: by hand in float64, what evaluation sees, and what a mask that moves does to it."""

import numpy as np
import pytest
import torch
from torch import nn

from anymask import Mask, Recipe, hold
from anymask.errors import SettingError, TechniqueError
from anymask.schedules import Schedule
from anymask.techniques import SAM, Averaging


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double(), torch.arange(8) % 3


def train(model: nn.Module, optimizer: torch.optim.Optimizer, running, *, steps: int) -> list[dict[str, np.ndarray]]:
    """What is trained after each step, read behind the back of the recipe."""
    seen = []
    for step in range(steps):
        x, y = batch(step)
        running.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: value.numpy().copy() for name, value in model.state_dict().items()})
        running.step()
    return seen


def by_hand(first: dict[str, np.ndarray], seen: list[dict[str, np.ndarray]], *, decay: float) -> dict[str, np.ndarray]:
    average = {name: value.copy() for name, value in first.items() if value.dtype.kind == "f"}
    for t, values in enumerate(seen, start=1):
        d = min(decay, t / (t + 9))
        average = {name: d * a + (1 - d) * values[name] for name, a in average.items()}
    return average


def test_weights_and_statistics_of_norms_are_averaged_and_left_at_the_end() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    first = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    running = Recipe((Averaging(decay=0.3),)).attach(model, optimizer, total_steps=6)
    seen = train(model, optimizer, running, steps=6)
    running.finish()
    for name, value in by_hand(first, seen, decay=0.3).items():
        np.testing.assert_allclose(model.state_dict()[name].numpy(), value, rtol=1e-12, atol=1e-15)
        assert not np.allclose(value, seen[-1][name]) or name == "0.bias"  # which batch norm takes away: it has no gradient


def test_swa_is_the_mean_of_the_weights_from_its_start_on() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    running = Recipe((Averaging(kind="swa", start="2it"),)).attach(model, optimizer, total_steps=6)
    assert running.found == {"averaging": "8 parameters and buffers, the mean from step 2 on"}
    seen = train(model, optimizer, running, steps=2)
    with running.plain():
        np.testing.assert_array_equal(model[0].weight.detach().numpy(), seen[-1]["0.weight"])
    seen += train(model, optimizer, running, steps=4)
    running.finish()
    for name in ("0.weight", "1.running_var", "3.bias"):
        mean = np.mean([values[name] for values in seen[1:]], axis=0)
        np.testing.assert_allclose(model.state_dict()[name].numpy(), mean, rtol=1e-12, atol=1e-15)


def test_swa_counts_from_where_the_training_begins() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    running = Recipe((Averaging(kind="swa", start="8it"),)).attach(model, optimizer, total_steps=10, start=6)
    assert running.found["averaging"].endswith("from step 8 on")
    seen = train(model, optimizer, running, steps=4)
    running.finish()
    np.testing.assert_allclose(model[3].bias.detach().numpy(), np.mean([s["3.bias"] for s in seen[1:]], axis=0), rtol=1e-12)
    with pytest.raises(TechniqueError, match="end of this training"):
        Recipe((Averaging(kind="swa", start="100%"),)).attach(model, optimizer, total_steps=10)


@pytest.mark.parametrize("how", [{}, {"start": 4}])
def test_swa_that_goes_on_from_a_state_averages_the_steps_that_it_would_have(how: dict[str, int]) -> None:
    def begin(**more) -> tuple:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, Recipe((Averaging(kind="swa", start="50%"),)).attach(model, optimizer, total_steps=12, **more)

    whole, first = begin(), begin()
    train(*whole, steps=4)
    train(*first, steps=4)
    again = begin(state=first[2].state_dict(), **how)
    again[0].load_state_dict(first[0].state_dict())
    train(*whole, steps=8)
    train(*again, steps=8)
    ours, theirs = again[2].finish().state_dict(), whole[2].finish().state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_statistics_are_averaged_of_a_model_that_was_moved_after_attach() -> None:
    left = []
    for moved in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        running = Recipe((Averaging(decay=0.9),)).attach(model, optimizer, total_steps=5)
        if moved:
            model._apply(torch.clone)  # what .to("cuda") does: other buffers, other data of the same parameters
        train(model, optimizer, running, steps=5)
        left.append(running.finish().state_dict())
    assert all(torch.equal(left[1][name], value) for name, value in left[0].items())


def test_settings_that_came_later_name_a_training_only_where_they_are_used() -> None:
    assert set(Recipe((Averaging(),)).settings()[0]) == {"name", "schedule", "decay"}
    assert Recipe((Averaging(kind="swa"),)).settings()[0]["kind"] == "swa"
    assert Recipe.from_settings(Recipe((Averaging(),)).settings()).techniques == (Averaging(),)


def test_evaluation_sees_the_average_and_training_goes_on_from_the_very_same_bits() -> None:
    twins = [net(), net()]
    after = []
    for model, looks in zip(twins, (True, False), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        running = Recipe((Averaging(decay=0.9),)).attach(model, optimizer, total_steps=9)
        train(model, optimizer, running, steps=4)
        if looks:
            trained = model[0].weight.detach().clone()
            with running.plain():
                assert not torch.equal(model[0].weight, trained)
                assert torch.equal(running.plain_state_dict()["0.weight"], model[0].weight)
            assert torch.equal(model[0].weight, trained)
        train(model, optimizer, running, steps=5)
        after.append(running.finish().state_dict())
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.parametrize(("schedule", "share"), [(Schedule("step", full="100%", end="100%"), 1.0), (Schedule("linear", end="100%"), 0.25)])
def test_what_is_left_is_of_the_strength_of_the_last_step(schedule: Schedule, share: float) -> None:
    model = net()
    first = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    running = Recipe((Averaging(schedule, decay=0.5),)).attach(model, optimizer, total_steps=4)
    seen = train(model, optimizer, running, steps=4)
    running.finish()
    wanted = (1 - share) * seen[-1]["0.weight"] + share * by_hand(first, seen, decay=0.5)["0.weight"]
    np.testing.assert_allclose(model[0].weight.detach().numpy(), wanted, rtol=1e-12)


def test_a_mask_that_moves_takes_its_zeros_into_the_average() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    half = torch.arange(24).reshape(6, 4) % 2 == 0
    carried = hold(Mask({"0.weight": half}), model, optimizer)
    running = Recipe((Averaging(decay=0.9),)).attach(model, optimizer, total_steps=6)
    train(model, optimizer, running, steps=3)
    carried.move(Mask({"0.weight": ~half}))
    with running.plain():
        assert not model[0].weight.any()
    train(model, optimizer, running, steps=3)
    running.finish()
    assert not model[0].weight[half].any()
    assert model[0].weight[~half].any()


def test_a_mask_that_is_held_after_attach_takes_its_zeros_into_the_average() -> None:
    left = []
    for late in (False, True):
        model, mask = net(), Mask({"0.weight": torch.eye(6, 4)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        if not late:
            hold(mask, model, optimizer)
        running = Recipe((Averaging(),)).attach(model, optimizer, total_steps=3, mask=mask)
        if late:
            hold(mask, model, optimizer)
        train(model, optimizer, running, steps=3)
        left.append(running.finish().state_dict())
    assert all(torch.equal(value, left[1][name]) for name, value in left[0].items())


def test_after_a_perturbation_the_average_is_of_the_weights_without_it() -> None:
    left = []
    for techniques in ((SAM(rho=0.5), Averaging(decay=0.0)), (SAM(rho=0.5),)):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        running = Recipe(techniques).attach(model, optimizer, total_steps=5)
        train(model, optimizer, running, steps=3)
        with running.plain():
            left.append(model[0].weight.detach().clone())
    assert torch.equal(*left)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(SettingError, match="decay"):
        Averaging(decay=decay)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_average_of_bfloat16_weights_arrives_where_that_of_float32_does(kind: str) -> None:
    """In bfloat16 a hundredth of the way from 1 to 1.25 is less than half a step, and the average never left."""
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(8, 8, bias=False)
        model.weight.data.fill_(1.0)
        model = model.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        running = Recipe((Averaging(kind=kind, start="10%"),)).attach(model, optimizer, total_steps=900)
        for step in range(900):
            model.weight.grad = torch.zeros_like(model.weight)
            model.weight.data.fill_(1.0 if step < 450 else 1.25)
            optimizer.step()
            running.step()
        ends[dtype] = running.finish().weight.float().mean().item()
    assert ends[torch.bfloat16] == pytest.approx(ends[torch.float32], rel=2**-8)
    assert ends[torch.float32] > {"ema": 1.24, "swa": 1.13}[kind]
