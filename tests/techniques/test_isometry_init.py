"""isometry_init: its laws, and its objective and gradient by hand, in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import anymask
from anymask import Mask, models
from anymask.errors import SettingError
from anymask.techniques import Context, IsometryInit
from anymask.techniques.isometry_init import _least, towards_isometry


def attach(model, mask, **options):
    return IsometryInit(**options).attach(Context(model, None, F.cross_entropy, mask=mask))


def case(seed, outputs, inputs, *, density):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((outputs, inputs)), rng.random((outputs, inputs)) < density


def error_by_hand(w):
    """||G - I||_F^2, of the smaller Gram matrix of what is not all 0."""
    w = w[np.abs(w).sum(1) > 0][:, np.abs(w).sum(0) > 0]
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return sum((gram[i, j] - (i == j)) ** 2 for i in range(len(gram)) for j in range(len(gram)))


def slope_by_hand(w, kept):
    """The gradient of ||W W^T - I||^2 over the kept weights, by differences."""
    found = np.zeros_like(w)
    for i, j in zip(*np.nonzero(kept), strict=True):
        step = np.zeros_like(w)
        step[i, j] = 1e-5
        up, down = (np.square((w + s * step) @ (w + s * step).T - np.eye(len(w))).sum() for s in (1, -1))
        found[i, j] = (up - down) / 2e-5
    return found


def towards(w, kept, *, iterations=15, tolerance=0.0):
    return towards_isometry(torch.from_numpy(w), torch.from_numpy(kept), iterations=iterations, tolerance=tolerance)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_zeros_stay_and_the_error_is_the_one_written_by_hand_and_never_rises(seed, outputs, inputs, density):
    w, kept = case(seed, outputs, inputs, density=density)
    errors = []
    for iterations in (0, 1, 3, 9):
        done = towards(w, kept, iterations=iterations)
        found = done.rows.numpy()
        assert not found[~kept].any()
        assert np.isfinite(found).all()
        assert done.before == pytest.approx(error_by_hand(w * kept), rel=1e-9, abs=1e-12)
        assert done.after == pytest.approx(error_by_hand(found), rel=1e-6, abs=1e-12)
        errors.append(done.after)
    assert all(later <= earlier * (1 + 1e-9) + 1e-12 for earlier, later in pairwise(errors))


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 12), (12, 5), (6, 6)])
def test_a_full_matrix_becomes_an_isometry(outputs, inputs):
    w, kept = case(0, outputs, inputs, density=2.0)
    singular = np.linalg.svd(towards(w, kept, iterations=200).rows.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular, 1, atol=1e-4)


def test_one_weight_for_each_neuron_keeps_its_sign_and_has_size_one():
    w, _ = case(1, 6, 6, density=1.0)
    kept = np.eye(6, dtype=bool)[[2, 0, 1, 5, 3, 4]]
    np.testing.assert_allclose(towards(w, kept).rows.numpy(), np.sign(w) * kept, atol=1e-12)


def test_where_it_ends_no_kept_weight_could_lower_the_error():
    w, kept = case(2, 6, 10, density=0.4)
    found = towards(w, kept, iterations=500).rows.numpy()
    assert np.abs(slope_by_hand(found, kept)).max() < 1e-4
    assert error_by_hand(found) < 0.5 * error_by_hand(w / np.linalg.norm(w * kept, axis=1, keepdims=True) * kept)


def test_the_first_step_goes_down_the_slope_by_hand_to_the_least_error_on_that_line():
    w, kept = case(3, 4, 7, density=0.6)
    w = w * kept / np.linalg.norm(w * kept, axis=1, keepdims=True)
    slope = slope_by_hand(w, kept)
    moved = towards(w, kept, iterations=1).rows.numpy() - w
    cosine = -(moved * slope).sum() / np.linalg.norm(moved) / np.linalg.norm(slope)
    assert cosine == pytest.approx(1, abs=1e-7)
    here = error_by_hand(w + moved)
    assert all(here <= error_by_hand(w + moved * t) for t in np.linspace(-1, 3, 41))


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_the_least_value_along_a_line_is_the_least_of_a_fine_grid(seed, size):
    rng = np.random.default_rng(seed)
    a, b, c = (torch.from_numpy(rng.standard_normal((size, size))) for _ in range(3))
    t = _least(a, b, c)
    value = float((a + t * b + t * t * c).square().sum())
    grid = torch.linspace(-5, 5, 1001, dtype=torch.float64)[:, None, None]
    assert value <= float((a + grid * b + grid**2 * c).square().sum((1, 2)).min()) * (1 + 1e-9)


def test_an_isometry_stays_what_it_is():
    q = np.linalg.qr(case(4, 8, 8, density=1.0)[0])[0][:5]
    done = towards(q, np.ones_like(q, dtype=bool))
    np.testing.assert_allclose(done.rows.numpy(), q, atol=1e-12)


def test_it_ends_where_a_step_brings_too_little():
    w, kept = case(5, 20, 30, density=0.2)
    few, many = (towards(w, kept, iterations=300, tolerance=tolerance) for tolerance in (0.3, 1e-9))
    assert few.after > many.after
    assert few.after > many.after


def test_each_group_and_each_projection_is_a_matrix_of_its_own():
    torch.manual_seed(0)
    layers = {"weight": nn.Conv2d(8, 6, 3, groups=2), "in_proj_weight": nn.MultiheadAttention(6, 2), "weight_ih_l0": nn.GRU(5, 4)}
    for name, layer in layers.items():
        weight = layer.double().get_parameter(name)
        attach(layer, Mask({name: torch.ones(weight.shape)}), iterations=300, tolerance=0.0)
        for block in weight.detach().flatten(1).chunk(2 if name == "weight" else 3):
            torch.testing.assert_close(torch.linalg.svdvals(block), torch.ones(min(block.shape)).double(), atol=1e-4, rtol=0)


def test_a_transposed_convolution_is_seen_from_its_outputs():
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(8, 6, 2, groups=2).double()  # weight (8, 3, 2): 3 outputs a group, of 4 x 2 inputs
    attach(layer, Mask({"weight": torch.ones(8, 3, 2)}), iterations=300, tolerance=0.0)
    for group in layer.weight.detach().chunk(2):
        rows = group.transpose(0, 1).flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(3).double(), atol=1e-4, rtol=0)


def test_the_gain_is_the_size_of_the_singular_values():
    torch.manual_seed(0)
    layer = nn.Linear(12, 5).double()
    attach(layer, Mask({"weight": torch.ones(5, 12)}), gain=1.5, iterations=300, tolerance=0.0)
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight.detach()), torch.full((5,), 1.5).double(), atol=1e-4, rtol=0)


def test_a_masked_network_comes_nearer_to_an_isometry_in_every_layer_and_twice_to_the_same_bits():
    nets = [models.build("resnet20", classes=5, seed=0) for _ in range(2)]
    mask = anymask.prune(nets[0], "random-erk", sparsity=0.9)
    mask.apply(nets[0])
    before = {name: error_by_hand(nets[0].get_parameter(name).detach().flatten(1).double().numpy()) for name in mask}
    found = [attach(net, mask).found for net in nets]
    assert found[0] == found[1]
    for name, kept in mask.items():
        weight = nets[0].get_parameter(name).detach()
        assert torch.equal(weight, nets[1].get_parameter(name))
        assert torch.equal(weight != 0, kept)
        assert error_by_hand(weight.flatten(1).double().numpy()) < 0.2 * before[name]


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"tolerance": 1.0}, {"tolerance": -0.1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        IsometryInit(**wrong)
