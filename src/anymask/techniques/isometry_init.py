"""Initial weights as near to an isometry as the mask allows."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from anymask.errors import SettingError
from anymask.schedules import Schedule
from anymask.techniques.base import Attached, Context, Technique
from anymask.techniques.neurons import Neurons, reinitialise


@dataclass(frozen=True)
class IsometryInit(Technique):
    r"""Kept weights of each layer moved towards orthogonal rows, or orthogonal columns where there are fewer, before the first step.

    With W the weights of a layer as a matrix (outputs, fan-in), 0 where the mask prunes, `towards_isometry` lowers

        || W W^T - I ||_F     or     || W^T W - I ||_F     over the kept weights,

    whichever Gram matrix is smaller once rows and columns that keep nothing are left out; W times `gain` is what the layer gets. It
    begins with the weights that are there and draws nothing, so it is deterministic. Each group of a convolution, each of the
    query, key and value projections of nn.MultiheadAttention and each gate of a recurrent layer is a matrix of its own.

    Args:
        gain: of the singular values, > 0; 1 is the paper's, sqrt(2) makes up for a ReLU where no norm follows.
        iterations: at most so many for each matrix, >= 1; one costs 6 n^2 m FLOPs for n x m, n <= m.
        tolerance: it ends before where one lowers the squared error by less than this share, in [0, 1).

    Raises:
        TechniqueError: on attach, without a mask, without a masked layer, or on a model cut by fully_shard.

    Example:
        >>> import torch, anymask
        >>> from anymask.techniques import Context
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(64, 16, bias=False)
        >>> mask = anymask.prune(model, "random", sparsity=0.7)
        >>> print(IsometryInit().attach(Context(model, None, torch.nn.functional.cross_entropy, mask=mask)).found)
        1 layers, ||G - I|| / ||I|| from 0.90 to 0.01

    Reference: A Signal Propagation Perspective for Pruning Neural Networks at Initialization (arXiv 1906.06307). Differs from the
    authors' code, which makes 10,000 steps of gradient descent of learning rate 0.1 on the norm, always of the Gram matrix of the
    outputs, from an orthogonal initialisation: here conjugate gradients with an exact line search descend on its square.
    Exact Orthogonal Initialization (arXiv 2406.01755) is exact, but chooses the mask itself.
    """

    name: ClassVar[str] = "isometry_init"
    seam: ClassVar[str] = "init"
    about: ClassVar[str] = "initial weights of each layer moved towards orthogonal rows or columns"
    paper: ClassVar[str] = "arXiv 1906.06307"

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="0%", end="0%"))
    gain: float = 1.0
    iterations: int = 15
    tolerance: float = 0.001

    def __post_init__(self) -> None:
        checks = (
            ("gain", 0 < self.gain < math.inf, "a finite number > 0", "1 is the paper's"),
            ("iterations", self.iterations >= 1, "an integer >= 1", "15 is the default"),
            ("tolerance", 0 <= self.tolerance < 1, "a number in [0, 1)", "0.001 is the default"),
        )
        for name, right, allowed, fix in checks:
            if not right:
                raise SettingError(f"{name} came as {getattr(self, name)}", allowed=allowed, fix=fix)

    def attach(self, context: Context) -> Attached:
        sums = [0.0, 0.0, 0.0]  # of ||G - I||^2 before and after, and ||I||^2

        def change(layer: Neurons) -> Tensor:
            found = []
            for rows, kept in zip(layer.rows.chunk(layer.parts), layer.kept.chunk(layer.parts), strict=True):
                done = towards_isometry(rows / self.gain, kept, iterations=self.iterations, tolerance=self.tolerance)
                found.append(done.rows * self.gain)
                for place, value in enumerate((done.before, done.after, done.size)):
                    sums[place] += value
            return torch.cat(found)

        layers, attached = reinitialise(context, self, change), Attached()
        before, after = (math.sqrt(value / max(sums[2], 1.0)) for value in sums[:2])
        attached.found = f"{layers} layers, ||G - I|| / ||I|| from {before:.2f} to {after:.2f}"
        return attached


@dataclass(frozen=True)
class Isometry:
    """What `towards_isometry` found.

    Args:
        rows: the new weights, 0 where pruned.
        before, after: ||G - I||_F^2 of the weights that were given, and of `rows`.
        size: the number n of rows of G, which is ||I||^2.
    """

    rows: Tensor
    before: float
    after: float
    size: int


@torch.no_grad()
def towards_isometry(rows: Tensor, kept: Tensor, *, iterations: int, tolerance: float) -> Isometry:
    """Lower ||G - I||_F over the kept weights of a matrix, G being the smaller one of W W^T and W^T W.

    Rows and columns whose kept weights are all 0 are left alone and do not count in G. At first each row (column, where these are
    fewer) is scaled to norm 1. Then conjugate gradients (Polak-Ribiere, never below 0) descend; along a line the squared norm is a
    polynomial of degree 4, whose least value is found exactly, so it never rises.

    Args:
        rows: (outputs, inputs), floating; float16 and bfloat16 are worked on as float32.
        kept: bool, like `rows`.
        iterations: at most so many steps, >= 0.
        tolerance: it ends where a step lowers the squared norm by less than this share.

    Example:
        >>> done = towards_isometry(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.ones(2, 2).bool(), iterations=20, tolerance=0.0)
        >>> round(done.before), round(done.after, 6)
        (713, 0.0)
    """
    whole = (rows * kept).to(torch.promote_types(rows.dtype, torch.float32))
    lives = whole.any(1).nonzero(), whole.any(0).nonzero().T
    w, mask = whole[lives], kept[lives]
    flip = w.shape[0] > w.shape[1]
    w, mask = (w.T, mask.T) if flip else (w, mask)
    if not w.numel():
        return Isometry(whole, 0.0, 0.0, 0)
    before = _square(_error(w))
    w = w / w.norm(dim=1, keepdim=True)
    w, after = _descend(w, mask, iterations=iterations, tolerance=tolerance)
    whole[lives] = w.T if flip else w
    return Isometry(whole, before, after, len(w))


def _descend(w: Tensor, kept: Tensor, *, iterations: int, tolerance: float) -> tuple[Tensor, float]:
    """`w` after the steps, and the squared error there."""
    error, slope, direction = _error(w), torch.zeros_like(w), torch.zeros_like(w)
    value, noise = _square(error), (len(w) * torch.finfo(w.dtype).eps) ** 2
    for step in range(iterations):
        last, slope = slope, (error @ w) * kept  # a quarter of the gradient of ||error||^2
        turn = max(0.0, _dot(slope, slope - last) / max(_square(last), 1e-300)) if step else 0.0
        direction = turn * direction - slope
        linear, square = w @ direction.T, direction @ direction.T
        linear += linear.T.clone()
        t = _least(error, linear, square)
        error += t * linear + t * t * square
        there = _square(error)
        if value <= noise or not there < value * (1 - tolerance):
            break
        w, value = w + t * direction, there
    return w, _square(_error(w))


def _least(a: Tensor, b: Tensor, c: Tensor) -> float:
    """The t with the least ||a + t b + t^2 c||^2."""
    polynomial = np.array([_square(c), 2 * _dot(b, c), _square(b) + 2 * _dot(a, c), 2 * _dot(a, b), _square(a)])
    if not polynomial[0] > 0 or not np.isfinite(polynomial).all():  # no direction is left, or weights that are no numbers
        return 0.0
    turns = np.roots(np.polyder(polynomial))
    real = turns.real[np.abs(turns.imag) <= 1e-9 * np.abs(turns)]  # a cubic has one at least
    return float(real[np.polyval(polynomial, real).argmin()])


def _error(w: Tensor) -> Tensor:
    gram = w @ w.T
    gram.diagonal().sub_(1)
    return gram


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y).sum())
