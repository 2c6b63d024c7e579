"""Where the time of a training step goes, by PyTorch's profiler, and how little it could take, by a count of operations and bytes."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anymask.kernels import Gather
from anymask.mask import Mask

GROUPS = {  # group -> what the operators' names begin with; first match
    "conv forward": (
        "anymask::conv",
        "GeneratedBackwardFor_anymask_conv_",
        "aten::mkldnn_conv",
        "aten::_conv",
        "aten::conv",
        "aten::thnn_conv",
        "aten::_slow",
    ),
    "norm forward": (
        "anymask::norm",
        "GeneratedBackwardFor_anymask_norm_",
        "aten::native_batch_norm",
        "aten::_batch_norm",
        "aten::batch_norm",
    ),
    "norm gradient": (),
    "conv gradients": (),
    "relu and add": ("aten::relu", "aten::clamp_min", "aten::threshold", "aten::add"),
    "pools": (
        "anymask::pool",
        "GeneratedBackwardFor_anymask_pool_",
        "aten::max_pool2d",
        "aten::avg_pool2d",
        "aten::adaptive_avg",
        "aten::_adaptive_avg",
        "aten::mean",
    ),
    "layout": ("aten::copy_", "aten::clone", "aten::contiguous", "aten::mkldnn_reorder"),
    "optimiser": (),
    "other": (),
}
_GRADIENTS = {  # whole names that begin as forward ones do
    "anymask::conv_gradient": "conv gradients",
    "aten::convolution_backward": "conv gradients",
    "aten::mkldnn_convolution_backward": "conv gradients",
    "aten::_slow_conv2d_backward": "conv gradients",
    "anymask::norm_gradient": "norm gradient",
    "aten::native_batch_norm_backward": "norm gradient",
    "aten::batch_norm_backward": "norm gradient",
}
_CONVOLVES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {  # operator -> its weights (or what is as long) and its output
    "anymask::conv": lambda args, out: (args[1], out),
    "anymask::conv_gradient": lambda args, out: (args[2], args[1]),
    "aten::convolution": lambda args, out: (args[1], out),
    "aten::convolution_backward": lambda args, out: (args[2], args[0]),
}
_MULTIPLIES = dict.fromkeys(("aten::addmm", "aten::mm"), lambda a, b: 2.0 * b.numel() * a.shape[0])
_EMPTY = ("aten::empty", "aten::new_empty", "aten::set_", "aten::_to_copy_meta")


def where(step: Callable[[], object], *, steps: int = 2) -> dict[str, float]:
    """Milliseconds of a step by group; "other" is whatever is in no operator, too (Python, dispatch)."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        whole = time.perf_counter() - began
    found: dict[str, float] = defaultdict(float)
    for event in seen.events():
        found[_group(event)] += event.self_cpu_time_total / 1000 / steps
    found["other"] += max(0.0, 1000 * whole / steps - sum(found.values()))
    return {group: round(found[group], 2) for group in GROUPS if found[group] >= 0.005}


def _group(event: Any) -> str:
    above = event
    while above is not None:
        if above.name.startswith("Optimizer."):
            return "optimiser"
        above = above.cpu_parent
    if event.name in _GRADIENTS:
        return _GRADIENTS[event.name]
    return next((group for group, begins in GROUPS.items() if begins and event.name.startswith(begins)), "other")


def peaks(*, channels: int = 512, images: int = 128, megabytes: int = 256, threads: int) -> dict[str, float]:
    """What this machine gives now, best of several: multiply-adds from the second cache in GFLOP/s, and a copy in GB/s.

    The first is the forward kernel on a 3x3 convolution of `channels` channels on 4 x 4 with a tenth of its weights, counted as 2 * kept *
    16 * images; the second a copy of an array larger than the caches, read and written bytes together.
    """
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(channels * channels * 9, channels * channels * 9 // 10, replace=False))
    gather = Gather((channels, channels, 3, 3), kept, padding=(1, 1))
    x, values = (rng.standard_normal(shape, dtype=np.float32) for shape in ((channels, 4, 4, images), len(kept)))
    out = np.empty_like(x)
    arithmetic = _best(lambda: gather.forward(x, values, out=out, threads=threads))
    source = torch.ones(megabytes * 250_000)
    target = torch.zeros_like(source)
    copy = _best(lambda: target.copy_(source))
    return {
        "gflops": round(2 * len(kept) * 16 * images / arithmetic / 1e9, 1),
        "gbytes": round(2 * source.nbytes / copy / 1e9, 1),
    }


def _best(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(9):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


class Count(TorchDispatchMode):
    """Notes for each operator that is called its multiply-adds over kept weights (times 2), and the bytes of its tensors, each once."""

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        self.kept = {parameters[name].data_ptr(): int(mask[name].sum()) for name in mask}
        self.rows: list[tuple[float, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = any(given.alias_info is not None and not given.alias_info.is_write for given in returns)
        if not view and not func._schema.name.startswith(_EMPTY):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            size = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
            self.rows.append((self._operations(func._schema.name, args, out), size))
        return out

    def _operations(self, name: str, args: tuple[Any, ...], out: Any) -> float:
        if name in _MULTIPLIES:
            return _MULTIPLIES[name](args[-2], args[-1])
        if name not in _CONVOLVES:
            return 0.0
        weight, output = _CONVOLVES[name](args, out)
        gradients = sum(args[-1][:2]) if name == "aten::convolution_backward" else sum(args[-2:]) if name == "anymask::conv_gradient" else 1
        return 2.0 * self.kept.get(weight.data_ptr(), weight.numel()) * output.shape[0] * output.shape[2:].numel() * gradients

    def limit(self, peak: Mapping[str, float]) -> dict[str, float]:
        """Operations, bytes, and the least milliseconds: of each operator the longer of its arithmetic and its memory traffic, summed."""
        operations, size = (sum(column) for column in zip(*self.rows, strict=True))
        least = sum(max(ops / peak["gflops"], moved / peak["gbytes"]) for ops, moved in self.rows) / 1e6
        return {
            "gigaoperations": round(operations / 1e9, 3),
            "gigabytes": round(size / 1e9, 3),
            "arithmetic ms": round(operations / peak["gflops"] / 1e6, 2),
            "memory ms": round(size / peak["gbytes"] / 1e6, 2),
            "limit ms": round(least, 2),
        }
