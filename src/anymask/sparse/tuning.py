"""Whether a layer is faster sparse: measured once on this machine for its shape, and remembered in a file."""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anymask.kernels import Gather, native
from anymask.runlog import atomic
from anymask.sparse import ops

REPEATS = 3


def cache_file() -> Path:
    """Where measurements are kept: $ANYMASK_CACHE, else ~/.cache/anymask."""
    home = os.environ.get("ANYMASK_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "anymask")
    return Path(home) / "layers.json"


def speedup(layer: Any, gather: Gather, shape: tuple[int, ...], *, training: bool = True) -> float:
    """How many times faster than the dense `layer` the sparse one is, for an input of `shape`: forward, and backward if `training`."""
    known = _read()
    key = _key(layer, gather, shape, training=training)
    if key not in known:
        known[key] = round(_measure(layer, gather, shape, training=training), 3)
        _write({**_read(), key: known[key]})
    return known[key]


def _key(layer: Any, gather: Gather, shape: tuple[int, ...], *, training: bool) -> str:
    conv = gather.conv
    density = float(f"{len(conv.kept) / max(1, layer.weight.numel()):.2g}")
    where = (platform.machine(), native.isa(), torch.__version__, torch.get_num_threads())
    what = (conv.weight_shape, conv.stride, conv.padding, conv.dilation, conv.groups, shape, density, training)
    return " ".join(str(part) for part in (*where, *what))


def _measure(layer: Any, gather: Gather, shape: tuple[int, ...], *, training: bool) -> float:
    """Alternating repeats on random data, each with the memory layout that suits it; the best of each."""
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(shape)
    dense = layer.weight.detach().clone()
    values = dense.flatten()[torch.from_numpy(gather.conv.kept)]
    if x.ndim == 4:
        plain, last = x.contiguous(memory_format=torch.channels_last), ops.batch_last(x).permute(3, 0, 1, 2)
        dense = dense.contiguous(memory_format=torch.channels_last)
        how = (layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        runs = (lambda x, w: nn.functional.conv2d(x, w, *how), lambda x, w: ops.conv(x, w, layer.bias, gather.handle))
    else:
        plain = last = x.reshape(-1, shape[-1])
        runs = (
            lambda x, w: nn.functional.linear(x, w, layer.bias),
            lambda x, w: ops.conv(x[:, :, None, None], w, layer.bias, gather.handle),
        )
    given = [(plain, dense), (last, values)]
    best = [float("inf")] * 2
    for repeat in range(REPEATS + 1):
        for i, (run, (inputs, weight)) in enumerate(zip(runs, given, strict=True)):
            seconds = _seconds(run, inputs, weight, training=training)
            best[i] = min(best[i], seconds) if repeat else best[i]  # the first ones warm up
    return best[0] / best[1]


def _seconds(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, *, training: bool) -> float:
    x, weight = x.detach().requires_grad_(training), weight.detach().requires_grad_(training)
    with torch.set_grad_enabled(training):
        began = time.perf_counter()
        y = run(x, weight)
        if training:
            torch.autograd.grad(y, (x, weight), y.detach())
        return time.perf_counter() - began


def _read() -> dict[str, float]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # none yet, or damaged: measured anew
        return {}
    return found if isinstance(found, dict) else {}


def _write(known: dict[str, float]) -> None:
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        with atomic(cache_file()) as file:
            file.write(json.dumps(known, indent=0).encode())
    except OSError:  # a read-only home: measured again next time
        return
