"""What every row of DYNAMIC promises. A new row is tested here without a line being written."""

import copy
import io
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anymask
from anymask.errors import SettingError
from anymask.holding import held
from anymask.pruning.dynamic import DYNAMIC, Dynamic, dense_mask
from anymask.pruning.rewiring import rewired
from tests.contracts.test_methods import Tied
from tests.test_hold import assert_zero_where_masked
from tests.test_hold_life import hooks

STEPS, EVERY, END = 12, 2, 9  # updates after steps 2, 4, 6, 8; a mask that shrinks has its last one after step 9
every_row = pytest.mark.parametrize("method", DYNAMIC)


def conv_net():
    """With a depth-wise and a grouped convolution."""
    layers = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


NETS = {
    "conv": (conv_net, (2, 7, 7)),
    "tied": (Tied, (6,)),
    "a layer of one weight": (lambda: nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 1), nn.Linear(1, 5), nn.Linear(5, 5)), (6,)),
}
OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "AdamW": {"lr": 0.01},
    "Adagrad": {"lr": 0.05, "initial_accumulator_value": 0.3},
    "Rprop": {"lr": 0.01},
}


class Training:
    """A net, its optimiser, its mask, and batches; `rewiring` moves the mask unless told otherwise."""

    def __init__(self, method, net="linear", *, optimizer="SGD", sparsity=0.6, mask=None, dtype=torch.float64, **how):
        build, shape = {**NETS, "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), (6,))}[net]
        torch.manual_seed(1)
        self.model = build().to(dtype)
        self.data = [torch.randn(8, *shape, dtype=dtype) for _ in range(STEPS)]
        self.optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), **OPTIMIZERS[optimizer])
        self.row = DYNAMIC[method]
        self.hold = anymask.hold(mask or first_mask(self.row, self.model, sparsity), self.model, self.optimizer)
        self.how = {"total_steps": STEPS, "every": f"{EVERY}it", "end": f"{END}it", **({"sparsity": sparsity} if self.row.shrinks else {})}
        self.rewiring = anymask.rewire(self.hold, method, **{**self.how, **how})

    def loss(self, x):
        return (self.model(x) - 1).square().mean()

    def step(self, x):
        self.optimizer.zero_grad()
        self.loss(x).backward()
        self.optimizer.step()

    def masks(self, first=0, last=STEPS):
        """The mask after each step."""
        found = []
        for x in self.data[first:last]:
            self.step(x)
            found.append(self.hold.mask)
        return found


def first_mask(row, model, sparsity):
    return dense_mask(model) if row.start == "dense" else anymask.prune(model, row.start, sparsity=sparsity)


def counts(mask):
    return {name: int(mask[name].sum()) for name in mask}


def test_rows_are_filed_under_their_own_names_and_describe_themselves_in_a_line():
    assert all(isinstance(row, Dynamic) and row.name == name for name, row in DYNAMIC.items())
    assert all(row.about and "\n" not in row.about and len(row.about) <= 80 for row in DYNAMIC.values())
    assert {"set", "rigl", "gmp"} <= set(DYNAMIC)
    assert all(row.start == "dense" or row.start in anymask.pruning.METHODS for row in DYNAMIC.values())


# -- budgets -----------------------------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("net", NETS)
@pytest.mark.filterwarnings("ignore::anymask.pruning.CollapseWarning")
def test_the_budget_is_exact_after_every_step_and_pruned_weights_are_zero(method, net):
    training = Training(method, net)
    first = counts(training.hold.mask)
    total, size = training.hold.mask.total, {name: p.numel() for name, p in training.hold.parameters.items()}
    for number, x in enumerate(training.data, 1):
        training.step(x)
        now = counts(training.hold.mask)
        assert_zero_where_masked(training.hold.mask, training.model, training.optimizer)
        if not training.row.shrinks:
            assert now == first
        else:
            left = (1 - min(number // EVERY * EVERY if number < END else END, END) / END) ** 3
            assert all(abs(now[name] - max(1, n * (1 - 0.6 * (1 - left)))) <= 1 for name, n in size.items())
    assert training.rewiring.settled
    assert training.hold.mask.kept == (round(0.4 * total) if training.row.shrinks else sum(first.values()))
    assert [move.step for move in training.rewiring.history] == [2, 4, 6, 8] + [9] * training.row.shrinks
    assert any(move.dropped for move in training.rewiring.history)


@every_row
def test_the_history_says_what_moved(method):
    training = Training(method)
    before = training.hold.mask
    training.masks(0, 2)
    after, (move,) = training.hold.mask, training.rewiring.history
    assert (move.step, training.rewiring.mask) == (2, after)
    assert move.dropped == sum(int((before[n] & ~after[n]).sum()) for n in before) > 0
    assert move.grown == sum(int((after[n] & ~before[n]).sum()) for n in before)
    assert (move.grown == 0) if training.row.shrinks else (move.grown == move.dropped)
    assert after.info["rewire"] == method


@every_row
def test_a_mask_that_shrinks_never_brings_a_weight_back_and_others_move_less_and_less(method):
    training = Training(method)
    masks = [training.hold.mask, *training.masks()]
    if training.row.shrinks:
        assert all(not (new[n] & ~old[n]).any() for old, new in pairwise(masks) for n in new)
    else:
        assert all(a.fraction > b.fraction for a, b in pairwise(training.rewiring.history))


# -- chance ------------------------------------------------------------------------------------------------------------


@every_row
def test_the_same_seed_gives_the_same_masks_and_the_global_random_state_is_left_alone(method):
    first = Training(method, seed=3).masks()
    again = Training(method, seed=3)
    torch.manual_seed(99)
    before = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    assert again.masks() == first
    assert (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())) == before


@every_row
def test_ties_are_decided_by_the_seed(method):
    finals = []
    for seed in (0, 0, 1):
        training = Training(method, seed=seed, optimizer="SGD")
        with torch.no_grad():
            for name, p in training.hold.parameters.items():
                p.copy_(0.25 * training.hold.mask[name])
        training.data = [torch.zeros_like(x) for x in training.data]  # no gradient reaches the first weight
        finals.append(training.masks()[-1]["0.weight"])
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


# -- optimisers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, row in DYNAMIC.items() if not row.shrinks])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_grown_weight_begins_at_zero_with_slots_of_zero_and_trains_from_there(method, optimizer):
    training = Training(method, optimizer=optimizer)
    before = training.hold.mask
    training.masks(0, 2)
    grown = {name: training.hold.mask[name] & ~before[name] for name in before}
    assert any(t.any() for t in grown.values())
    for name, p in training.hold.parameters.items():
        slots = [s for s in training.optimizer.state[p].values() if torch.is_tensor(s) and s.shape == p.shape]
        assert slots
        assert not any(t[grown[name]].any() for t in (p, *slots))
        assert all(slot[~grown[name] & training.hold.mask[name]].any() for slot in slots)  # the others go on
    training.masks(2, 3)
    assert any(p[grown[name]].any() for name, p in training.hold.parameters.items())


@every_row
def test_accumulated_batches_move_the_mask_as_their_union_does(method):
    whole, parts = Training(method), Training(method)
    for x in whole.data:
        whole.step(x)
        parts.optimizer.zero_grad(set_to_none=False)
        for part in x.split(4):
            (parts.loss(part) / 2).backward()
        parts.optimizer.step()
        assert parts.hold.mask == whole.hold.mask
    assert len(whole.rewiring.history) >= 4


@every_row
def test_clipping_and_gradient_scaling_do_not_change_where_it_moves_at_first(method):
    """By the raw gradient; a skipped step counts for nothing, and what it brought is not counted either."""
    plain, scaled = Training(method), Training(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plain.masks(0, 4)
    for number, x in enumerate(scaled.data[:4]):
        for factor in [1e307, 1.0] if number == 1 else [1.0]:  # the first one overflows, where the mask is to move
            scaled.optimizer.zero_grad()
            scaler.scale(scaled.loss(x) * factor).backward()
            scaler.unscale_(scaled.optimizer)
            nn.utils.clip_grad_norm_(scaled.model.parameters(), 1e6)
            scaler.step(scaled.optimizer)
            scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert scaled.hold.mask == plain.hold.mask
    assert [move.step for move in scaled.rewiring.history] == [2, 4]


@every_row
def test_under_mixed_precision_the_budget_holds(method):
    training = Training(method, "conv", dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    for x in training.data:
        training.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = training.loss(x)
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        assert_zero_where_masked(training.hold.mask, training.model, training.optimizer)
    assert training.rewiring.settled
    assert len(training.rewiring.history) >= 4


@every_row
@pytest.mark.parametrize("move", [{"dtype": torch.float32}, {"memory_format": torch.channels_last}])
def test_a_model_that_is_converted_in_between_moves_on(method, move):
    training = Training(method, "conv")
    training.masks(0, 3)
    training.model.to(**move)
    training.data = [x.to(**move) for x in training.data]
    for x in training.data[3:]:
        training.step(x)
        assert_zero_where_masked(training.hold.mask, training.model, training.optimizer)
    assert [m.step for m in training.rewiring.history] == [2, 4, 6, 8] + [9] * training.row.shrinks


@every_row
def test_a_compiled_model_moves_as_the_plain_one_and_is_compiled_once(method):  # 2 s each: aot_eager is enough to see graphs change
    torch._dynamo.reset()
    plain, compiled = Training(method), Training(method)
    network = torch.compile(compiled.model, backend="aot_eager")
    compiled.loss = lambda x: (network(x) - 1).square().mean()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled.masks() == plain.masks()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    torch._dynamo.reset()


# -- resume ------------------------------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("at", [1, 2, 3, 8, 10])
def test_a_training_goes_on_bit_for_bit_from_state_dicts(method, at):
    training = Training(method, optimizer="AdamW", seed=5)
    training.masks(0, at)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (training.rewiring, training.model, training.optimizer)], file)
    expected = training.masks(at)
    file.seek(0)
    state, weights, slots = torch.load(file, weights_only=True)
    resumed = Training(method, optimizer="AdamW", seed=5, state=state)
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(slots)
    assert resumed.masks(at) == expected
    assert resumed.rewiring.history == training.rewiring.history
    assert all(torch.equal(p, q) for p, q in zip(resumed.model.parameters(), training.model.parameters(), strict=True))


@every_row
def test_a_state_of_other_settings_is_refused_and_leaves_nothing(method):
    training = Training(method)
    training.masks(0, 2)
    other = Training(method, seed=1)
    other.rewiring.release()
    before = other.hold.mask
    with pytest.raises(SettingError, match="other seed"):
        anymask.rewire(other.hold, method, **other.how, seed=1, state=training.rewiring.state_dict())
    assert rewired(other.optimizer) is None
    assert other.hold.mask == before


# -- release -----------------------------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("by", ["rewiring", "hold"])
def test_released_it_moves_no_more_and_leaves_no_hook(method, by):
    training = Training(method)
    training.masks(0, 3)
    mask = training.hold.mask
    (training.rewiring if by == "rewiring" else training.hold).release()
    training.rewiring.release()
    assert rewired(training.optimizer) is None
    assert all(m == mask for m in training.masks(3))
    training.hold.release()
    assert not any(hooks(training.model, training.optimizer))
    assert held(training.optimizer) is None


@every_row
def test_a_copy_of_the_model_is_a_plain_one(method):
    training = Training(method)
    training.masks(0, 1)  # an update is due: gradients are heard
    twin = copy.deepcopy(training.model)
    assert not any(hooks(twin, torch.optim.SGD(twin.parameters(), lr=0.1)))


@every_row
def test_it_trains_a_network(method):
    """Moving the mask is no hindrance to learning: the loss falls, here by more than half."""
    training = Training(method, optimizer="AdamW", every="10it", end="150it", total_steps=200)
    x = torch.cat(training.data)
    target = F.one_hot((x[:, :4]).argmax(1), 4).double()
    losses = []
    for _ in range(200):
        training.optimizer.zero_grad()
        loss = (training.model(x) - target).square().mean()
        loss.backward()
        training.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert training.rewiring.settled
