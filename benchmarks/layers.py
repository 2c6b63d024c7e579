"""Layer by layer, beside dense PyTorch and whatever computes with kept weights alone: forward, input gradient, weight gradient.

    python benchmarks/layers.py          on a quiet machine; writes results/sparse/layers.json

It takes those that can be imported by the Python it runs under: SparseProp (PyPI `sparseprop`) and sparselab beside PyTorch and SciPy.
Each has its activations in the layout that suits it best; for ours there is a second number with the change from channels_last and back.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import Record, arguments, figure, in_turns, say, summary

from anymask.kernels import Gather
from anymask.sparse import layout, memory, ops

Call = Callable[[], tuple[Any, ...]]
LAST = torch.channels_last
OURS, CONVERTED = "anymask", "anymask, from channels_last"
DENSE = ("dense, NCHW", "dense, channels_last")
OTHERS = {"SparseProp": "sparseprop", "sparselab": "sparselab", "PyTorch CSR": "torch", "SciPy CSR": "scipy"}  # name -> module
LINEAR_ONLY = ("sparselab", "PyTorch CSR", "SciPy CSR")


@dataclass(frozen=True)
class Layer:
    """A convolution (or linear layer: a kernel of 0) without bias."""

    name: str
    inputs: int
    outputs: int
    pixels: int = 1
    kernel: int = 3
    stride: int = 1

    @property
    def padding(self) -> int:
        """Zeros at each side."""
        return self.kernel // 2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the weight."""
        return (self.outputs, self.inputs, max(1, self.kernel), max(1, self.kernel))


LAYERS = (
    Layer("3x3, 64 channels, 32x32", 64, 64, 32),
    Layer("3x3, 128 channels, 16x16", 128, 128, 16),
    Layer("3x3, 256 channels, 8x8", 256, 256, 8),
    Layer("3x3, 512 channels, 4x4", 512, 512, 4),
    Layer("3x3 stride 2, 64 to 128, 32x32", 64, 128, 32, stride=2),
    Layer("1x1, 256 channels, 8x8", 256, 256, 8, kernel=1),
    Layer("linear, 1024 to 1024", 1024, 1024, kernel=0),
)
TINY = (Layer("3x3, 16 channels, 8x8", 16, 16, 8), Layer("linear, 32 to 32", 32, 32, kernel=0))


class Case:
    """A layer with its kept weights, and random images and gradients (N, C, H, W)."""

    def __init__(self, layer: Layer, sparsity: float, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layer, numel = layer, int(np.prod(layer.shape))
        self.kept = torch.randperm(numel, generator=generator)[: round(numel * (1 - sparsity))].sort().values
        self.values = torch.randn(len(self.kept), generator=generator) / 8
        self.weight = torch.zeros(numel).index_put((self.kept,), self.values).reshape(layer.shape)
        self.x = torch.randn(batch, layer.inputs, layer.pixels, layer.pixels, generator=generator)
        out = (layer.pixels - 1) // layer.stride + 1
        self.g = torch.randn(batch, layer.outputs, out, out, generator=generator)

    def calls(self) -> dict[str, Call]:
        """Whoever can be had, by name; each gives (output, input gradient, gradient of the kept weights or of all)."""
        made = {OURS: self._ours(), CONVERTED: self._converted(), **self._dense()}
        if _has("sparseprop"):
            made |= self._sparseprop()
        if not self.layer.kernel:
            made |= {"PyTorch CSR": self._csr(), "SciPy CSR": self._scipy()}
            if _has("sparselab"):
                made["sparselab"] = self._sparselab()
        return made

    def _ours(self) -> Call:
        self.gather = Gather(self.layer.shape, self.kept.numpy(), stride=(self.layer.stride,) * 2, padding=(self.layer.padding,) * 2)
        x, g = (layout.batch_last(t).permute(3, 0, 1, 2) for t in (self.x, self.g))
        return _step(lambda x, w: ops.conv(x, w, None, self.gather.handle), x, self.values, g)

    def _converted(self) -> Call:
        step = _step(
            lambda x, w: ops.conv(layout.batch_last(x).permute(3, 0, 1, 2), w, None, self.gather.handle).contiguous(memory_format=LAST),
            self.x.contiguous(memory_format=LAST), self.values, self.g.contiguous(memory_format=LAST),
        )  # fmt: skip

        def call() -> tuple[Any, ...]:
            y, gx, gw = step()
            return y, gx.contiguous(memory_format=LAST), gw

        return call

    def _dense(self) -> dict[str, Call]:
        if not self.layer.kernel:
            return {"dense, NCHW": _step(F.linear, self.x[:, :, 0, 0], self.weight[:, :, 0, 0], self.g[:, :, 0, 0])}
        conv = partial(F.conv2d, stride=self.layer.stride, padding=self.layer.padding)
        last = [t.contiguous(memory_format=LAST) for t in (self.x, self.weight, self.g)]
        return {"dense, NCHW": _step(conv, self.x, self.weight, self.g), "dense, channels_last": _step(conv, *last)}

    def _sparseprop(self) -> dict[str, Call]:
        from sparseprop.modules import SparseConv2d, SparseLinear

        if not self.layer.kernel:
            linear = SparseLinear(self.weight[:, :, 0, 0])
            return {"SparseProp": _step(lambda x, _: linear(x), self.x[:, :, 0, 0], linear.W_val, self.g[:, :, 0, 0])}
        made = {}
        for over in (False, True):  # its two ways; it measures which one is faster
            conv = SparseConv2d(self.weight, padding=self.layer.padding, stride=self.layer.stride, vectorizing_over_on=over)
            made[f"SparseProp {int(over)}"] = _step(lambda x, _, conv=conv: conv(x), self.x, conv.W_val, self.g)
        return made

    def _sparselab(self) -> Call:
        import sparselab

        layer = sparselab.SparseLinear(self.layer.inputs, self.layer.outputs, bias=False)
        layer._csr = sparselab.PaddedCSR.from_dense(self.weight[:, :, 0, 0].contiguous())
        layer._values = nn.Parameter(torch.from_numpy(np.asarray(layer._csr.values)))
        return _step(lambda x, _: layer(x), self.x[:, :, 0, 0], layer._values, self.g[:, :, 0, 0])

    def _csr(self) -> Call:
        dense = self.weight[:, :, 0, 0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a beta
            w, back = dense.to_sparse_csr(), dense.t().to_sparse_csr()
        x, g = self.x[:, :, 0, 0].t().contiguous(), self.g[:, :, 0, 0].t().contiguous()
        return lambda: ((w @ x).t(), (back @ g).t(), torch.sparse.sampled_addmm(w, g, x.t(), beta=0.0).values())

    def _scipy(self) -> Call:
        from scipy.sparse import csr_array

        w = csr_array(self.weight[:, :, 0, 0].numpy())
        back = csr_array(w.T)
        rows, cols = np.repeat(np.arange(self.layer.outputs), np.diff(w.indptr)), w.indices
        x, g = (np.ascontiguousarray(t[:, :, 0, 0].numpy().T) for t in (self.x, self.g))
        return lambda: ((w @ x).T, (back @ g).T, np.einsum("kn,kn->k", g[rows], x[cols]))

    def difference(self, found: tuple[Any, ...]) -> float:
        """How far output and gradients are from the dense ones, relative to the largest entry of each."""
        layer = self.layer
        how = {"stride": layer.stride, "padding": layer.padding}
        y, gx, gw = _step(partial(F.conv2d, **how), self.x, self.weight, self.g)()
        off = 0.0
        for ours, exact in zip(found, (y.detach(), gx, gw.flatten()[self.kept]), strict=True):
            ours = torch.as_tensor(np.asarray(ours.detach())) if isinstance(ours, Tensor) else torch.as_tensor(np.array(ours))
            ours = ours.flatten()[self.kept] if ours.numel() == self.weight.numel() and exact.ndim == 1 else ours
            if ours.numel() == exact.numel():  # sparselab's gradient has padding in it
                off = max(off, float((ours.reshape(exact.shape) - exact).abs().max() / exact.abs().max()))
        return figure(off)


def _step(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, g: Tensor) -> Call:
    x, weight = x.detach().requires_grad_(), weight if isinstance(weight, nn.Parameter) else weight.detach().requires_grad_()

    def call() -> tuple[Any, ...]:
        y = run(x, weight)
        gradients = torch.autograd.grad(y, (x, weight), g)
        memory.follow()
        return (y, *gradients)

    return call


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def measure(layer: Layer, sparsity: float, batch: int, rounds: int) -> dict[str, Any]:
    """One layer at one sparsity, all in turns."""
    memory.prepare()
    case = Case(layer, sparsity, batch)
    calls = case.calls()
    off = {}
    for name, call in calls.items():
        off[name] = case.difference(call())
        call()
    times: dict[str, Any] = {name: summary(seconds) for name, seconds in in_turns(calls, rounds=rounds).items()}
    ways = [name for name in times if name.startswith("SparseProp ")]
    if ways:
        best = min(ways, key=lambda way: times[way]["ms"])
        times["SparseProp"], off["SparseProp"] = times[best], off[best]
        for way in ways:
            del times[way], off[way]
    fastest = min((name for name in DENSE if name in times), key=lambda name: times[name]["ms"])
    speedup = {name: figure(times[fastest]["ms"] / found["ms"]) for name, found in times.items() if name not in DENSE}
    for name, module in OTHERS.items():
        if name not in times:
            speedup[name] = "not installed" if not _has(module) else "linear layers only" if name in LINEAR_ONLY else "no form of it"
    say(f"{layer.name}, {sparsity}: {times[fastest]['ms']} ms {fastest}; times as fast: {speedup}; differences {off}")
    return {"name": f"{layer.name}, {sparsity}", "layer": layer.name, "sparsity": sparsity, "batch": batch, "fastest": fastest,
            "times": times, "speedup": speedup, "differences": off}  # fmt: skip


def main(given: list[str] | None = None) -> None:
    asked = arguments(__doc__, "layers", [f"{layer.name}, SPARSITY" for layer in LAYERS], given)
    layers, sparsities, batch = (TINY, (0.9, 0.98), 16) if asked.tiny else (LAYERS, (0.90, 0.95, 0.98, 0.99), 128)
    cases = {f"{layer.name}, {sparsity}": (layer, sparsity) for layer in layers for sparsity in sparsities}
    record = Record(asked.out, only=asked.only, cases=cases)
    for name in record.missing():
        record.put(measure(*cases[name], batch, asked.rounds or (2 if asked.tiny else 7)))
    record.finish()


if __name__ == "__main__":
    main()
