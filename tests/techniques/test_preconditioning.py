"""Preconditioning: its matrices against those of NumPy, neuron by neuron; what it does to a training; who cannot have it."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anymask
from anymask import Mask, Recipe, hold, models, prune
from anymask.errors import SettingError, TechniqueError
from anymask.kernels import available
from anymask.prunables import compact
from anymask.techniques import GradientCorrection, Preconditioning, SignIn, neuron_blocks, preconditioning
from anymask.techniques.neuron_blocks import Blocks, inputs_of, inverse_root


def place(kept: Tensor, *, groups: int = 1, block: int = 32, dtype: torch.dtype = torch.float32) -> Blocks:
    weight = torch.empty(kept.shape, dtype=dtype)
    return Blocks(kept.shape, kept.flatten().nonzero()[:, 0], weight, groups=groups, block=block, compact=False)


@settings(max_examples=40)
@given(
    neurons=st.integers(1, 5),
    fan=st.integers(1, 40),
    groups=st.sampled_from([1, 2]),
    power=st.sampled_from([0.5, 1.0]),
    strength=st.sampled_from([0.0, 0.4, 1.0]),
    native=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_neuron_gets_the_inverse_root_of_its_own_inputs_covariance(neurons, fan, groups, power, strength, native, seed):  # noqa: PLR0917
    rng = np.random.default_rng(seed)
    kept = rng.random((neurons * groups, fan)) < 0.6
    kept[0, 0] = True
    x, g = rng.normal(size=(50, fan * groups)) + 1, rng.normal(size=kept.shape) * kept
    places = place(torch.from_numpy(kept), groups=groups, dtype=torch.float32 if native else torch.float64, block=40)
    covariances = places.covariances(torch.from_numpy(x))
    gradient = torch.from_numpy(g.copy())
    places.multiply(gradient, places.roots(covariances, power=power, damping=0.1), strength=strength)

    right = np.zeros_like(g)
    for i, row in enumerate(kept):
        if row.any():
            of_group = x[:, (i // neurons) * fan : (i // neurons + 1) * fan][:, row]
            c = np.cov(of_group, rowvar=False, bias=True).reshape(row.sum(), row.sum())
            values, vectors = np.linalg.eigh(c / np.diag(c).mean() + 0.1 * np.eye(len(c)))
            right[i, row] = (vectors * values**-power) @ vectors.T @ g[i, row]
    right *= np.linalg.norm(g) / np.linalg.norm(right)
    if power == 0.5 and not native:  # as on a GPU
        other = torch.from_numpy(g.copy())
        places.multiply(other, places.square_roots(covariances, damping=0.1), strength=strength)
        np.testing.assert_allclose(other.numpy(), gradient.numpy(), rtol=1e-8, atol=1e-10)
    near = {"rtol": 1e-4, "atol": 1e-5} if native else {"rtol": 1e-8, "atol": 1e-10}
    np.testing.assert_allclose(gradient.numpy(), strength * right + (1 - strength) * g, **near)
    assert not gradient.numpy()[~kept].any()


@settings(max_examples=40)
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=6), block=st.integers(1, 12), seed=st.integers(0, 99))
def test_blocks_hold_each_kept_weight_once_and_no_more_than_they_may(counts, block, seed):
    counts = [*counts, 1]
    kept = torch.zeros(len(counts), 30, dtype=torch.bool)
    for row, count in zip(kept, counts, strict=True):
        row[torch.randperm(30, generator=torch.Generator().manual_seed(seed))[:count]] = True
    places = place(kept, block=block)
    assert places.width <= block
    assert places.blocks == sum(math.ceil(count / block) for count in counts)
    assert sorted(places.order.tolist()) == list(range(int(kept.sum())))
    assert int(places.sizes.sum()) == int(kept.sum())
    neurons, inputs = kept.nonzero()[places.order].T
    assert torch.equal(places.inputs, inputs)
    assert all(len(set(block.tolist())) == 1 for block in neurons.split(places.sizes.tolist()))
    covariances = places.covariances(torch.randn(20, 30))
    torch.testing.assert_close(places.symmetric(places.lower(covariances)), covariances)
    again = places.symmetric(places.lower(covariances.mul_(1 + torch.rand_like(covariances) / 1e6)))  # as products are symmetric
    assert torch.equal(places.square_roots(again, damping=0.1), places.square_roots(covariances, damping=0.1))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 7, 6)),
        (nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2)), (2, 4, 7, 6)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 6)),
        (nn.Conv2d(4, 6, 1), (4, 7, 6)),
        (nn.Conv1d(4, 6, 3, padding=2, groups=2), (3, 4, 9)),
        (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 3, 5, 4)),
        (nn.Linear(5, 3), (2, 7, 5)),
    ],
    ids=str,
)
def test_what_is_drawn_is_what_outputs_see(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    seen = inputs_of(layer, x, samples=600, draws=torch.Generator().manual_seed(0))
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.flatten(1)  # (O, D of a group)
    parts = seen.view(600, groups, -1).unbind(1)
    made = torch.cat([p @ w.T for p, w in zip(parts, weight.chunk(groups), strict=True)], 1) + layer.bias
    out = layer(x)
    out = out.flatten(0, -2) if isinstance(layer, nn.Linear) else (out if out.ndim == len(layer.kernel_size) + 2 else out[None])
    every = out if isinstance(layer, nn.Linear) else out.movedim(1, -1).flatten(0, -2)  # (places, O)
    apart = torch.cdist(made, every, compute_mode="donot_use_mm_for_euclid_dist")
    assert apart.min(1).values.max() < 1e-4  # each drawn place is one of the layer's
    assert apart.min(0).values.max() < 1e-4  # and each of those is drawn sooner or later


def correlated(steps: int, *techniques: Any) -> float:
    """The loss of a sparse linear map after some steps on inputs that go up and down together."""
    torch.manual_seed(0)
    model = nn.Linear(40, 10)
    right = nn.Linear(40, 10)
    mask = prune(model, "random-uniform", sparsity=0.8, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    hold(mask, model, optimizer)
    mask.apply(right)
    running = Recipe(techniques).attach(model, optimizer, total_steps=steps, loss=F.mse_loss)
    for _ in range(steps):
        x = torch.randn(200, 40) + 4 * torch.randn(200, 1)
        loss = running.loss(model(x), right(x).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
    running.finish()
    assert not model.weight[~mask["weight"]].any()
    return float(loss.detach())


def test_correlated_inputs_are_learnt_faster() -> None:
    assert correlated(200, Preconditioning(every=20, power=1.0)) < 0.3 * correlated(200)


def trained(model: nn.Module, mask: Mask, *techniques: Any, sparse: bool = False, steps: int = 4) -> dict[str, Tensor]:
    x, y = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 5
    if sparse:
        anymask.to_sparse(model, mask, x, measure=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    hold(mask, model, optimizer)
    running = Recipe(techniques).attach(model, optimizer, total_steps=steps, example=x)
    for _ in range(steps):
        running.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
    running.finish()
    return {name: value.clone() for name, value in model.state_dict().items()}


def net() -> tuple[nn.Module, Mask]:
    model = models.build("resnet8-0.25x", classes=5, seed=0)
    mask = prune(model, "random-erk", sparsity=0.7, seed=0)
    mask.apply(model)
    return model, mask


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, stays: bool) -> None:
    """Without the kernels for a CPU and, where what is learned `stays` there, with roots by products."""
    monkeypatch.setattr(neuron_blocks.library, "available", lambda: False)
    monkeypatch.setattr(preconditioning, "_gpu", lambda _: stays)


def test_where_all_stays_on_a_gpu_it_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask = net()
    made = []
    for stays in (False, True):
        as_on_a_gpu(monkeypatch, stays=stays)
        made.append(trained(copy.deepcopy(model), mask, Preconditioning(every=2)))
    plain = trained(copy.deepcopy(model), mask)
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert any(not torch.allclose(plain[name], made[1][name], rtol=0.01) for name in plain)


@pytest.mark.parametrize("damping", [1e-9, 1e-3])
def test_covariances_that_are_not_quite_positive_have_the_roots_of_their_eigenvalues_on_a_gpu_too(
    damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch, stays=True)
    draws = torch.Generator().manual_seed(1)
    model, optimizer, _, running = single(damping=damping)
    step(model, optimizer, running, torch.randn(400, 1, generator=draws) @ torch.randn(1, 4, generator=draws))  # rank 1
    part = attached(running)
    exact = part._places["weight"].roots(part._covariances["weight"], power=0.5, damping=damping)
    torch.testing.assert_close(part._matrices["weight"], exact, rtol=1e-3, atol=1e-3 * float(exact.max()))


@pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")
def test_sparse_layers_are_trained_as_dense_ones_are() -> None:
    model, mask = net()
    technique = Preconditioning(every=2)
    dense = trained(copy.deepcopy(model), mask, technique)
    sparse = trained(model, mask, technique, sparse=True)
    assert compact(model)
    for name, value in dense.items():
        torch.testing.assert_close(sparse[name], value, rtol=1e-2, atol=1e-4, msg=name)


def test_its_place_in_the_recipe_does_not_matter() -> None:
    model, mask = net()
    others = [GradientCorrection(), Preconditioning(), SignIn(beta=0.7)]
    first, last = (trained(copy.deepcopy(model), mask, *order) for order in (others, others[::-1]))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_a_mask_that_moves_is_followed() -> None:
    model, mask = net()
    x, y = torch.randn(16, 3, 12, 12), torch.arange(16) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    held = hold(mask, model, optimizer)
    rewiring = anymask.rewire(held, "set", total_steps=12, every="3it", fraction=0.5)
    running = Recipe((Preconditioning(every=100),)).attach(model, optimizer, total_steps=12, example=x)
    looked = []
    for _ in range(12):
        looked.append(looks(running))
        running.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
        assert all(not model.get_parameter(name)[~kept].any() for name, kept in held.mask.items())
    assert sum(looked) == 1 + len(rewiring.history) > 2  # at first, and in the step after each move
    running.finish()


def single(
    *, rows: int = 3, every: int = 1, kept: Tensor | None = None, damping: float = 0.1
) -> tuple[nn.Module, torch.optim.Optimizer, Any, Any]:
    """A linear layer, its optimiser, its hold and a recipe of preconditioning alone."""
    model = nn.Linear(4, rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = hold(Mask({"weight": torch.ones(rows, 4) if kept is None else kept}), model, optimizer)
    return model, optimizer, held, Recipe((Preconditioning(every=every, damping=damping),)).attach(model, optimizer, total_steps=9)


def looks(running: Any) -> bool:
    return attached(running).looks


def attached(running: Any) -> Any:
    return running._live["preconditioning"][1]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, running: Any, x: Tensor) -> None:
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    running.step()


def test_inputs_without_variance_or_numbers_leave_the_weights_finite_and_the_matrices_old() -> None:
    model, optimizer, _, running = single()
    step(model, optimizer, running, torch.ones(2, 4))
    old = attached(running)._matrices["weight"].clone()
    model(torch.full((2, 4), math.inf))
    model.weight.grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(attached(running)._matrices["weight"], old)
    assert model.weight.isfinite().all()


def test_inputs_most_of_which_are_dead_have_finite_matrices() -> None:
    draws = torch.Generator().manual_seed(0)
    covariances = torch.zeros(2000, 32, 32)
    for matrix in covariances:
        live = torch.randperm(32, generator=draws)[: int(torch.randint(0, 9, (), generator=draws))]
        seen = torch.randn(len(live), len(live) + 1, generator=draws).relu()
        matrix[live[:, None], live] = seen @ seen.T
    assert inverse_root(covariances, power=0.5, damping=0.1).isfinite().all()


def test_steps_without_a_forward_pass_or_images_are_steps() -> None:
    model, optimizer, held, running = single()
    model.weight.grad = torch.zeros(3, 4)  # as torch.distributed.checkpoint makes one
    optimizer.step()
    step(model, optimizer, running, torch.randn(5, 4))
    step(model, optimizer, running, torch.empty(0, 4))
    model(torch.randn(5, 4)).sum().backward()
    held.move(Mask({"weight": torch.tril(torch.ones(3, 4))}))  # between backward and the step
    optimizer.step()
    held.move(Mask({"weight": torch.zeros(3, 4)}))
    step(model, optimizer, running, torch.randn(5, 4))
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("there", [False, True], ids=["on a CPU", "as on a GPU"])
@pytest.mark.parametrize("moves", ["no mask", "before the state", "after the state", "an older state"])
def test_a_training_that_goes_on_looks_when_it_would_have(moves: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if there:
        as_on_a_gpu(monkeypatch, stays=True)
    first, then = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 1]])
    model, optimizer, held, running = single(rows=1, every=100, kept=first)
    step(model, optimizer, running, torch.randn(9, 4))
    if moves == "before the state":
        held.move(Mask({"weight": then}))
        step(model, optimizer, running, torch.randn(9, 4))
    state = running.state_dict()
    if moves == "after the state":
        held.move(Mask({"weight": then}))
    expected = looks(running)
    assert expected == (moves == "after the state")
    if moves == "an older state":  # whose blocks lay in another order
        del state["parts"]["preconditioning"]["blocks.weight"]
        expected = True

    again = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    other = hold(Mask({"weight": first}), again, optimizer)
    resumed = Recipe((Preconditioning(every=100),)).attach(again, optimizer, total_steps=9, state=state)
    part, again_part = (of["parts"]["preconditioning"] for of in (state, resumed.state_dict()))  # saved again before its first step
    torch.testing.assert_close(again_part["covariance.weight"], part["covariance.weight"], rtol=0, atol=0)
    other.move(
        Mask({"weight": first if moves in {"no mask", "an older state"} else then})
    )  # as `fit` does: another object, whatever it holds
    assert looks(resumed) == expected
    if not expected:
        assert torch.equal(attached(resumed)._matrices["weight"], attached(running)._matrices["weight"])


def test_copies_and_pickles_of_the_model_are_not_heard() -> None:
    model, _, _, running = single()
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, loaded):
        assert torch.equal(other(torch.ones(2, 4)), model.eval()(torch.ones(2, 4)))
    assert not attached(running)._seen
    model.train()(input=torch.randn(3, 4))
    assert list(attached(running)._seen) == ["weight"]


def test_what_it_cannot_work_on_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TechniqueError, match="no mask"):
        Recipe((Preconditioning(),)).attach(model, optimizer, total_steps=1)
    hold(Mask({"1.weight": torch.tensor([1, 0])}), model, optimizer)
    with pytest.raises(TechniqueError, match="a masked convolution or linear layer"):
        Recipe((Preconditioning(),)).attach(model, optimizer, total_steps=1)
    for how, said in (({"power": 0.0}, "power"), ({"damping": 0.0}, "damping"), ({"every": 0}, "every"), ({"decay": 1.0}, "decay")):
        with pytest.raises(SettingError, match=said):
            Preconditioning(**how)


def test_compiled_layers_are_seen_within_watched_and_it_says_so_where_they_are_not() -> None:
    model, optimizer, _, running = single(every=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(8, 4)).sum().backward()
    with pytest.raises(TechniqueError, match="saw none of its layers"):
        optimizer.step()
    model, optimizer, _, running = single(every=2)
    graphs: list[int] = []
    compiled = torch.compile(model, backend=lambda graph, _: (graphs.append(1), graph.forward)[1], fullgraph=True)
    for number in range(4):
        with running.watched():
            out = compiled(torch.randn(8, 4))
        assert len(graphs) == (number > 0)  # the first is watched, and compiled is it once
        out.sum().backward()
        optimizer.step()
        running.step()
