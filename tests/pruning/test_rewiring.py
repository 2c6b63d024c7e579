"""Masks that move: one exchange, what it goes by, and where the edges are."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

import anymask
from anymask import Mask
from anymask.errors import MaskError, SettingError
from anymask.pruning.dynamic import DYNAMIC, Times, dense_mask, dynamic_of, exchange, lots
from anymask.pruning.gradients import DenseGradients
from anymask.surgery import fingerprint
from tests.pruning.test_rewiring_by_hand import LR, SHAPES, batches, mask_of, net

# -- one exchange ------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_dropped_and_grown_again_keeps_its_value_and_slots():
    """As in google-research/rigl: new connections are those that were not there before."""
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold = anymask.hold(Mask({"weight": torch.tensor([[1, 1, 0, 0]])}), model, optimizer)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 1.0, 0.0, 0.0]]))
    rewiring = anymask.rewire(hold, "rigl", total_steps=4, every="1it", end="100%", fraction=0.6)
    (model.weight * torch.tensor([[0.1, 5.0, 1.0, 2.0]])).sum().backward()  # the gradient is largest at the weight that is dropped
    optimizer.step()
    assert [(move.dropped, move.grown) for move in rewiring.history] == [(0, 0)]
    assert model.weight.tolist() == [[pytest.approx(3.99), pytest.approx(0.5), 0.0, 0.0]]
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[pytest.approx(0.1), 5.0, 0.0, 0.0]]


def test_random_growth_favours_no_place_and_may_bring_back_what_was_dropped():
    weight, kept = torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([True, True, False, False, False])
    grown = Counter()
    for seed in range(2000):
        new = exchange(DYNAMIC["set"], weight, kept, count=1, gradient=None, generator=lots(seed, 7))
        assert int(new.sum()) == 2
        assert new[0]
        grown[int((new[1:]).nonzero()) + 1] += 1
    assert set(grown) == {1, 2, 3, 4}
    assert all(abs(times - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75) for times in grown.values())


def test_lots_differ_between_steps_and_seeds():
    draws = {(seed, step): torch.rand(3, generator=lots(seed, step)).tolist() for seed in (0, 1, 2**40) for step in (0, 1, 10**6)}
    assert len({tuple(draw) for draw in draws.values()}) == 9


def test_rows_take_other_settings_and_epochs():
    assert dynamic_of("rigl", {"every": "1ep"}).every == "1ep"
    assert dynamic_of(DYNAMIC["set"], {"fraction": 0.5}) == dynamic_of("set", {"fraction": 0.5})
    times = Times.of(dynamic_of("set", {"every": "1ep", "begin": "2ep", "end": "50%"}), total=100, per_epoch=10)
    assert [step for step in range(101) if times.due(step)] == [30, 40]
    assert (times.passed(20), times.passed(35), times.passed(70)) == (0.0, 0.5, 1.0)


# -- what it goes by ---------------------------------------------------------------------------------------------------


def spoiled(value, *, at, kept=False, **options):
    """A net in which the gradient of a pruned (or kept) weight is `value` at step number `at`; held, not yet rewired."""
    model, mask, step = net(), mask_of(), Counter()
    place = tuple((mask["0.weight"] == kept).nonzero()[0].tolist())

    def spoil(gradient):
        step["now"] += 1
        gradient = gradient.clone()
        if step["now"] == at:
            gradient[place] = value
        return gradient

    model[0].weight.register_hook(spoil)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, **options)
    return model, optimizer, anymask.hold(mask, model, optimizer), place


def train(model, optimizer, count):
    for x in batches(count):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def test_a_gradient_that_is_nan_puts_the_move_off_until_it_is_not():
    model, optimizer, hold, _ = spoiled(math.nan, at=2)
    rewiring = anymask.rewire(hold, "rigl", total_steps=9, every="2it")
    train(model, optimizer, 5)
    assert [move.step for move in rewiring.history] == [3, 4]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_move_that_is_put_off_until_the_end_is_left_out():
    model, optimizer, hold, _ = spoiled(math.nan, at=2)
    rewiring = anymask.rewire(hold, "rigl", total_steps=9, every="2it", end="3it")
    train(model, optimizer, 5)
    assert rewiring.history == []
    assert rewiring.settled
    assert len(model[0].weight._backward_hooks) == 1  # the one of this test


def test_a_gradient_that_overflowed_at_a_pruned_place_grows_there():
    """No GradScaler sees it, for the gradient is masked: put off, it would come again at the same scale."""
    model, optimizer, hold, place = spoiled(math.inf, at=2)
    rewiring = anymask.rewire(hold, "rigl", total_steps=9, every="2it")
    train(model, optimizer, 2)
    assert [move.step for move in rewiring.history] == [2]
    assert hold.mask["0.weight"][place]
    train(model, optimizer, 2)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", DYNAMIC)
def test_weights_that_are_nan_are_not_ranked(method):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(dense_mask(model) if method == "gmp" else mask_of(), model, optimizer)
    before = hold.mask
    rewiring = anymask.rewire(hold, method, total_steps=9, every="1it", **({"sparsity": 0.5} if method == "gmp" else {}))
    with torch.no_grad():
        model[0].weight[hold.mask["0.weight"]] = math.nan
    train(model, optimizer, 3)
    assert rewiring.history == []
    assert hold.mask == before
    assert not rewiring.settled


def test_a_step_that_a_fused_optimiser_skipped_is_no_step():
    model, optimizer, hold, _ = spoiled(math.inf, at=1, kept=True, fused=True)
    rewiring = anymask.rewire(hold, "rigl", total_steps=9, every="1it")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = hold.mask
    for number, x in enumerate(batches(2)):
        optimizer.zero_grad()
        scaler.scale((model(x) - 1).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (hold.mask == before) == (number == 0)
    assert scaler.get_scale() == 1.0
    assert [move.step for move in rewiring.history] == [2]


def test_a_move_that_is_put_off_is_made_after_a_resume():
    model, optimizer, hold, _ = spoiled(math.nan, at=2)
    rewiring = anymask.rewire(hold, "rigl", total_steps=9, every="2it")
    train(model, optimizer, 2)
    state = rewiring.state_dict()
    rewiring.release()
    rewiring = anymask.rewire(hold, "rigl", total_steps=9, every="2it", state=state)
    train(model, optimizer, 1)
    assert [move.step for move in rewiring.history] == [3]


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_a_frozen_layer_is_left_alone_and_moves_when_it_is_thawed(method):
    model, mask = net(), mask_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(mask, model, optimizer)
    anymask.rewire(hold, method, total_steps=9, every="2it")
    model[0].weight.requires_grad_(False)
    train(model, optimizer, 3)
    assert torch.equal(hold.mask["0.weight"], mask["0.weight"])
    assert not torch.equal(hold.mask["2.weight"], mask["2.weight"])
    model[0].weight.requires_grad_(True)
    train(model, optimizer, 3)
    assert not torch.equal(hold.mask["0.weight"], mask["0.weight"])


def test_a_layer_that_got_no_gradient_is_left_alone_by_rigl():
    model, mask = net(), mask_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(mask, model, optimizer)
    anymask.rewire(hold, "rigl", total_steps=9, every="1it")
    model[0](batches()[0]).square().mean().backward()
    optimizer.step()
    assert torch.equal(hold.mask["2.weight"], mask["2.weight"])
    assert not torch.equal(hold.mask["0.weight"], mask["0.weight"])


@pytest.mark.parametrize("none", [True, False])
def test_gradients_are_summed_over_batches_and_what_is_thrown_away_is_not_counted(none):
    model, mask = net(), mask_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    anymask.hold(mask, model, optimizer)
    plain = net()
    mask.apply(plain)
    first, *rest = batches(3)
    heard = DenseGradients(
        dict(model.named_parameters()), {n: mask.get(n, torch.ones(p.shape).bool()) for n, p in model.named_parameters()}
    )
    (model(first) - 1).square().mean().backward()
    optimizer.zero_grad(set_to_none=none)
    for x in rest:
        (model(x) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3) if x is rest[-1] else None
        (plain(x) - 1).square().mean().backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(heard.mean()[name], p.grad)
    heard.remove()
    assert heard.mean() == {}


def test_gradients_are_heard_only_in_the_step_before_a_move():
    model, mask = net(), mask_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rewiring = anymask.rewire(anymask.hold(mask, model, optimizer), "rigl", total_steps=9, every="3it")
    listening = []
    for x in batches(9):
        listening.append(bool(model[0].weight._backward_hooks))
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert listening == [step in (3, 6) for step in range(1, 10)]
    assert rewiring.settled


def test_gradients_of_half_precision_and_of_embeddings_are_heard():
    for weight in (nn.Parameter(torch.ones(3, 2, dtype=torch.float16)), nn.Parameter(torch.ones(3, 2))):
        heard = DenseGradients({"w": weight}, {"w": torch.ones(3, 2, dtype=torch.bool)})
        for row in (0, 2, 2):
            nn.functional.embedding(torch.tensor([row]), weight, sparse=weight.dtype == torch.float32).sum().backward()
        found = heard.mean()["w"]
        assert found.tolist() == [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]
        assert found.dtype == torch.float32


# -- budgets and masks that do not go ----------------------------------------------------------------------------------


def shrink(model, mask, **how):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return anymask.rewire(anymask.hold(mask, model, optimizer), "gmp", **{"total_steps": 9, "every": "2it", **how})


def test_gradual_pruning_needs_a_sparsity_that_its_mask_can_shrink_to():
    model = net()
    with pytest.raises(SettingError, match="gmp came without sparsity"):
        shrink(model, dense_mask(model))
    with pytest.raises(SettingError, match=r"\[0, 1\)"):
        shrink(model, dense_mask(model), sparsity=1.0)
    with pytest.raises(MaskError, match="1 weights in 2 layers"):
        shrink(model, dense_mask(model), sparsity=0.98)
    with pytest.raises(MaskError, match="nothing to drop"):
        shrink(model, dense_mask(model), sparsity=0.0)
    with pytest.raises(MaskError, match=r"2\.weight \(3 of 11\).*scope='global'"):
        shrink(model, Mask({"0.weight": torch.ones(7, 6), "2.weight": torch.eye(3, 7)}), sparsity=0.5)
    with pytest.raises(MaskError, match="fewer weights"):
        shrink(model, mask_of(0.1), sparsity=0.5, scope="global")


def test_gradual_pruning_may_begin_with_a_sparse_mask():
    model, mask = net(), mask_of(0.8)
    rewiring = shrink(model, mask, sparsity=0.9, scope="global")
    train(model, rewiring.hold.optimizer, 9)
    assert rewiring.mask.kept == round(0.1 * 63)
    assert all(not (rewiring.mask[name] & ~mask[name]).any() for name in mask)


@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_gradual_pruning_goes_on_from_the_first_mask_or_the_latest(scope):
    masks = []
    for held in (dense_mask, None):
        model = net()
        rewiring = shrink(model, dense_mask(model), sparsity=0.9, scope=scope)
        train(model, rewiring.hold.optimizer, 3)
        state, mask = rewiring.state_dict(), rewiring.mask
        rewiring.hold.release()
        again = shrink(model, mask if held is None else held(model), sparsity=0.9, scope=scope, state=state)
        assert again.mask == mask
        train(model, again.hold.optimizer, 1)
        masks.append(again.mask)
    assert masks[0] == masks[1] != mask


@pytest.mark.parametrize("scope", ["global", "uniform", "er", "erk", "balanced"])
def test_gradual_pruning_leaves_each_layer_a_weight(scope):
    model = net()
    with torch.no_grad():
        model[2].weight *= 1e-9
    rewiring = shrink(model, dense_mask(model), sparsity=1 - 2 / 63, scope=scope)
    train(model, rewiring.hold.optimizer, 9)
    assert {name: int(rewiring.mask[name].sum()) for name in SHAPES} == {"0.weight": 1, "2.weight": 1}


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_a_mask_with_nothing_to_move_or_a_sparsity_too_many_is_refused(method):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(dense_mask(model), model, optimizer)
    with pytest.raises(MaskError, match="finds nothing to move"):
        anymask.rewire(hold, method, total_steps=9, every="1it")
    hold.release()
    hold = anymask.hold(mask_of(), model, optimizer)
    with pytest.raises(SettingError, match="keeps as many weights as its mask"):
        anymask.rewire(hold, method, total_steps=9, every="1it", sparsity=0.9)


def test_a_seed_that_the_first_update_could_not_use_is_refused_at_once():
    model = net()
    hold = anymask.hold(mask_of(), model, torch.optim.SGD(model.parameters(), lr=LR))
    with pytest.raises(SettingError, match=r"seed came as -1.*a whole number from 0"):
        anymask.rewire(hold, "set", total_steps=9, every="1it", seed=-1)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_full_layers_and_layers_of_one_kept_weight_stay(method):
    model = net()
    mask = Mask({"0.weight": torch.rand(7, 6) < 0.5, "2.weight": torch.ones(3, 7)})
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hold = anymask.hold(mask, model, optimizer)
    anymask.rewire(hold, method, total_steps=9, every="1it")
    train(model, optimizer, 5)
    assert hold.mask["2.weight"].all()
    assert not torch.equal(hold.mask["0.weight"], mask["0.weight"])


def test_the_model_and_its_names_are_as_they_were():
    model, mask = net(), mask_of()
    before = fingerprint(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rewiring = anymask.rewire(anymask.hold(mask, model, optimizer), "rigl", total_steps=9, every="1it")
    train(model, optimizer, 9)
    assert fingerprint(model) == before
    rewiring.release()
    assert not any(p._backward_hooks for p in model.parameters())
