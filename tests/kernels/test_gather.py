"""The native kernels against PyTorch's dense convolution with the zeros in it."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from anymask.errors import SettingError
from anymask.kernels import available, library
from tests.kernels.gradients import Gather
from tests.kernels.isas import CASES, ISAS

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")
ROOT = Path(__file__).parents[2]


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Shapes from a single pixel up; kernels larger than the input; strides beyond the kernel; densities 0 and 1."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    return {
        "groups": groups,
        "channels": groups * draw(st.integers(1, 5)),
        "outputs": groups * draw(st.integers(1, 5)),
        "kernel": draw(st.tuples(*[st.integers(1, 5)] * 2)),
        "stride": draw(st.tuples(*[st.integers(1, 3)] * 2)),
        "padding": draw(st.tuples(*[st.integers(0, 4)] * 2)),
        "dilation": draw(st.tuples(*[st.integers(1, 3)] * 2)),
        "size": draw(st.tuples(*[st.integers(1, 20)] * 2)),
        "images": draw(st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 70])),
        "density": draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0])),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 99)),
    }


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=CASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_forward_and_both_gradients_are_those_of_the_dense_convolution(isa, case):
    library.library().am_use(isa.encode())
    spans = [d * (k - 1) + 1 for d, k in zip(case["dilation"], case["kernel"], strict=True)]
    assume(all(n + 2 * p >= span for n, p, span in zip(case["size"], case["padding"], spans, strict=True)))
    close(*both(case))


def both(case: dict[str, Any]) -> tuple[list[Any], list[Any], list[float]]:
    """What the kernels give and PyTorch, in float64: output, gradients of input and kept weights, both at once; then their usual sizes."""
    rng = np.random.default_rng(case["seed"])
    shape = (case["outputs"], case["channels"] // case["groups"], *case["kernel"])
    kept = np.flatnonzero(rng.random(int(np.prod(shape))) < case["density"])
    how = {name: case[name] for name in ("stride", "padding", "dilation", "groups")}
    gather = Gather(shape, kept, **how)
    x = rng.standard_normal((case["channels"], *case["size"], case["images"])).astype(np.float32)
    values = rng.standard_normal(len(kept)).astype(np.float32)
    threads = case["threads"]
    y = gather.forward(
        x, values, out=np.full(gather.output_shape(*case["size"], images=case["images"]), np.nan, np.float32), threads=threads
    )
    g = rng.standard_normal(y.shape).astype(np.float32)
    gx = gather.input_gradient(g, values, np.full_like(x, np.nan), threads=threads)
    gv = gather.weight_gradient(x, g, threads=threads)
    gx_too = np.full_like(x, np.nan)
    gv_too = gather.gradients(x, g, values, gx_too, threads=threads)
    weight = np.zeros(int(np.prod(shape)))
    weight[kept] = values
    dense = torch.tensor(weight.reshape(shape), requires_grad=True)
    tx = torch.tensor(x, dtype=torch.float64).permute(3, 0, 1, 2).contiguous().requires_grad_()
    ty = F.conv2d(tx, dense, **how)
    ty.backward(torch.tensor(g, dtype=torch.float64).permute(3, 0, 1, 2))
    last = [t.detach().permute(1, 2, 3, 0).numpy() for t in (ty, tx.grad)]
    terms = g.size / len(g)  # of a weight's gradient: their sum may come out near 0, and float32 sees the terms
    last.append(dense.grad.numpy().ravel()[kept])
    return [y, gx, gv, gx_too, gv_too], [*last, *last[1:]], [1.0, *2 * (1.0, terms**0.5)]


def close(ours: list[Any], theirs: list[Any], usual: list[float]) -> None:
    """To 1e-5 of the largest value, or of the usual one where that is larger."""
    for mine, right, size in zip(ours, theirs, usual, strict=True):
        assert mine.shape == right.shape
        if right.size:
            assert np.abs(mine - right).max() <= 1e-5 * max(1.0, size, np.abs(right).max())


REAL = {"padding": (0, 0), "stride": (1, 1), "groups": 1, "dilation": (1, 1), "density": 0.1, "threads": 2, "seed": 0}


@pytest.mark.parametrize(
    "case",
    [
        {"channels": 64, "outputs": 64, "kernel": (3, 3), "padding": (1, 1), "size": (32, 32), "images": 128},
        {"channels": 64, "outputs": 128, "kernel": (1, 1), "stride": (2, 2), "padding": (0, 0), "size": (32, 32), "images": 32},
        {"channels": 3, "outputs": 16, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3), "size": (64, 64), "images": 4},
        {"channels": 64, "outputs": 512, "kernel": (3, 3), "padding": (1, 1), "size": (4, 4), "images": 1024},
        {"channels": 1024, "outputs": 1000, "kernel": (1, 1), "stride": (1, 1), "size": (1, 1), "images": 1},
        {
            "channels": 96,
            "outputs": 96,
            "kernel": (3, 3),
            "stride": (1, 1),
            "padding": (1, 1),
            "size": (14, 14),
            "images": 100,
            "groups": 96,
        },
    ],
    ids=["resnet stage", "shortcut", "stem", "1024 images", "linear", "depthwise"],
)
def test_at_real_sizes(case):
    close(*both({**REAL, **case}))


def test_bias_addition_and_relu_at_the_end():
    rng = np.random.default_rng(0)
    gather = Gather((4, 3, 3, 3), np.arange(0, 108, 2), padding=(1, 1))
    for images in (1, 16, 20):
        x, values, bias = (rng.standard_normal(s).astype(np.float32) for s in ((3, 6, 6, images), 54, 4))
        add = rng.standard_normal((4, 6, 6, images)).astype(np.float32)
        plain = gather.forward(x, values)
        fused = gather.forward(x, values, bias=bias, add=add, relu=True)
        np.testing.assert_allclose(fused, np.maximum(plain + bias[:, None, None, None] + add, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": (2, 4, 4, 5)},
        {"x": (3, 4, 4)},
        {"x": (3, 1, 1, 5)},
        {"values": (11,)},
        {"bias": (3,)},
        {"out": (4, 4, 4, 5)},
        {"add": (4, 2, 2, 4)},
    ],
    ids=str,
)
def test_no_array_of_another_shape_type_or_layout_reaches_the_native_code(wrong):
    gather = Gather((4, 3, 3, 3), np.arange(12))
    shapes = {"x": (3, 4, 4, 5), "values": (12,), "bias": (4,), "out": (4, 2, 2, 5), "add": (4, 2, 2, 5)}
    right = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    gather.forward(**right)
    with pytest.raises(SettingError, match=r"Allowed: .* To do: "):
        gather.forward(**{**right, **{name: np.zeros(shape, np.float32) for name, shape in wrong.items()}})
    name = next(iter(wrong))
    with pytest.raises(SettingError, match="float64"):
        gather.forward(**{**right, name: right[name].astype(np.float64)})
    if right[name].ndim > 1:
        with pytest.raises(SettingError, match="contiguous"):
            gather.forward(**{**right, name: np.asfortranarray(right[name])})


def test_kept_places_are_checked():
    for kept in ([3, 2], [0, 108], [-1, 4], [5, 5]):
        with pytest.raises(SettingError, match="out of order or range"):
            Gather((4, 3, 3, 3), np.array(kept))


def at_once(gather: Gather, x: Any, g: Any, values: Any, *, threads: int) -> list[bytes]:
    gx = np.empty_like(x)
    return [gather.gradients(x, g, values, gx, threads=threads).tobytes(), gx.tobytes()]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("images", [1, 3, 5, 17])
def test_a_nan_of_an_earlier_call_is_in_no_gradient(isa, images):
    library.library().am_use(isa.encode())
    Gather((1, 8, 1, 1), np.arange(8)).forward(np.full((8, 16, 16, 64), np.nan, np.float32), np.ones(8, np.float32))
    gather = Gather((1, 1, 1, 1), np.array([0]))
    x, values = np.ones((1, 3, 3, images), np.float32), np.ones(1, np.float32)
    assert gather.weight_gradient(x, x).item() == 9 * images
    gx = np.empty_like(x)
    assert gather.gradients(x, x, values, gx).item() == 9 * images
    assert (gx == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equal_calls_give_equal_bits_however_busy_the_machine_is(threads):
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(64 * 32 * 9, 500, replace=False))
    gather = Gather((64, 32, 3, 3), kept, padding=(1, 1), stride=(2, 2))
    x = rng.standard_normal((32, 14, 14, 64)).astype(np.float32)
    g = rng.standard_normal((64, 7, 7, 64)).astype(np.float32)
    values = rng.standard_normal(500).astype(np.float32)
    stop = Event()
    busy = [Thread(target=lambda: [None for _ in iter(stop.is_set, True)]) for _ in range(2)]
    for thread in busy:
        thread.start()
    try:
        found = [
            (
                gather.weight_gradient(x, g, threads=threads).tobytes(),
                gather.forward(x, values, threads=threads).tobytes(),
                gather.input_gradient(g, values, np.empty_like(x), threads=threads).tobytes(),
                *at_once(gather, x, g, values, threads=threads),
            )
            for _ in range(40)
        ]
    finally:
        stop.set()
        for thread in busy:
            thread.join()
    assert len(set(found)) == 1


def test_without_threads_to_spare_nothing_is_lost():
    code = (
        "import numpy as np; from tests.kernels.gradients import Gather; g = Gather((4, 4, 3, 3), np.arange(0, 144, 5), padding=(1, 1));"
        "x = np.ones((4, 9, 9, 64), np.float32); y = np.ones((4, 9, 9, 64), np.float32);"
        "a, b = (g.weight_gradient(x, y, threads=n) for n in (1, 4)); assert np.allclose(a, b), (a, b);"
        "a, b = (g.gradients(x, y, np.ones(29, np.float32), x.copy(), threads=n) for n in (1, 4)); assert np.allclose(a, b), (a, b)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_THREAD_LIMIT": "2"}, check=True)


def test_no_image_gives_nothing():
    gather = Gather((4, 3, 3, 3), np.arange(12), padding=(1, 1))
    x, values = np.zeros((3, 4, 4, 0), np.float32), np.ones(12, np.float32)
    y = gather.forward(x, values)
    assert y.shape == (4, 4, 4, 0)
    assert gather.input_gradient(y, values, np.empty_like(x)).shape == x.shape
    assert not gather.weight_gradient(x, y).any()
    assert not gather.gradients(x, y, values, np.empty_like(x)).any()


def test_a_copy_makes_its_own_tables():
    import copy
    import pickle

    gather = Gather((2, 1, 3, 3), np.arange(18), padding=(1, 1))
    x, values = np.ones((1, 4, 4, 2), np.float32), np.ones(18, np.float32)
    expected = gather.forward(x, values)
    for other in (copy.deepcopy(gather), pickle.loads(pickle.dumps(gather))):
        assert other.handle != gather.handle
        np.testing.assert_array_equal(other.forward(x, values), expected)


def test_an_unknown_instruction_set_is_an_error_in_three_parts():
    code = "from anymask.kernels import available; available()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ANYMASK_ISA": "mmx"}, capture_output=True, text=True, check=False
    )
    assert "ANYMASK_ISA is 'mmx'. Allowed: avx512, avx2 or portable" in done.stderr


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(7, 6, 21), (1, 1, 20), (5, 5, 3)])  # the first at once, the others one after the other
def test_what_is_added_to_the_gradient_of_the_input_may_lie_where_it_goes(isa, size):
    library.library().am_use(isa.encode())
    rng = np.random.default_rng(0)
    gather = Gather((5, 4, 3, 3), np.flatnonzero(rng.random(180) < 0.3), padding=(1, 1))
    values, x = rng.standard_normal(len(gather.conv.kept)).astype(np.float32), rng.standard_normal((4, *size)).astype(np.float32)
    g = rng.standard_normal(gather.output_shape(*size[:2], images=size[2])).astype(np.float32)
    plain, add = np.empty_like(x), rng.standard_normal(x.shape).astype(np.float32)
    right = gather.gradients(x, g, values, plain, threads=2)
    for both in (True, False):
        out = add.copy()
        if both:
            assert np.array_equal(gather.gradients(x, g, values, out, add=out, threads=2), right)
        else:
            gather.input_gradient(g, values, out, add=out, threads=2)
        np.testing.assert_allclose(out, plain + add, rtol=1e-5, atol=1e-5)
