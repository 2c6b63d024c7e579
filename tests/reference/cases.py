"""Small networks in torch and the same ones for the references, and the comparison of one method on one of them."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import anymask
from anymask.prunables import prunable
from anymask.pruning import METHODS
from anymask.pruning.batches import Batches
from tests.reference import formulas, masks
from tests.reference.formulas import Layer

BATCHES = 2
IMAGES = 48  # in a batch: enough that few units are dead, whose weights would all score 0


def chain(bias=True):
    """Widths divisible by 4. Without biases a masked network may stand on the kink of a ReLU, where no Hessian is."""
    widths = [(16, 24), (24, 16), (16, 8)]
    return nn.Sequential(*[layer for a, b in widths for layer in (nn.Linear(a, b, bias=bias), nn.ReLU())][:-1])


def conv():
    """Stride, uneven padding and groups; biases."""
    return nn.Sequential(
        *(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=(1, 0), groups=2), nn.ReLU(), nn.Flatten()),
        nn.Linear(24, 5),
    )


def norm():
    """Dilation, an uneven kernel, a depth-wise convolution, batch norm."""
    return nn.Sequential(
        *(nn.Conv2d(2, 6, (3, 2), dilation=(1, 2), bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 10, 1), nn.BatchNorm2d(10), nn.ReLU(), nn.Flatten(), nn.Linear(120, 4)),
    )


NETS = {
    "chain": (chain, (16,), 8),
    "plain": (lambda: chain(bias=False), (16,), 8),
    "conv": (conv, (4, 6, 6), 5),
    "norm": (norm, (2, 6, 5), 4),
}
SCORED = {"magnitude": 1, "snip": 1, "snip-iterative": 60, "force": 60, "grasp": 1, "synflow": 100, "taylor": 1, "wanda": 1}  # rounds
REGROWING = {"force"}
RANDOM = {"random": "erk", "random-uniform": "uniform", "random-er": "er", "random-erk": "erk", "random-balanced": "balanced"}


def model_of(net, seed):
    """In float64; biases and batch norms hold numbers of their own, as after a training."""
    torch.manual_seed(seed)
    model = NETS[net][0]().double()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.1, 0.5)
        if isinstance(module, nn.Linear) and module.bias is None:
            nn.init.normal_(module.weight, std=0.3)
    return model


def data_of(net, seed, *, batches=BATCHES + 1):
    """One batch more than is looked at."""
    _, shape, classes = NETS[net]
    generator = torch.Generator().manual_seed(1000 + seed)
    draw = [torch.randn(IMAGES, *shape, generator=generator, dtype=torch.float64) for _ in range(batches)]
    return [(x, torch.randint(classes, (IMAGES,), generator=generator)) for x in draw]


def arrays(pairs):
    return [(x.numpy(), y.numpy()) for x, y in pairs]


def layers_of(model):
    """The sequence of modules as the references take it."""
    return [_layer(str(number), module) for number, module in enumerate(model)]


def _layer(name, module):
    values = {key: value.detach().numpy().copy() for key, value in module.named_parameters()}
    if isinstance(module, nn.Linear):
        return Layer("linear", f"{name}.weight", **values)
    if isinstance(module, nn.Conv2d):
        how = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups")}
        return Layer("conv", f"{name}.weight", **values, **how)
    if isinstance(module, nn.BatchNorm2d):
        return Layer("norm", **values, eps=module.eps, mean=module.running_mean.numpy(), variance=module.running_var.numpy())
    return Layer("relu" if isinstance(module, nn.ReLU) else "flatten")


# -- scores -------------------------------------------------------------------------------------------------------------
def reference_score(method, net, pairs, shape):
    """Masked layers -> scores, of the formula of this row of METHODS; `net` has the weights that are not masked."""
    if method == "synflow":
        graph = formulas.as_graph(net, shape)
        return lambda cut: formulas.synflow(cut, graph, shape)
    if method == "force":
        return masks.force(net, pairs)
    formula = getattr(formulas, {"snip-iterative": "snip"}.get(method, method))
    return lambda cut: formula(cut, pairs)


def scores_of(method, model, pairs, shape, mask=None):
    """What the criterion of the row gives for `model`, in which weights outside `mask` are 0."""
    weights = {name: weight.detach().clone() for name, weight in prunable(model).items()}
    cut = copy.deepcopy(model)
    if mask is not None:
        anymask.Mask({name: torch.from_numpy(kept) for name, kept in mask.items()}).apply(cut)
    found = METHODS[method].criterion(cut, weights, Batches(torch.Generator(), pairs=pairs, shape=shape))
    return {name: score.numpy() for name, score in found.items()}


def difference(scores, reference, where=None):
    """The largest |a - b| / |b| of single scores, after both are divided by the sum of all |scores|: common factors do not count."""
    where = where or {name: np.ones(score.shape, bool) for name, score in reference.items()}
    a, b = (np.concatenate([part[name][where[name]] for name in reference]) for part in (scores, reference))
    a, b = a / abs(a).sum(), b / abs(b).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(a == b, 0.0, abs(a - b) / abs(b)).max())


def half(net, seed):
    """A random half of the weights."""
    draw = np.random.default_rng(seed)
    return {name: draw.random(weight.shape) < 0.5 for name, weight in formulas.weights_of(net).items()}


# -- masks --------------------------------------------------------------------------------------------------------------
def reference_mask(method, net, score, count):
    """The mask, how many weights it keeps and after how many rounds: `count` and all of them, or those before the first tie.

    Raises:
        Tie: where the first round has one already.
    """
    if method == "wanda":
        scores = score(net)
        shapes = {name: s.shape for name, s in scores.items()}
        wanted = masks.wanted_by_bisection(shapes, count, "uniform")
        return masks.equal_fan_in(scores, masks.whole(wanted, count, {name: shape[0] for name, shape in shapes.items()})), count, 1
    rounds = SCORED[method]
    while True:
        try:
            return masks.in_rounds(net, count, rounds, score, regrow=method in REGROWING), count, rounds
        except masks.Tie as tie:  # the rounds before it end where the schedule stood then
            count, rounds = tie.left, tie.rounds
            if not rounds:
                raise


@dataclass(frozen=True)
class Comparison:
    """difference: of scores; agree of entries: of the mask, or of the layers' counts; rounds of asked: those before a tie."""

    difference: float | None
    agree: int
    entries: int
    rounds: int = 1
    asked: int = 1
    mask: dict[str, np.ndarray] | None = None


def compare(method, net, seed, sparsity):
    """One row of METHODS that scores (not random, not lottery) against its reference on one network."""
    model, data, shape = model_of(net, seed), data_of(net, seed), NETS[net][1]
    pairs, layers = arrays(data[:BATCHES]), layers_of(model)
    score = reference_score(method, layers, pairs, shape)
    cut = half(layers, seed)
    apart = max(
        difference(scores_of(method, model, data[:BATCHES], shape), score(layers)),
        difference(scores_of(method, model, data[:BATCHES], shape, cut), score(formulas.masked(layers, cut)), _ranked(method, cut)),
    )
    asked = SCORED[method]
    try:
        wanted, count, rounds = reference_mask(method, layers, score, round((1 - sparsity) * size_of(layers)))
    except masks.Tie:
        return Comparison(apart, agree=0, entries=0, rounds=0, asked=asked)
    how = {} if rounds == asked else {"rounds": rounds}  # the method's own unless a tie ends them
    mask = anymask.prune(model, method, sparsity=1 - count / size_of(layers), data=data, batches=BATCHES, **how)
    return Comparison(apart, agree=agreement(mask, wanted), entries=size_of(layers), rounds=rounds, asked=asked, mask=wanted)


def size_of(net):
    return sum(weight.size for weight in formulas.weights_of(net).values())


def agreement(mask, wanted):
    """How many entries are equal."""
    return sum(int((mask[name].numpy() == kept).sum()) for name, kept in wanted.items())


def _ranked(method, cut):
    """Where scores are compared in a later round: everywhere in FORCE, else on what is left."""
    return None if method in REGROWING else cut


def compare_random(method, net, seed, sparsity):
    """How many layers keep what bisection finds; which weights is a matter of lots."""
    model = model_of(net, seed)
    shapes = {name: weight.shape for name, weight in formulas.weights_of(layers_of(model)).items()}
    mask = anymask.prune(model, method, sparsity=sparsity, seed=seed)
    counts = masks.layer_counts(shapes, round((1 - sparsity) * mask.total), RANDOM[method])
    return Comparison(None, agree=sum(int(mask[name].sum()) == count for name, count in counts.items()), entries=len(counts))


# -- lottery tickets ------------------------------------------------------------------------------------------------------
STEPS = 6
REWIND = 2


def rate(step):
    """A learning rate that falls: where a training starts matters."""
    return 0.5 / (1 + step)


def torch_train(data):
    """A training of STEPS steps of plain gradient descent that holds its mask, as `prune` takes it."""

    def train(model, mask, first, last):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        hold = anymask.hold(mask, model, optimizer) if mask is not None else None
        for step in range(first, STEPS if last is None else last):
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.zero_grad()
            x, y = data[step % len(data)]
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if hold is not None:
            hold.release()

    return train


LOTTERIES = {
    "lottery": {},
    "lottery-oneshot": {"one_shot": True},
    "lottery-rewind": {"rewind_step": REWIND},
    "lottery-lr": {"keep_weights": True},
}


def compare_lottery(method, seed, sparsity):
    """The masks of a lottery row and of a training written out in NumPy; the scores are the weights that were trained."""
    model, data = model_of("plain", seed), data_of("plain", seed)
    layers, pairs = layers_of(model), arrays(data)

    def train(net, mask, first, last):
        return masks.descend(net, pairs, rate=rate, steps=(first, STEPS if last is None else last), mask=mask)

    trained = copy.deepcopy(model)
    torch_train(data)(trained, None, 0, None)
    final = {name: abs(weight.detach().numpy()) for name, weight in prunable(trained).items()}
    apart = difference(final, formulas.magnitude(train(layers, masks.ones(layers), 0, None), ()))
    wanted = masks.lottery(layers, round((1 - sparsity) * size_of(layers)), train, **LOTTERIES[method])
    how = {"rewind_step": REWIND} if method == "lottery-rewind" else {}
    mask = anymask.prune(model, method, sparsity=sparsity, train=torch_train(data), **how)
    return Comparison(apart, agree=agreement(mask, wanted), entries=size_of(layers), mask=wanted)
