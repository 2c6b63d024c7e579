"""A held mask, by every optimiser of torch.optim: weights, gradients and slots are exactly 0 where masked; the rest trains as ever."""

import copy
import inspect
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.optim import Optimizer

from anymask import Mask, hold, holding

OPTIMIZERS = {name: kind for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and issubclass(kind, Optimizer)}
del OPTIMIZERS["Optimizer"]
MORE = [  # beside the defaults of each: what changes which slots there are, where they begin, or which code runs
    *[
        (name, {"foreach": True})
        for name in ("SGD", "Adam", "AdamW", "Rprop", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Adafactor")
    ],
    *[(name, {"fused": True}) for name in ("SGD", "Adam", "AdamW", "Adagrad")],
    *[(name, {"maximize": True}) for name in ("SGD", "AdamW", "Rprop", "SparseAdam")],
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.5, "fused": True}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.1, "fused": True}),
    ("Adagrad", {"initial_accumulator_value": 0.3, "weight_decay": 0.1}),
    ("Adagrad", {"initial_accumulator_value": 0.3, "eps": 0.0}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("ASGD", {"t0": 1, "lambd": 0.1}),
    ("Adafactor", {"weight_decay": 0.1}),
    ("Muon", {"nesterov": False, "weight_decay": 0.0}),
    ("LBFGS", {"line_search_fn": "strong_wolfe", "max_iter": 4}),
]
CASES = [*[(name, {}) for name in OPTIMIZERS], *MORE]
IDS = ["-".join([name, *map(str, options)]) for name, options in CASES]


# -- a net of each kind, and its training with and without `hold` ------------------------------------------------------


class Rows(nn.Module):
    """An embedding with sparse gradients, as SparseAdam wants them."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(7, 4, sparse=True)

    def forward(self, numbers, kept=None):
        found = self.rows(numbers)
        return found if kept is None else found * kept["rows.weight"][numbers]


class Dense(nn.Module):
    """Matrices only, as Muon wants them; the second one is not masked."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, x, kept=None):
        weight = self.first.weight if kept is None else self.first.weight * kept["first.weight"]
        return self.second(torch.tanh(F.linear(x, weight)))


def task(name):
    """A model, a mask for it, and a batch."""
    seed = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    if name == "SparseAdam":
        return Rows(), Mask({"rows.weight": torch.rand(7, 4, generator=seed) < 0.4}), torch.tensor([0, 2, 2, 5, 6])
    return Dense(), Mask({"first.weight": torch.rand(5, 6, generator=seed) < 0.4}), torch.randn(5, 6, generator=seed)


def make(name, model, options):
    return OPTIMIZERS[name](model.parameters(), **{"lr": 0.05, **options})


def train(model, optimizer, x, *, steps=4, kept=None, each=lambda: None):
    """Least squares towards 1; with `kept`, the reference: weights multiplied by the mask in every forward pass."""

    def closure():
        optimizer.zero_grad()
        loss = ((model(x) if kept is None else model(x, kept)) - 1).square().mean()
        loss.backward()
        return loss

    needs_closure = inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty
    for _ in range(steps):
        if needs_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        each()


def dense(gradient):
    return gradient.to_dense() if gradient.is_sparse else gradient


def assert_zero_where_masked(mask, model, *optimizers):
    for name, parameter in mask.check(model).items():
        pruned = ~mask[name]
        stored = [slot for optimizer in optimizers for slot in optimizer.state[parameter].values() if torch.is_tensor(slot)]
        gradients = [] if parameter.grad is None else [dense(parameter.grad)]
        for tensor in [parameter, *gradients, *stored]:
            if tensor.shape == parameter.shape:
                assert not tensor[pruned].any(), name  # NaN counts as true


@pytest.fixture(params=["one by one", "together"])
def zeroed(request, monkeypatch):
    """How: `together` is what small weights on a GPU are."""
    if request.param == "together":
        monkeypatch.setattr(holding, "_few", lambda tensor: True)


@pytest.mark.usefixtures("zeroed")
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_zero_where_masked_after_each_step_and_the_rest_trains_as_in_a_masked_forward(name, options):
    model, mask, x = task(name)
    mask.apply(model)
    reference = copy.deepcopy(model)
    names = [n for n, _ in model.named_parameters()]
    optimizer, plain = make(name, model, options), make(name, reference, options)
    hold(mask, model, optimizer)
    train(model, optimizer, x, each=lambda: assert_zero_where_masked(mask, model, optimizer))
    train(reference, plain, x, kept={n: mask[n].float() for n in mask})
    assert [n for n, _ in model.named_parameters()] == names
    for (n, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert list(optimizer.state[p]) == list(plain.state[q])
        kept = mask[n] if n in mask else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p[kept], q[kept])
        assert not torch.equal(p, dict(task(name)[0].named_parameters())[n])


def test_an_optimiser_that_mixes_entries_does_revive_weights_where_nothing_holds_them():
    model, mask, x = task("Muon")
    mask.apply(model)
    train(model, make("Muon", model, {}), x, kept={n: mask[n].float() for n in mask})
    assert model.first.weight[~mask["first.weight"]].any()  # else the test above would pass without `hold`


def test_the_flat_history_of_lbfgs_is_zero_where_masked():
    model, mask, x = task("LBFGS")
    optimizer = make("LBFGS", model, {})
    hold(mask, model, optimizer)
    train(model, optimizer, x)
    pruned = torch.cat([~mask["first.weight"].reshape(-1), torch.zeros(20, dtype=torch.bool)])
    state = optimizer.state[model.first.weight]
    for flat in [state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]]:
        assert flat.any()
        assert not flat[pruned].any()


# -- any net, any mask -------------------------------------------------------------------------------------------------


def test_weights_that_are_zeroed_together_may_change_their_type_and_the_mask_may_move(monkeypatch):
    monkeypatch.setattr(holding, "_few", lambda tensor: True)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    here, there = torch.tensor([[1, 0, 0], [1, 1, 0]]), torch.tensor([[0, 0, 1], [1, 0, 1]])
    held = hold(Mask({"weight": here}), model, optimizer)
    for kept, change in ((here, nn.Module.bfloat16), (there, nn.Module.double), (here, nn.Module.float)):
        train(model, optimizer, torch.randn(4, 3).to(model.weight))
        assert_zero_where_masked(held.mask, model, optimizer)
        change(model)
        optimizer.state.clear()
        held.move(Mask({"weight": kept}))
        train(model, optimizer, torch.randn(4, 3).to(model.weight))
        assert_zero_where_masked(held.mask, model, optimizer)
        assert model.weight[kept.bool()].all()


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.sampled_from(
        [("SGD", {"momentum": 0.9}), ("AdamW", {"weight_decay": 0.1}), ("Rprop", {}), ("Adagrad", {"initial_accumulator_value": 0.1})]
    ),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_any_net_under_any_mask_trains_as_in_a_masked_forward(widths, optimiser, density, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    mask = Mask({name: torch.rand(p.shape) < density for name, p in model.named_parameters()})
    mask.apply(model)
    reference, x = copy.deepcopy(model), torch.randn(3, widths[0])
    optimizer, plain = make(optimiser[0], model, optimiser[1]), make(optimiser[0], reference, optimiser[1])
    hold(mask, model, optimizer)
    for _ in range(3):
        for each in (optimizer, plain):
            each.zero_grad()
        masked = {name: p * mask[name] for name, p in reference.named_parameters()}
        (model(x) - 1).square().sum().backward()
        (functional_call(reference, masked, x) - 1).square().sum().backward()
        for each in (optimizer, plain):
            each.step()
        assert_zero_where_masked(mask, model, optimizer)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q * mask[name])
