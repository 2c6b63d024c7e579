"""Native batch norms, with what follows them, against PyTorch's."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anymask.errors import SettingError
from anymask.kernels import Gather, available, library, native, norms
from anymask.sparse import calls, ops
from tests.kernels.isas import CASES, ISAS

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")


@dataclass
class Norm:
    """`calls.norm` and its gradient, with a pool where there is one, for arrays (C, S) or (C, H, W, N)."""

    weight: Any
    bias: Any
    mean: Any
    var: Any
    eps: float
    relu: bool
    given: bool
    threads: int
    soft: float = 0.0
    pool: norms.Pool | None = None

    def forward(self, x, out, *, add=None, place=None, signs=None):
        with self.called() as how:
            if self.pool is not None:
                calls.pooled_norm(how, self.pool, tensor(x), tensor(out), tensor(place))
            else:
                calls.norm(how, tensor(x), tensor(add), tensor(out), signs=None if signs is None else torch.from_numpy(signs))

    def gradient(self, x, g, out, *, add=None, place=None, signs=None):
        into = [tensor(out[0]), tensor(out[1]), *map(torch.from_numpy, out[2:])]
        with self.called() as how:
            if self.pool is not None:
                calls.pooled_norm_gradient(how, self.pool, tensor(x), tensor(g), place=tensor(place), out=(into[0], *into[2:]))
            else:
                signs = None if signs is None else torch.from_numpy(signs)
                calls.norm_gradient(how, tensor(x), tensor(add), tensor(g), tuple(into), signs=signs)

    @contextmanager
    def called(self):
        vectors = [None if v is None else torch.from_numpy(v) for v in (self.weight, self.bias, self.mean, self.var)]
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield calls.Norm(*vectors, self.eps, self.relu, self.soft, self.given)
        finally:
            torch.set_num_threads(threads)


def tensor(x):
    """The memory of an array as a tensor (N, C, H, W)."""
    return None if x is None else torch.from_numpy(x.reshape(len(x), 1, 1, -1) if x.ndim == 2 else x).permute(3, 0, 1, 2)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=CASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 9000),
    offset=st.sampled_from([0.0, 1e3]),
    how=st.tuples(*[st.booleans()] * 3, st.sampled_from([0.0, 0.3, 1.0])),
    seed=st.integers(0, 99),
)
def test_batch_norm_and_its_gradient(isa, size, offset, how, seed):
    relu, given_stats, adds, soft = how
    size += 100 if offset else 8  # so that the variance is well above what float32 knows of the mean
    library.library().am_use(isa.encode())
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, size)) + offset).astype(np.float32)
    weight, bias, mean, var = (rng.random(3).astype(np.float32) + 0.5 for _ in range(4))
    mean += np.float32(offset)
    y, g = np.empty_like(x), rng.standard_normal(x.shape).astype(np.float32)
    ours = Norm(weight, bias, mean.copy(), var.copy(), eps=1e-5, relu=relu, soft=soft if relu else 0.0, given=given_stats, threads=2)
    add = rng.standard_normal(x.shape).astype(np.float32) if adds else None
    ours.forward(x, y, add=add)
    out = np.empty_like(x), np.empty_like(x) if adds else None, np.empty(3, np.float32), np.empty(3, np.float32)
    ours.gradient(x, g, out, add=add)
    if relu and not soft:
        signs, again = np.empty(norms.signs_shape(*x.shape), np.uint16), np.empty_like(y)
        twice = [None if a is None else np.empty_like(a) for a in out]
        ours.forward(x, again, add=add, signs=signs)
        ours.gradient(x, g, tuple(twice), signs=signs)
        assert all(a is b is None or np.array_equal(a, b) for a, b in zip((y, *out), (again, *twice), strict=True))
    tx, tw, tb = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x.T, weight, bias))
    stats = (torch.tensor(mean).double(), torch.tensor(var).double()) if given_stats else (None, None)
    if size == 1 and not given_stats:
        return  # PyTorch refuses one value a channel
    ty = F.batch_norm(tx, *stats, tw, tb, not given_stats, eps=1e-5)
    ta = None if add is None else torch.tensor(add.T, dtype=torch.float64, requires_grad=True)
    if ta is not None:
        ty = ty + ta
    if relu and soft:
        ty = soft * F.silu(ty) + (1 - soft) * ty * torch.tensor(y.T > 0)  # the sign, as below
    elif relu:
        ty = ty * torch.tensor(y.T > 0)  # the sign of what rounds to 0 is a matter of rounding
    ty.backward(torch.tensor(g.T).double())
    scale = 1.0 if offset == 0 else 30.0  # float32 knows 1,000.0 to 6e-5
    np.testing.assert_allclose(y, ty.detach().numpy().T, atol=2e-5 * scale, rtol=1e-4)
    for mine, right in zip(
        out, (tx.grad.numpy().T, None if ta is None else ta.grad.numpy().T, tw.grad.numpy(), tb.grad.numpy()), strict=True
    ):
        if right is None:
            continue
        assert np.abs(mine - right).max() <= 2e-5 * scale * max(1.0, np.abs(right).max())


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=CASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 300), strength=st.floats(0.0, 1.0, width=32), spread=st.sampled_from([1.0, 30.0, 1e4]), seed=st.integers(0, 99))
def test_the_ghost_of_a_relu_and_its_gradient(isa, size, strength, spread, seed):
    library.library().am_use(isa.encode())
    rng = np.random.default_rng(seed)
    x, g = (rng.standard_normal(size).astype(np.float32) * np.float32(spread), rng.standard_normal(size).astype(np.float32))
    y, gx = np.empty_like(x), np.empty_like(x)
    native.soften(x, y, strength=strength, threads=2)
    native.soften(x, gx, strength=strength, g=g, threads=2)
    tx = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    ty = strength * F.silu(tx) + (1 - strength) * F.relu(tx)
    ty.backward(torch.tensor(g).double())
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=1e-6, atol=1e-30 * spread)
    np.testing.assert_allclose(gx, tx.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_the_ghost_of_a_relu_at_strength_0_and_far_out():
    x = np.array([-np.inf, -1e30, -0.0, 0.0, 1e-30, 1e30, np.nan], np.float32)
    y = np.empty_like(x)
    native.soften(x[1:-1], y[1:-1], strength=0.0)
    np.testing.assert_array_equal(y[1:-1], np.maximum(x[1:-1], 0))
    native.soften(x, y, strength=0.5)
    assert np.isnan(y[-1])
    assert abs(y[1]) < 1e-7


def test_the_ghost_after_a_norm_of_a_map_that_is_stored_past_the_cache():
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((2, (5 << 20) // 2)).astype(np.float32) for _ in range(2))
    y, gx, apart, gapart = (np.empty_like(x) for _ in range(4))
    of = [(np.empty(2, np.float32), np.empty(2, np.float32)) for _ in range(2)]
    soft, plain = (
        Norm(None, None, mean, var, eps=1e-5, relu=bool(s), soft=s, given=False, threads=2)
        for (mean, var), s in zip(of, (0.4, 0.0), strict=True)
    )
    soft.forward(x, y)
    soft.gradient(x, g, (gx, None, np.empty(2, np.float32), np.empty(2, np.float32)))
    plain.forward(x, apart)
    native.soften(apart, gapart, strength=0.4, g=g)
    plain.gradient(x, gapart.copy(), (gapart, None, np.empty(2, np.float32), np.empty(2, np.float32)))
    native.soften(apart.copy(), apart, strength=0.4)
    np.testing.assert_allclose(y, apart, atol=1e-6)
    np.testing.assert_allclose(gx, gapart, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=CASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(*[st.integers(1, 7)] * 2, st.sampled_from([1, 3, 16, 33])),
    kernel=st.tuples(*[st.integers(1, 3)] * 2),
    how=st.tuples(*[st.booleans()] * 3, st.sampled_from([0.0, 0.3, 1.0])),
    seed=st.integers(0, 99),
)
def test_a_norm_with_its_max_pool_is_the_two_apart(isa, size, kernel, how, seed):
    affine, given_stats, ceil, soft = how
    library.library().am_use(isa.encode())
    rng = np.random.default_rng(seed)
    rows, cols, images = (max(s, k) for s, k in zip(size, (*kernel, 1), strict=True))
    x = rng.standard_normal((3, rows, cols, images)).astype(np.float32)
    out = [-(-n // k) if ceil else n // k for n, k in zip((rows, cols), kernel, strict=True)]
    g = rng.standard_normal((3, *out, images)).astype(np.float32)
    pool = norms.Pool(images, 3, rows, cols, *out, *kernel, *kernel, 0, 0, 0)
    weight, bias = (rng.standard_normal(3).astype(np.float32) for _ in range(2)) if affine else (None, None)
    found = []
    for together in (True, False):
        mean, var = np.full(3, 0.2, np.float32), np.full(3, 1.5, np.float32)
        more = {"soft": soft, "given": given_stats, "pool": pool if together else None}
        norm = Norm(weight, bias, mean, var, eps=1e-5, relu=True, threads=2, **more)
        y, gx, gw, gb = np.empty_like(g), np.empty_like(x), np.empty(3, np.float32), np.empty(3, np.float32)
        if together:
            place = np.empty(y.shape, np.uint8)
            norm.forward(x, y, place=place)
            norm.gradient(x, g, (gx, None, gw, gb), place=place)
        else:
            between, back = np.empty_like(x), np.empty_like(x)
            norm.forward(x, between)
            pool.forward(between, y, threads=2)
            pool.gradient(between, y, g, back, threads=2)
            norm.gradient(x, back, (gx, None, gw, gb))
        found.append((y, mean, var, gx, gw, gb))
    for mine, right in zip(*(part[:3] for part in found), strict=True):
        np.testing.assert_allclose(
            mine, right, rtol=0, atol=1e-6 if soft else 0
        )  # at a ghost's lowest point an end may be an ulp below what lies between
    for mine, right in zip(*(part[3:] for part in found), strict=True):
        assert np.abs(mine - right).max() <= 2e-5 * max(1.0, np.abs(right).max())


@pytest.mark.parametrize("isa", ISAS)
def test_places_of_a_window_are_counted_to_255(isa):
    library.library().am_use(isa.encode())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 16, 17)).astype(np.float32)
    how = {"eps": 0.0, "relu": True, "given": True, "threads": 1, "pool": norms.Pool(17, 2, 16, 16, 1, 1, 16, 16, 16, 16, 0, 0, 0)}
    together = Norm(None, None, np.zeros(2, np.float32), np.ones(2, np.float32), **how)
    y, place, gx = np.empty((2, 1, 1, 17), np.float32), np.empty((2, 1, 1, 17), np.uint8), np.empty_like(x)
    together.forward(x, y, place=place)
    flat = x.reshape(2, 256, 17)
    assert np.array_equal(place[:, 0, 0], flat.argmax(1))
    assert place.max() > 127
    together.gradient(x, np.ones_like(y), (gx, None, np.empty(2, np.float32), np.empty(2, np.float32)), place=place)
    assert np.array_equal(gx.reshape(2, 256, 17).argmax(1), flat.argmax(1))
    with pytest.raises(SettingError, match="at most 256 places"):
        ops.norm(torch.zeros(17, 2, 16, 17), *[None] * 5, 0.0, True, 0.0, 1, 1, 16, 17)


def test_a_constant_channel_is_0_after_the_norm_bit_for_bit():
    for constant in (0.1, -3.7, 1e5):
        x = np.full((1, 5000), constant, np.float32)
        y = np.empty_like(x)
        Norm(None, None, np.empty(1, np.float32), np.empty(1, np.float32), eps=1e-5, relu=True, given=False, threads=1).forward(x, y)
        assert not y.any()


def test_nan_stays_nan_and_inf_goes_through():
    gather = Gather((1, 1, 1, 1), np.array([0]))
    x = np.array([np.nan, np.inf, -np.inf, -1.0] * 5, np.float32).reshape(1, 1, 1, 20)
    out = gather.forward(x, np.ones(1, np.float32), relu=True).ravel()
    np.testing.assert_array_equal(out, np.maximum(x.ravel(), 0))
