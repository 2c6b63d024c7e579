"""Distillation: the loss by hand, which inputs the teacher sees, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymask import Recipe, data, fit
from anymask.data import Augment
from anymask.errors import SettingError, TechniqueError
from anymask.techniques import Context, Distillation, LabelSmoothing
from anymask.train import Protocol


class Two(nn.Module):
    """Takes two inputs, by name or not, and gives logits (N, 3, L); remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Conv1d(2, 3, 1), nn.Dropout(0.5)
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        self.calls.append(x)
        return {"logits": self.layer(self.drop(x)) + shift}


def attached(technique: Distillation, model: nn.Module, teacher: nn.Module | None, **more: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Recipe((technique,)).attach(model, optimizer, total_steps=10, teacher=teacher, **more)


def test_the_loss_is_the_formula_by_hand_and_ignored_targets_do_not_count() -> None:
    torch.manual_seed(0)
    model, teacher = nn.Conv1d(2, 3, 1).double(), nn.Conv1d(2, 3, 1).double()
    x, y = torch.randn(4, 2, 5, dtype=torch.float64), torch.randint(0, 3, (4, 5))
    y[1, 2:] = -100
    running = attached(Distillation(share=0.6, temperature=3.0), model, teacher)
    output = model(x)
    found = running.loss(output, y)
    p, q = (torch.softmax(logits / 3.0, 1) for logits in (teacher(x), output))
    each = (p * (p.log() - q.log())).sum(1)
    expected = 0.4 * F.cross_entropy(output, y) + 0.6 * 9.0 * each[y != -100].mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(value, model.weight, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_sees_the_inputs_of_the_training_in_eval_mode_and_none_of_an_evaluation() -> None:
    model, teacher = Two(), Two()
    running = attached(Distillation(), model, teacher)
    x, shift, y = torch.randn(2, 2, 4), torch.ones(1), torch.zeros(2, 4, dtype=torch.long)
    output = model.train()(x, shift=shift)
    model.eval()(torch.zeros(2, 2, 4), shift)
    running.loss(output, y)
    assert not teacher.training
    assert [call is x for call in teacher.calls] == [True]
    with running.plain() as plain:
        plain(x, shift)
    assert len(teacher.calls) == 1


def test_a_teacher_in_bfloat16_says_nearly_the_same() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(8, 3), torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    teacher = nn.Linear(8, 3)
    said: list[torch.dtype] = []
    teacher.register_forward_hook(lambda _, __, out: said.append(out.dtype))
    found = []
    for precision in ("same", "bfloat16"):
        running = attached(Distillation(precision=precision), model, teacher)
        found.append(running.loss(model(x), y))
        running.finish(early=True)
    assert said == [torch.float32, torch.bfloat16]
    assert found[1].dtype == torch.float32
    assert found[0] != found[1]
    torch.testing.assert_close(*found, rtol=2e-2, atol=0)


@pytest.mark.parametrize("augment", [None, Augment(pad=0)], ids=["plain", "mirrored"])
def test_a_teacher_that_is_asked_once_says_the_same_where_nothing_is_cropped(augment: Augment | None) -> None:
    images = data.Split(torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8), torch.arange(30) % 3)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    asked: list[int] = []
    teacher.register_forward_hook(lambda _, args, __: asked.append(len(args[0])))
    ends, calls = [], []
    for asks in ("always", "once"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        train = data.Batches(images, batch_size=8, shuffle=True, augment=augment, seed=3)
        asked.clear()
        fit(model, train, recipe=Recipe((Distillation(asks=asks),)), teacher=teacher, protocol=Protocol(epochs=3, batch_size=8))
        ends.append(model[1].weight.detach())
        calls.append(sum(asked))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
    assert calls == [3 * 30, 60 if augment else 30]
    changed = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    fit(changed, train, recipe="default", protocol=Protocol(epochs=3, batch_size=8))
    assert not torch.allclose(changed[1].weight, ends[0], atol=1e-3)


def test_a_network_is_not_its_own_teacher_asked_once_or_always() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    train = data.Batches(data.Split(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 3), batch_size=8)
    for asks in ("always", "once"):
        with pytest.raises(TechniqueError, match="itself"):
            fit(model, train, recipe=Recipe((Distillation(asks=asks),)), teacher=model, protocol=Protocol(epochs=1, batch_size=8))


def test_a_training_that_asked_once_goes_on_within_an_epoch(tmp_path: Path) -> None:
    images = data.Split(torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8), torch.arange(30) % 3)
    train = data.Batches(images, batch_size=8, shuffle=True, augment=Augment(pad=1), seed=3)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    ends = []
    for stops in ([None], [2, 6, None]):
        file = tmp_path / f"{len(stops)}.pt"
        for stop in stops:
            torch.manual_seed(1)
            model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
            how: dict[str, Any] = {"recipe": Recipe((Distillation(asks="once"),)), "protocol": Protocol(epochs=3, batch_size=8)}
            fit(model, train, teacher=teacher, **how, last_step=stop, checkpoint_file=file, checkpoint_every=1)
        ends.append(model[1].weight.detach())
    assert torch.equal(*ends)


def test_where_it_has_faded_the_teacher_is_not_asked() -> None:
    model, teacher = Two(), Two()
    running = attached(Distillation(), model, teacher)
    running._live["distillation"][1].set_strength(0.0)
    running.loss(model(torch.randn(2, 2, 4), torch.ones(1)), torch.zeros(2, 4, dtype=torch.long))
    assert not teacher.calls


def test_it_goes_with_smoothed_labels_whose_loss_it_shares() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 3), torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe((LabelSmoothing(eps=0.3), Distillation(share=0.5)))
    output = model(x)
    smooth = LabelSmoothing(eps=0.3).attach(Context(model, None, F.cross_entropy)).loss(F.cross_entropy(output, y), output, y)
    running = recipe.attach(model, optimizer, total_steps=10, teacher=copy.deepcopy(model))
    torch.testing.assert_close(running.loss(model(x), y), 0.5 * smooth)


def test_what_does_not_fit_is_refused_in_words() -> None:
    model, x, y = nn.Linear(2, 3), torch.randn(5, 2), torch.zeros(5, dtype=torch.long)
    with pytest.raises(TechniqueError, match="no teacher"):
        attached(Distillation(), model, None)
    with pytest.raises(TechniqueError, match="itself"):
        attached(Distillation(), model, torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    running = attached(Distillation(), model, nn.Linear(2, 4))
    with pytest.raises(TechniqueError, match=r"\(5, 4\)"):
        running.loss(model(x), y)
    running.finish(early=True)
    running = attached(Distillation(), model, nn.Linear(2, 3))
    with pytest.raises(TechniqueError, match="before the network"):
        running.loss(torch.zeros(5, 3), y)
    running.finish(early=True)
    for bad in ({"share": 0.0}, {"share": 1.5}, {"temperature": 0.0}, {"asks": "never"}, {"precision": "int8"}):
        with pytest.raises(SettingError):
            Distillation(**bad)
