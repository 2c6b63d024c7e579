"""A ghost network whose mask moves: both work together, and what is left is the plain network under the last mask."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anymask
from anymask import Recipe
from anymask.errors import TechniqueError
from anymask.pruning.dynamic import DYNAMIC, dense_mask
from anymask.schedules import Schedule
from anymask.surgery import fingerprint
from anymask.techniques import GhostActivation, GhostSkip, LabelSmoothing, LRsI, RescaleSettings
from tests.test_hold import assert_zero_where_masked
from tests.test_hold_life import hooks

STEPS = 12
LEARNED = Recipe(
    (
        LRsI(settings=RescaleSettings(iterations=2)),
        GhostActivation(Schedule("cosine", end="70%")),
        GhostSkip(Schedule("linear", end="60%"), kind="learned"),
        LabelSmoothing(),
    ),
    name="learned",
)
RECIPES = {"tost": Recipe.preset("tost"), "learned": LEARNED}


def begin(method, recipe):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = [(torch.randn(8, 1, 8, 8), torch.arange(8) % 3) for _ in range(STEPS)]
    mask = dense_mask(model) if method == "gmp" else anymask.prune(model, "random-erk", sparsity=0.7)
    before = fingerprint(model), list(model.state_dict())
    hold = anymask.hold(mask, model, optimizer)
    running = recipe.attach(model, optimizer, total_steps=STEPS, example=data[0][0], data=data)
    how = {"sparsity": 0.7} if method == "gmp" else {}
    rewiring = anymask.rewire(hold, method, total_steps=STEPS, every="2it", end="10it", **how)
    return model, optimizer, data, hold, running, rewiring, before


@pytest.mark.parametrize("method", DYNAMIC)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_ghost_network_whose_mask_moves_ends_plain_under_the_last_mask(method, recipe):
    model, optimizer, data, hold, running, rewiring, before = begin(method, RECIPES[recipe])
    first, ghosts = hold.mask, 0
    for x, y in data:
        ghosts += len(running.strengths) > 0 and running.strengths.get("ghost_skip", 0) > 0
        optimizer.zero_grad()
        running.loss(model(x), y).backward()
        optimizer.step()
        running.step()
        assert_zero_where_masked(hold.mask, model, optimizer)
    assert ghosts >= 3  # the mask moved while they lived
    assert len(rewiring.history) == (5 if method == "gmp" else 4)
    assert running.finish() is model
    hold.release()
    assert (fingerprint(model), list(model.state_dict())) == before
    assert not any(hooks(model, optimizer))
    assert len(optimizer.state) == len(list(model.parameters()))
    assert hold.mask != first
    assert sum(int((model.get_parameter(name) == 0).sum()) for name in hold.mask) == hold.mask.total - hold.mask.kept
    assert hold.mask.kept == round(0.3 * hold.mask.total)


@pytest.mark.parametrize("comes_back", [False, True])
def test_finish_knows_the_mask_as_it_is_even_after_release_and_finds_what_came_back(comes_back):
    model, optimizer, data, hold, running, _, _ = begin("set", RECIPES["tost"])
    first = hold.mask
    for x, y in data:
        running.loss(model(x), y).backward()
        optimizer.step()
        running.step()
    hold.release()
    if not comes_back:
        assert running.finish() is model
        return
    name = next(name for name in first if (first[name] & ~hold.mask[name]).any())
    place = tuple((first[name] & ~hold.mask[name]).nonzero()[0].tolist())  # kept at first, dropped since
    with torch.no_grad():
        model.get_parameter(name)[place] = 1.0
    with pytest.raises(TechniqueError, match="pruned weights are not 0"):
        running.finish()


def test_recipe_and_rewiring_resume_together():
    def go(parts, data):
        model, optimizer, _, hold, running, rewiring, _ = parts
        for x, y in data:
            optimizer.zero_grad()
            running.loss(model(x), y).backward()
            optimizer.step()
            running.step()
        return hold.mask, rewiring.history

    whole = begin("rigl", LEARNED)
    data = whole[2]
    go(whole, data[:5])
    model, optimizer, _, _, running, rewiring, _ = whole
    saved = [part.state_dict() for part in (running, rewiring)]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    slots = torch.utils._pytree.tree_map(lambda v: v.clone() if torch.is_tensor(v) else v, optimizer.state_dict())
    expected = go(whole, data[5:])
    model, optimizer, _, hold, running, rewiring, _ = begin("rigl", LEARNED)
    rewiring.release()
    running.finish(early=True)
    running = LEARNED.attach(model, optimizer, total_steps=STEPS, example=data[0][0], data=data, state=saved[0])
    rewiring = anymask.rewire(hold, "rigl", total_steps=STEPS, every="2it", end="10it", state=saved[1])
    model.load_state_dict(weights)
    optimizer.load_state_dict(slots)
    assert go((model, optimizer, None, hold, running, rewiring, None), data[5:]) == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole[0].parameters(), strict=True))
    assert F.cross_entropy(model(data[0][0]), data[0][1]).isfinite()
