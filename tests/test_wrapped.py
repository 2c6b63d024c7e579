"""Recipes and holds under wrappers, mixed precision, accumulation and checkpoints; inputs of any kind; refusals of many."""

import re
import warnings

import pytest
import torch
from torch import nn

import anymask
from anymask import Recipe
from anymask.errors import MaskError, TechniqueError
from anymask.prunables import prunable
from anymask.schedules import Schedule
from anymask.surgery import fingerprint
from anymask.techniques import GhostActivation, LabelSmoothing, LRsI, RescaleSettings
from anymask.techniques.rescale import rescale


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    return model.extend([nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)])


def loader(count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 1, 6, 6, generator=generator), torch.arange(6) % 3) for _ in range(count)]


def compiled(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.compile(model, backend="eager")


def zeros_hold(mask: anymask.Mask, model: nn.Module) -> bool:
    return all(not bool(p[~mask[name]].any()) and bool(p[mask[name]].any()) for name, p in mask.check(model).items())


# -- wrappers ----------------------------------------------------------------------------------------------------------


def test_a_recipe_on_a_compiled_model_trains_as_on_the_plain_one() -> None:
    trained = []
    for wrap in (lambda model: model, compiled):
        inner = net()
        model = wrap(inner)
        model(loader()[0][0])  # a graph without ghosts is there already
        inner.load_state_dict(net().state_dict())
        mask = anymask.prune(inner, "magnitude", sparsity=0.5)
        assert list(prunable(model)) == list(mask)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        anymask.hold(mask, model, optimizer)
        data = loader()
        running = Recipe.preset("tost").attach(model, optimizer, total_steps=len(data), example=data[0][0], data=data)
        for x, y in data:
            running.loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            running.step()
        assert not any("_orig_mod" in key for key in running.plain_state_dict())
        assert running.finish() is model
        assert zeros_hold(mask, model)
        trained.append(inner.state_dict())
    torch._dynamo.reset()
    for key, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][key], rtol=1e-4, atol=1e-5)


def test_ghosts_come_into_and_leave_a_graph_that_was_compiled_before() -> None:
    inner, (x, _) = net().eval(), loader()[0]
    model = compiled(inner)
    plain = model(x)
    recipe = Recipe((GhostActivation(schedule=Schedule("step", full="50%", end="50%")),))
    running = recipe.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4)
    torch.testing.assert_close(model(x), inner(x), rtol=1e-5, atol=1e-6)  # uncompiled, the native kernel softens
    assert not torch.allclose(model(x), plain, atol=1e-4)
    for _ in range(4):
        running.step()
    running.finish()
    assert torch.equal(model(x), plain)
    torch._dynamo.reset()


def test_data_parallel_is_refused_by_a_recipe_and_held() -> None:
    model = nn.DataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TechniqueError, match="DistributedDataParallel"):
        Recipe((LabelSmoothing(),)).attach(model, optimizer, total_steps=2)
    mask = anymask.prune(model.module, "random", sparsity=0.5)
    anymask.hold(mask, model, optimizer)
    assert zeros_hold(mask, model)


def test_flat_parameters_are_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # a real one needs a process group
    nn.Module.__init__(flat)
    mask = anymask.Mask({"weight": torch.eye(2)})
    with pytest.raises(MaskError, match="fully_shard"):
        mask.check(nn.Sequential(flat))


# -- refusals of several techniques ------------------------------------------------------------------------------------


class Gelus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)))


def test_all_that_refuse_are_named_at_once_with_the_recipe_without_them() -> None:
    model = Gelus()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, marks = {key: value.clone() for key, value in model.state_dict().items()}, fingerprint(model)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(TechniqueError, match=r"2 of the 4 techniques.*ghost_activation found.*ghost_skip found") as caught:
        Recipe.preset("tost").attach(model, optimizer, total_steps=40, example=x, data=[(x, y)])
    assert caught.value.fix == "use Recipe.preset('tost:-ghost_activation,-ghost_skip')"
    assert fingerprint(model) == marks  # LRsI, which comes first, had found its scales by then
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    named = re.search(r"'(.*)'", caught.value.fix)
    assert named is not None
    running = Recipe.preset(named[1]).attach(model, optimizer, total_steps=40, example=x, data=[(x, y)])
    assert set(running.found) == {"lrsi", "label_smoothing"}
    assert not torch.equal(model.first.weight, before["first.weight"])


def test_one_refusal_keeps_its_own_words_and_a_recipe_of_ones_own_names_without() -> None:
    model = Gelus()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TechniqueError, match="ghost_activation found nothing") as caught:
        Recipe((GhostActivation(), LabelSmoothing())).attach(model, optimizer, total_steps=9)
    assert caught.value.fix.endswith("or use recipe.without('ghost_activation')")


# -- inputs of any kind ------------------------------------------------------------------------------------------------


class Keyed(nn.Module):
    """Takes two tensors and a flag by keyword, and gives its logits in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.act, self.last = nn.Linear(4, 6), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor, twice: bool = False) -> dict[str, torch.Tensor]:
        hidden = self.act(self.left(left) + self.right(right))
        return {"logits": self.last(hidden * 2 if twice else hidden)}


def keyed(count: int) -> list[tuple[dict[str, object], torch.Tensor]]:
    torch.manual_seed(1)
    return [({"left": torch.randn(6, 4), "right": torch.randn(6, 2), "twice": True}, torch.arange(6) % 3) for _ in range(count)]


def test_keyword_and_positional_inputs_give_the_same_scales() -> None:
    settings, found = RescaleSettings(iterations=5), []
    for batches in (keyed(3), [(tuple(x.values()), y) for x, y in keyed(3)]):
        found.append(rescale(Keyed(), batches, settings=settings).scales)
    assert found[0] == found[1]
    once = [({**x, "twice": False}, y) for x, y in keyed(3)]
    assert rescale(Keyed(), once, settings=settings).scales != found[0]  # the flag is passed on


def test_a_lone_batch_of_keyword_inputs_is_cut_in_its_halves() -> None:
    settings, (x, y) = RescaleSettings(iterations=5), keyed(1)[0]
    cuts = [slice(0, 3), slice(3, 6)]
    halves = [({k: v[cut] if isinstance(v, torch.Tensor) else v for k, v in x.items()}, y[cut]) for cut in cuts]
    assert rescale(Keyed(), [(x, y)], settings=settings).scales == rescale(Keyed(), halves, settings=settings).scales


def test_batches_of_other_lengths_are_refused_or_kept_apart() -> None:
    class Pooled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).mean(1)

    batches = [(torch.randn(6, length, 4), torch.arange(6) % 3) for length in (5, 7)]
    with pytest.raises(TechniqueError, match="overlap = 0"):
        rescale(Pooled(4, 3), batches, settings=RescaleSettings(iterations=3))
    assert len(rescale(Pooled(4, 3), batches, settings=RescaleSettings(iterations=3, overlap=0.0)).norms) == 3


def test_a_recipe_on_keyword_inputs() -> None:
    model, data = Keyed(), keyed(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask = anymask.prune(model, "magnitude", sparsity=0.5)
    anymask.hold(mask, model, optimizer)
    recipe = Recipe((LRsI(at_most="100%", settings=RescaleSettings(iterations=4)), GhostActivation(), LabelSmoothing()))
    running = recipe.attach(model, optimizer, total_steps=len(data), example=data[0][0])
    assert "labels drawn" in running.found["lrsi"]
    for x, y in data:
        running.loss(model(**x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
    running.finish()
    assert zeros_hold(mask, model)


# -- loops of other people ---------------------------------------------------------------------------------------------


def start(total: int, *, state: dict | None = None):
    model = net()
    mask = anymask.prune(model, "magnitude", sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    anymask.hold(mask, model, optimizer)
    data = loader()
    running = Recipe.preset("tost").attach(model, optimizer, total_steps=total, example=data[0][0], data=data, state=state)
    return model, mask, optimizer, running, data


def test_mixed_precision_with_a_scaler_and_clipping() -> None:
    model, mask, optimizer, running, data = start(8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for x, y in data:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = running.loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        running.step()
    running.finish()
    assert zeros_hold(mask, model)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_accumulated_gradients_count_one_step_an_update() -> None:
    model, mask, optimizer, running, data = start(4)
    for place, (x, y) in enumerate(data):
        (running.loss(model(x), y) / 2).backward()
        if place % 2:
            optimizer.step()
            optimizer.zero_grad()
            running.step()
    running.finish()
    assert running.position == 4
    assert zeros_hold(mask, model)


def test_a_checkpoint_in_the_middle_goes_on_to_the_same_weights(tmp_path) -> None:
    def steps(running, model, optimizer, batches):
        for x, y in batches:
            running.loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            running.step()

    model, mask, optimizer, running, data = start(8)
    steps(running, model, optimizer, data[:3])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recipe": running.state_dict()}, tmp_path / "c.pt")
    steps(running, model, optimizer, data[3:])
    through = running.finish().state_dict()

    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    model, mask, optimizer, running, data = start(8, state=saved["recipe"])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(running, model, optimizer, data[3:])
    resumed = running.finish().state_dict()
    assert all(torch.equal(value, through[key]) for key, value in resumed.items())
    assert zeros_hold(mask, model)
