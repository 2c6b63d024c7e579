"""The reference trainer."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from anymask import Mask, Recipe, fit, prunable
from anymask.data import Batches, Split
from anymask.errors import TechniqueError
from anymask.recipe import presets
from anymask.schedules import Schedule
from anymask.surgery import fingerprint
from anymask.sweep import cell_of
from anymask.techniques import GhostActivation
from anymask.train import Protocol, accuracy
from tests.train.trainings import Net, batches, images, mask_of, train_once


@pytest.mark.parametrize("preset", presets())
def test_every_preset_leaves_the_untouched_networks_form_the_masks_zeros_and_the_reported_accuracy(preset: str, tmp_path: Path) -> None:
    model, mask = Net(), mask_of(Net())
    before = fingerprint(model)
    taught = any(technique.taught for technique in Recipe.preset(preset).techniques)
    result = train_once(model, recipe=preset, teacher=Net(seed=7) if taught else None)
    assert fingerprint(model) == before
    assert list(model.state_dict()) == list(Net().state_dict())
    zeros = sum(int((p == 0).sum()) for p in prunable(model).values())
    assert zeros == mask.total - mask.kept
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh = Net(seed=5)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    _, validation, test = batches()
    assert accuracy(fresh, test) == result.test
    assert accuracy(fresh, validation) == result.validation


@pytest.mark.parametrize(("mask", "recipe"), [(None, "default"), (mask_of(Net()), "best")])
def test_without_a_recipe_a_mask_is_trained_with_best_and_a_dense_network_by_the_default_protocol(mask: Mask | None, recipe: str) -> None:
    train, validation, test = batches()
    results = [
        fit(Net(), train, mask=mask, recipe=name, protocol=Protocol(epochs=2), validation=validation, test=test) for name in (None, recipe)
    ]
    assert results[0].curves == results[1].curves
    assert cell_of("snip" if mask else "dense", sparsity=None, recipe=None, seed=0).recipe == recipe  # as anymask train does


def test_the_checkpoint_with_the_best_validation_accuracy_is_chosen_the_later_one_of_equals() -> None:
    result = train_once(Net())
    scores = result.curves["validation_accuracy"]
    assert result.validation == max(scores)
    assert result.best_epoch == max(i for i, s in enumerate(scores, 1) if s == max(scores))


def test_what_is_evaluated_is_the_plain_network_even_while_ghosts_act() -> None:
    model, (train, validation, test) = Net(), batches()
    recipe = Recipe((GhostActivation(Schedule("step", full="100%", end="100%"), soft="mish", beta=0.1),))
    result = fit(model, train, recipe=recipe, protocol=Protocol(epochs=4, lr=0.05), validation=validation, test=test, last_step=14)
    assert result.curves["strength"]["ghost_activation"] == [1.0, 1.0]
    assert accuracy(model, validation) == result.validation


def test_the_chosen_weights_are_those_of_the_best_epoch_where_it_is_not_the_last() -> None:
    train, _, _ = batches()
    wrong = Batches(Split(images(40, seed=2).images, (images(40, seed=2).labels + 1) % 4), batch_size=20)
    model = Net()
    result = fit(model, train, recipe="default", protocol=Protocol(epochs=5, lr=0.05), validation=wrong)  # learning makes it worse
    assert result.best_epoch < 5
    assert accuracy(model, wrong) == result.validation > result.last_validation


def test_it_learns() -> None:
    result = train_once(Net(), recipe="default")
    assert result.test is not None
    assert result.test > 0.6
    assert result.curves["train_loss"][-1] < result.curves["train_loss"][0]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    nets = [Net(), Net(), Net()]
    train, _, _ = batches()
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        fit(net, train, recipe="default", protocol=Protocol(epochs=1, lr=0.05), seed=seed)  # the seed reaches dropout only
    a, b, c = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_accumulation_equals_a_larger_batch() -> None:
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)).double()
    second = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)).double()
    second.load_state_dict(first.state_dict())
    data = [(torch.randn(8, 1, 8, 8).double(), torch.arange(8) % 4) for _ in range(4)]
    joined = [(torch.cat([data[i][0], data[i + 1][0]]), torch.cat([data[i][1], data[i + 1][1]])) for i in (0, 2)]
    fit(first, _Fixed(data), recipe="default", protocol=Protocol(epochs=2, accumulate=2, lr=0.01))  # type: ignore[arg-type]
    fit(second, _Fixed(joined), recipe="default", protocol=Protocol(epochs=2, lr=0.01))  # type: ignore[arg-type]
    assert torch.allclose(first[1].weight, second[1].weight, rtol=1e-12)


class _Fixed:
    """The same batches every epoch."""

    def __init__(self, data: list) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        return iter(self.data)

    def epoch(self, number: int, *, start: int = 0):
        return iter(self.data[start:])


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_mixed_precision_trains_and_keeps_zeros(precision: str) -> None:
    model, mask = Net(), mask_of(Net())
    train, _, test = batches()
    result = fit(model, train, mask=mask, recipe="tost", test=test, protocol=Protocol(epochs=2, lr=0.05, precision=precision))
    assert result.test is not None
    for name, kept in mask.items():
        assert not model.get_parameter(name)[~kept].any()


def test_a_loss_that_is_not_finite_stops_with_advice() -> None:
    with pytest.raises(TechniqueError, match="lower lr"):
        fit(Net(), batches()[0], recipe="default", protocol=Protocol(epochs=2, lr=1e30))


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    fit(Net(), batches()[0], recipe="default", protocol=Protocol(epochs=1), log_dir=tmp_path)
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_the_learning_rate_warms_up_and_never_rises_after(schedule: str) -> None:
    protocol = Protocol(schedule=schedule, warmup="10%", lr=0.3)
    rates = [protocol.lr_at(step, total=100, per_epoch=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.03)
    assert rates[9] == pytest.approx(0.3)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert max(rates) == pytest.approx(0.3)


def test_a_rewound_training_begins_where_it_is_told() -> None:
    train, validation, _ = batches()
    whole, walked, model = Protocol(epochs=4, lr=1e-9), [], Net()  # 7 batches an epoch
    model.register_forward_pre_hook(lambda net, args: walked.append(args[0].clone()) if net.training else None)
    result = fit(model, train, recipe="default", protocol=whole, validation=validation, first_step=9)
    assert result.curves["epoch"] == [2, 3, 4]
    expected = [*train.epoch(1, start=2), *train.epoch(2), *train.epoch(3)]
    assert all(torch.equal(x, seen) for (x, _), seen in zip(expected, walked, strict=True))
    losses = fit(Net(), train, recipe="default", protocol=whole, validation=validation).curves["train_loss"]
    assert result.curves["train_loss"] == pytest.approx(losses[1:], rel=0.1)  # the mean of what was seen, however much that was


def test_a_rewound_training_that_is_stopped_within_its_first_epoch_goes_on(tmp_path: Path) -> None:
    train, validation, _ = batches()
    how = {"recipe": "default", "protocol": Protocol(epochs=4, lr=0.05), "validation": validation, "first_step": 9}
    steps = iter([None, None, KeyboardInterrupt])

    def on_step() -> None:
        if error := next(steps):
            raise error

    with pytest.raises(KeyboardInterrupt):
        fit(Net(), train, **how, checkpoint_file=tmp_path / "c.pt", checkpoint_every=1, on_step=on_step)
    whole, resumed = Net(), Net()
    assert fit(resumed, train, **how, checkpoint_file=tmp_path / "c.pt").curves == fit(whole, train, **how).curves
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_the_recipe_that_is_given_may_be_a_value_or_a_name() -> None:
    by_name = train_once(Net(), recipe="default")
    assert train_once(Net(), recipe=Recipe()).curves == by_name.curves
