"""HAM, Sign-In and gradient correction: their steps written out by hand, in float64, and the zeros of the mask through them."""

import numpy as np
import pytest
import torch
from torch import nn

from anymask import Mask, Recipe, hold
from anymask.errors import SettingError, TechniqueError
from anymask.prunables import prunable
from anymask.techniques import HAM, SAM, Averaging, DensityLR, GradientCorrection, SignIn, Technique

LR, STEPS = 0.05, 4


def trained(
    *techniques: Technique,
    momentum: float = 0.0,
    decay: float = 0.0,
    steps: int = STEPS,
    total: int = STEPS,
    sign: int = 1,
    bend: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """First and last weights (3, 4) of a linear map trained with `techniques` on sum(c * W) + bend * |W|^2, and the c of each step.

    Minimised, or with `sign` -1 turned round and maximised.
    """
    torch.manual_seed(3)
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, weight_decay=decay, maximize=sign < 0)
    hold(Mask({"weight": torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])}), model, optimizer)
    first = model.weight.detach().numpy().copy()
    constants = [np.random.default_rng(step).normal(size=(3, 4)) for step in range(steps)]
    running = Recipe(techniques).attach(model, optimizer, total_steps=total, loss=lambda output, _: output)
    for c in constants:
        curve = bend * model.weight.square().sum()
        running.loss(sign * ((model.weight * torch.from_numpy(c)).sum() + curve), None).backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
    running.finish(early=steps < total)
    return first, model.weight.detach().numpy(), constants


KEPT = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_ham_multiplies_after_each_step(momentum: float) -> None:
    w, last, constants = trained(HAM(alpha=3.0, beta=0.5), momentum=momentum)
    velocity = np.zeros_like(w)
    for c in constants:
        g = c * KEPT
        velocity = momentum * velocity + g
        w = w - LR * velocity
        w = w * np.exp(np.clip(LR * (-3.0 * np.sign(w) * g - 0.5), -5, 5))
    np.testing.assert_allclose(last, w, rtol=1e-12)
    assert not last[KEPT == 0].any()


@pytest.mark.parametrize("technique", [HAM(alpha=3.0), SAM(rho=0.5), SignIn(), DensityLR(), Averaging()], ids=lambda t: t.name)
def test_an_optimiser_that_maximises_what_others_minimise_ends_with_the_same_weights(technique: Technique) -> None:
    ends = [trained(technique, sign=sign, bend=1.0)[1] for sign in (1, -1)]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)


def test_an_exponent_of_ham_is_bounded() -> None:
    _, last, _ = trained(HAM(alpha=1e9, beta=0.0))
    assert np.isfinite(last).all()
    assert (np.abs(last[KEPT == 1]) > 0).all()  # by e^-5 a step, not to 0


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)])
def test_sign_in_steps_on_both_factors(momentum: float, decay: float) -> None:
    theta, last, constants = trained(SignIn(beta=0.7, every="2it"), momentum=momentum, decay=decay)
    slots = [np.zeros_like(theta), np.zeros_like(theta)]
    for step, c in enumerate(constants):
        g = c * KEPT
        if step % 2 == 0:
            m = np.sqrt((0.7 + np.sqrt(0.7**2 + 4 * theta**2)) / 2)
        w = theta / m
        slots = [momentum * slots[0] + g * m + decay * w, momentum * slots[1] + g * w + decay * m]
        w, m = w - LR * slots[0], m - LR * slots[1]
        theta = m * w * KEPT
    np.testing.assert_allclose(last, theta, rtol=1e-12)


@pytest.mark.parametrize("other", [DensityLR(), GradientCorrection(where="all"), HAM(alpha=3.0), SAM(rho=0.1)], ids=lambda t: t.name)
def test_sign_in_goes_with_others_wherever_it_stands(other: Technique) -> None:
    _, last, _ = trained(other, SignIn(beta=0.7), momentum=0.9)
    _, again, _ = trained(SignIn(beta=0.7), other, momentum=0.9)
    np.testing.assert_array_equal(last, again)
    assert np.abs(last).max() < 10


def test_gradient_correction_weighs_each_neuron_by_what_it_keeps() -> None:
    w, last, constants = trained(GradientCorrection(where="all"))
    density = np.array([3 / 4, 1 / 4, 1.0])
    for c in constants:
        w = w - LR * c * KEPT * np.sqrt(density / density.mean())[:, None]
    np.testing.assert_allclose(last, w, rtol=1e-12)


@pytest.mark.parametrize("technique", [HAM(alpha=5.0), SignIn(), GradientCorrection(where="all")], ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["adamw", "fused", "nesterov"])
def test_pruned_weights_and_slots_stay_exactly_zero(technique: Technique, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    parameters = list(model.parameters())
    optimizer = (
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)
        if kind == "nesterov"
        else torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=kind == "fused")
    )
    mask = Mask({name: torch.rand(p.shape) < 0.4 for name, p in prunable(model).items()})
    hold(mask, model, optimizer)
    running = Recipe((technique,)).attach(model, optimizer, total_steps=5, example=torch.randn(4, 6))
    for step in range(5):
        running.loss(model(torch.randn(16, 6, generator=torch.Generator().manual_seed(step))), torch.arange(16) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
    for name, kept in mask.items():
        parameter = model.get_parameter(name)
        assert not parameter[~kept].any()
        assert parameter[kept].all()
        for slot in optimizer.state[parameter].values():
            assert slot.ndim == 0 or not slot[~kept].any()
    running.finish()
    assert {id(p) for p in optimizer.state} == set(map(id, parameters))


def test_a_closure_runs_once_and_its_gradients_are_seen() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    hold(Mask({"weight": torch.tensor([[1, 1]])}), model, optimizer)
    running = Recipe((HAM(alpha=0.0, beta=1.0),)).attach(model, optimizer, total_steps=2, loss=lambda output, _: output.sum())
    model.weight.data.fill_(2.0)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(optimizer.zero_grad())
        loss = running.loss(model(torch.ones(1, 2)), None)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert len(calls) == 1
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 2), float(np.exp(-1.0))))  # (2 - 1) * e^-1


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda: HAM(alpha=-1.0), "alpha"), (lambda: HAM(alpha=0.0, beta=0.0), "leave ham"), (lambda: SignIn(beta=0.0), "beta")],
)
def test_settings_out_of_range_are_refused(make: object, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("technique", [HAM(), SignIn(), GradientCorrection(where="all"), DensityLR()], ids=lambda t: t.name)
def test_they_need_a_mask_and_an_optimiser_of_single_steps(technique: Technique) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TechniqueError, match="no mask"):
        Recipe((technique,)).attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=1)
    optimizer = torch.optim.LBFGS(model.parameters())
    hold(Mask({"weight": torch.eye(2)}), model, optimizer)
    with pytest.raises(TechniqueError, match="LBFGS"):
        Recipe((technique,)).attach(model, optimizer, total_steps=1)


STEPPING = (SAM(rho=0.1), Averaging(decay=0.5), HAM(alpha=3.0), GradientCorrection(where="all"), DensityLR(), SignIn(beta=0.7))


@pytest.mark.parametrize("early", [False, True])
def test_all_of_them_together_are_one_training_in_whatever_order_they_are_listed(early: bool) -> None:
    orders = (STEPPING, STEPPING[::-1], STEPPING[3:] + STEPPING[:3])
    left = [trained(*order, momentum=0.9, total=STEPS + early)[1] for order in orders]
    np.testing.assert_array_equal(left[0], left[1])
    np.testing.assert_array_equal(left[0], left[2])


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("others", [(SAM(rho=0.1),), (HAM(alpha=3.0), DensityLR()), (SignIn(beta=0.7),)], ids=lambda t: t[0].name)
def test_what_is_averaged_are_the_weights_that_each_step_leaves(others: tuple[Technique, ...], early: bool) -> None:
    first, average, _ = trained(*others, Averaging(decay=0.5), total=STEPS + early)
    by_hand = first.copy()
    for step in range(1, STEPS + 1):
        d = min(0.5, step / (step + 9))
        by_hand = d * by_hand + (1 - d) * trained(*others, steps=step, total=STEPS + 1)[1]
    np.testing.assert_allclose(average, by_hand, rtol=1e-12)
    assert not np.allclose(average, trained(*others)[1], rtol=1e-3)
