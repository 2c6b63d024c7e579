"""Whether a layer is faster sparse: measured once on this machine for its shape, and remembered in a file."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anymask.kernels import Gather, library
from anymask.onednn import memory_format
from anymask.runlog import atomic
from anymask.sparse import layout, ops

REPEATS = 3


def cache_file() -> Path:
    """Where measurements are kept: $ANYMASK_CACHE, else ~/.cache/anymask."""
    home = os.environ.get("ANYMASK_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "anymask")
    return Path(home) / "layers-3.json"  # the number of its form, or of kernels whose times are others


@dataclass(frozen=True)
class Times:
    """Seconds of a layer for one input, forward and backward: the best of some."""

    dense: float  # among dense layers
    between: float  # dense among sparse layers, with the changes of memory layout that this takes
    sparse: float


def times(layer: Any, gather: Gather, shape: tuple[int, ...]) -> Times:
    """What the dense `layer` and the sparse one take for an input of `shape`: measured here now, or before."""
    known = _read()
    key = _key(layer, gather, shape)
    if key not in known:
        known = {key: [float(f"{seconds:.4g}") for seconds in _measure(layer, gather, shape)], **_read()}  # who was first stays right
        _write(known)
    return Times(*known[key])


def worth_it(measured: Mapping[str, Times]) -> set[str]:
    """The layers that are better sparse, given that their neighbours are; none where the network is faster all dense.

    Example:
        >>> sorted(worth_it({"wide": Times(9.0, 12.0, 3.0), "small": Times(1.0, 3.0, 2.0), "odd": Times(1.0, 2.0, 4.0)}))
        ['small', 'wide']
        >>> worth_it({"small": Times(1.0, 3.0, 2.0)})
        set()
    """
    best = sum(min(t.between, t.sparse) for t in measured.values())
    if best >= sum(t.dense for t in measured.values()):
        return set()
    return {name for name, t in measured.items() if t.sparse < t.between}


def _key(layer: Any, gather: Gather, shape: tuple[int, ...]) -> str:
    conv = gather.conv
    density = float(f"{len(conv.kept) / max(1, layer.weight.numel()):.2g}")
    where = (platform.machine(), library.isa(), torch.__version__, torch.get_num_threads())
    what = (conv.weight_shape, conv.stride, conv.padding, conv.dilation, conv.groups, shape, density)
    return " ".join(str(part) for part in (*where, *what))


@torch.inference_mode(False)
@torch.enable_grad()  # whatever the caller is in: a backward pass is measured, too
def _measure(layer: Any, gather: Gather, shape: tuple[int, ...]) -> list[float]:
    """Alternating repeats on random data, each with the memory layout that suits it; the best of each."""
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(shape)
    dense = layer.weight.detach().clone()
    values = dense.flatten()[torch.from_numpy(gather.conv.kept)]
    if isinstance(layer, nn.Linear):  # whose input may have four dimensions, too
        rows = x.reshape(-1, shape[-1])
        runs = [
            (lambda x, w: nn.functional.linear(x, w, layer.bias), rows, dense),
            (lambda x, w: ops.conv(x[:, :, None, None], w, layer.bias, gather.handle), rows, values),
        ]
    else:
        x = x if x.ndim == 4 else x[None]
        best = memory_format(layer)
        dense = dense.contiguous(memory_format=best)
        plain, last = x.contiguous(memory_format=best), layout.batch_last(x).permute(3, 0, 1, 2)
        how = (layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

        def between(x: Tensor, w: Tensor) -> Tensor:
            y = nn.functional.conv2d(x.contiguous(memory_format=best), w, *how)
            return layout.batch_last(y).permute(3, 0, 1, 2)

        runs = [
            (lambda x, w: nn.functional.conv2d(x, w, *how), plain, dense),
            (between, last, dense),
            (lambda x, w: ops.conv(x, w, layer.bias, gather.handle), last, values),
        ]
    took = [min(each) for each in zip(*([_seconds(*run) for run in runs] for _ in range(REPEATS + 1)), strict=True)]
    return took if len(took) == 3 else [took[0], *took]


def _seconds(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    began = time.perf_counter()
    y = run(x, weight)
    torch.autograd.grad(y, (x, weight), y.detach())
    return time.perf_counter() - began


def _read() -> dict[str, list[float]]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # none yet, or damaged: measured anew
        return {}
    return found if isinstance(found, dict) else {}


def _write(known: Mapping[str, list[float]]) -> None:
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        with atomic(cache_file()) as file:
            file.write(json.dumps(known, indent=0).encode())
    except OSError:  # a read-only home: measured again next time
        return
