"""A network as a plain graph of single values, searched by hand: shares nothing with anymask.connectivity, and uses no gradient."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import product

import numpy as np

Key = tuple[str, tuple[int, ...]]  # parameter and index of one weight


class Graph:
    """Nodes are numbers in arrays of a tensor's shape, without the batch dimension; edges may carry the key of a weight."""

    def __init__(self, kept: Mapping[str, np.ndarray]) -> None:
        self.kept = kept
        self.nodes = 0
        self.edges: list[tuple[int, int, Key | None]] = []

    def new(self, *shape: int) -> np.ndarray:
        made = np.arange(self.nodes, self.nodes + int(np.prod(shape))).reshape(shape)
        self.nodes += made.size
        return made

    def join(self, source: int, target: int, name: str | None = None, index: tuple[int, ...] = ()) -> None:
        if name is None or self.kept[name][index]:
            self.edges.append((int(source), int(target), None if name is None else (name, index)))

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = self.new(self.kept[name].shape[0])
        for o, i in np.ndindex(self.kept[name].shape):
            self.join(x[i], y[o], name, (o, i))
        return y

    def conv(self, x: np.ndarray, name: str, *, stride: int = 1, pad: int = 0, groups: int = 1) -> np.ndarray:
        outs, per_group, k, _ = self.kept[name].shape
        y = self.new(outs, *((n + 2 * pad - k) // stride + 1 for n in x.shape[1:]))
        for (o, r, c), (i, dr, dc) in product(np.ndindex(y.shape), np.ndindex(per_group, k, k)):
            channel = o // (outs // groups) * per_group + i
            row, column = r * stride + dr - pad, c * stride + dc - pad
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                self.join(x[channel, row, column], y[o, r, c], name, (o, i, dr, dc))
        return y

    def transposed(self, x: np.ndarray, name: str, *, stride: int, groups: int) -> np.ndarray:
        ins, per_group, k, _ = self.kept[name].shape
        y = self.new(per_group * groups, *((n - 1) * stride + k for n in x.shape[1:]))
        for (i, r, c), (o, dr, dc) in product(np.ndindex(x.shape), np.ndindex(per_group, k, k)):
            channel = i // (ins // groups) * per_group + o
            self.join(x[i, r, c], y[channel, r * stride + dr, c * stride + dc], name, (i, o, dr, dc))
        return y

    def pool(self, x: np.ndarray, k: int, *, ceil: bool = False, pad: int = 0) -> np.ndarray:
        """Windows of k x k, side by side."""
        y = self.new(x.shape[0], *((n + 2 * pad + (k - 1 if ceil else 0)) // k for n in x.shape[1:]))
        for (o, r, c), dr, dc in product(np.ndindex(y.shape), range(k), range(k)):
            row, column = r * k + dr - pad, c * k + dc - pad
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                self.join(x[o, row, column], y[o, r, c])
        return y

    def mean(self, x: np.ndarray) -> np.ndarray:
        """(C, H, W) to (C)."""
        y = self.new(len(x))
        for o, r, c in np.ndindex(x.shape):
            self.join(x[o, r, c], y[o])
        return y

    def add(self, *terms: np.ndarray) -> np.ndarray:
        y = self.new(*terms[0].shape)
        for x, place in product(terms, np.ndindex(y.shape)):
            self.join(x[place], y[place])
        return y

    def used(self, inputs: np.ndarray, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """Of each parameter the weights on a path from `inputs` to `outputs`."""
        ahead, behind = defaultdict(list), defaultdict(list)
        for source, target, _ in self.edges:
            ahead[source].append(target)
            behind[target].append(source)
        forth, back = _from(inputs.flat, ahead), _from(outputs.flat, behind)
        found = {name: np.zeros_like(kept) for name, kept in self.kept.items()}
        for source, target, key in self.edges:
            if key is not None and source in forth and target in back:
                found[key[0]][key[1]] = True
        return found


def _from(starts: Iterable[int], steps: Mapping[int, list[int]]) -> set[int]:
    todo = list(starts)
    seen = set(todo)
    while todo:
        for node in steps.get(todo.pop(), ()):
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen
