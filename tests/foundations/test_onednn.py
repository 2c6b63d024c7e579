"""Convolutions whose weight gradient oneDNN writes past its memory: they are found, and not computed that way."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from anymask import data, fit, kernels, models
from anymask.config import Bench, Experiment
from anymask.onednn import memory_format, overruns
from anymask.train import Protocol

MEASURE = """if True:
    import torch
    from torch import nn
    from anymask.sparse import converting, tuning
    torch.set_num_threads(1)
    layer = nn.Conv2d(4, 6, 1, stride=2)
    gather = converting.gather_for(layer, torch.rand(layer.weight.shape) < 0.5)
    for _ in range(40):
        tuning._measure(layer, gather, (128, 4, 14, 14))
"""


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Conv2d(15, 8, 1, stride=2), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),
        (nn.Conv2d(32, 8, 1, stride=(1, 2), groups=4), True),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Conv1d(4, 8, 1, stride=2), False),
    ],
)
def test_small_strided_convolutions_of_one_pixel_are_found(layer: nn.Module, found: bool) -> None:
    net = nn.Sequential(nn.ReLU(), layer)
    assert list(overruns(net)) == ["1"] * found
    assert memory_format(net) == (torch.contiguous_format if found else torch.channels_last)
    assert memory_format(net, device="cuda") == torch.channels_last


@pytest.mark.parametrize(("name", "last"), [("demonet", True), ("demonet-0.25x", False)])
def test_a_network_that_has_one_is_trained_in_the_other_format_on_a_cpu(name: str, last: bool) -> None:
    bench = Bench(Experiment(model=name, device="cpu"), Protocol(epochs=1))
    weight = next(p for p in bench.model(0).parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) == last
    assert all(batches._format == (torch.channels_last if last else torch.contiguous_format) for batches in bench.batches(0) if batches)


def test_measuring_such_a_layer_ends_well() -> None:
    """With the checks of glibc's heap; as channels_last, a signal ended it within a few measurements, on AVX2."""
    if not kernels.available():
        pytest.skip("the native kernels are not built here")
    env = {**os.environ, "MALLOC_CHECK_": "3", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_fit_warns_of_a_model_of_the_users_that_is_channels_last() -> None:
    images = data.load("fashion-mnist-5k").test
    batches = data.Batches(data.Split(images.images[:8], images.labels[:8]), batch_size=8)
    net = models.build("demonet-0.25x", classes=10, channels=1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(net, batches, recipe="default", protocol=Protocol(epochs=1))
    with pytest.warns(UserWarning, match="oneDNN gives such convolutions"):
        fit(net.to(memory_format=torch.channels_last), batches, recipe="default", protocol=Protocol(epochs=1), last_step=0)
