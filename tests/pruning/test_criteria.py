"""Laws of the criteria. Their formulas, written out a second time, are in tests/reference."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import anymask
from anymask.errors import MaskError, TechniqueError
from anymask.prunables import prunable
from anymask.pruning import criteria
from anymask.pruning.batches import Batches


def net(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def data(batches=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0])) for _ in range(batches)]


def scores_of(criterion, model, **seen):
    weights = {name: p.detach().clone() for name, p in prunable(model).items()}
    return criterion(model, weights, Batches(torch.Generator().manual_seed(0), **seen))


def test_removing_what_grasp_scores_lowest_raises_the_gradient_flow_most():
    model, pairs = net(3, 4, 2, seed=2), data(batches=1)
    scores = torch.cat([s.reshape(-1) for s in scores_of(criteria.grasp, model, pairs=pairs).values()])

    def flow(shrunk):
        """|g|^2 with weight number `shrunk` a little nearer to 0."""
        model.zero_grad()
        model.requires_grad_(True)
        with torch.no_grad():
            weight, index = (model[0].weight, shrunk) if shrunk < 12 else (model[2].weight, shrunk - 12)
            old = weight.view(-1)[index].clone()
            weight.view(-1)[index] *= 1 - 1e-6
        F.cross_entropy(model(pairs[0][0]) / 200, pairs[0][1]).backward()
        with torch.no_grad():
            weight.view(-1)[index] = old
        return sum(float(p.grad.square().sum()) for p in model.parameters())

    changes = torch.tensor([flow(i) for i in range(len(scores))], dtype=torch.float64)
    assert int(changes.argmax()) == int(scores.argmin())
    assert int(changes.argmin()) == int(scores.argmax())


def test_grasp_of_a_loss_without_curvature_is_zero():
    got = scores_of(criteria.grasp, net(3, 2), pairs=data(), loss=lambda out, y: out.sum())
    assert not got["0.weight"].any()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 8, dropout=0.0, batch_first=True
        )  # with dropout torch takes the one that is not fused
        self.head = nn.Sequential(nn.Hardsigmoid(), nn.Linear(4, 2))

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def test_grasp_scores_attention_and_hard_sigmoids_which_have_no_second_derivative_as_they_are():
    torch.manual_seed(0)
    mask = anymask.prune(Attention(), "grasp", sparsity=0.5, data=[(torch.randn(4, 3, 4), torch.tensor([0, 1, 1, 0]))])
    assert mask.kept == mask.total // 2


def test_grasp_refuses_a_network_that_cannot_be_differentiated_twice():
    class Net(nn.Linear):
        def forward(self, x):
            return torch.ops.aten.hardsigmoid.default(super().forward(x))  # what nobody can replace

    with pytest.raises(TechniqueError, match=r"Net cannot be differentiated twice.*another method, such as snip"):
        anymask.prune(Net(3, 2), "grasp", sparsity=0.5, data=[(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))])


def test_synflow_takes_100_rounds_unless_told_otherwise():
    mask = anymask.prune(net(3, 4, 2), "synflow", sparsity=0.5, data=[torch.zeros(2, 3)])
    assert mask.info["rounds"] == 100


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_running_statistics_of_batch_norm_have_no_part_in_the_scores(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    loader = [(torch.randn(4, 2, 5, 5), torch.tensor([0, 1, 1, 0]))]
    fresh = anymask.prune(model.train(), method, sparsity=0.5, data=loader)
    model(torch.randn(8, 2, 5, 5) * 500 + 200)  # moves the statistics far away
    assert float(model[1].running_mean.abs().max()) > 1
    assert anymask.prune(model.eval(), method, sparsity=0.5, data=loader) == fresh


@pytest.mark.parametrize("gain", [0.01, 1.0, 5.0])
def test_synflow_is_finite_and_conserved_through_104_layers(gain):
    model = net(*[32] * 105)
    for weight in model.parameters():
        weight.data.mul_(gain)
    got = scores_of(criteria.synflow, model.float(), shape=(32,))
    assert all(float(score.sum()) == pytest.approx(1, rel=1e-9) for score in got.values())


def test_synflow_says_that_it_has_no_input_for_token_ids():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(TechniqueError, match=r"fails on the input of synflow, \(1, 4\) of ones.*such as snip or magnitude"):
        anymask.prune(model, "synflow", sparsity=0.5, example=torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("weight", [1e27, 1e30])  # the sum of the outputs only, or activations too
def test_synflow_refuses_a_flow_beyond_float64_rather_than_rank_what_is_left(weight):
    model = net(*[10] * 12)
    for parameter in model.parameters():
        nn.init.constant_(parameter, weight)
    with pytest.raises(MaskError, match=r"the flow of synflow came as inf"):
        anymask.prune(model, "synflow", sparsity=0.5, example=torch.zeros(1, 10))


def test_random_is_random_erk_and_keeps_every_weight_equally_often():
    model = nn.Linear(4, 5)
    assert anymask.prune(model, "random", sparsity=0.5, seed=1) == anymask.prune(model, "random-erk", sparsity=0.5, seed=1)
    hits = sum(anymask.prune(model, "random", sparsity=0.7, seed=seed)["weight"].double() for seed in range(400))
    # 400 draws with p = 0.3: standard deviation 9.2; five of them
    assert bool(((hits - 120).abs() < 46).all()), hits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_masks_know_nothing_of_weights_that_were_drawn_with_their_seed(dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(100, 50, bias=False, dtype=dtype)
    kept = anymask.prune(layer, "random", sparsity=0.5, seed=0)["weight"]
    values = layer.weight.detach()
    assert abs(float(values[kept].mean() / values.std())) < 0.1  # 2,500 weights: 5 standard errors
    assert abs(float(values[kept].abs().mean() / values.abs().mean()) - 1) < 0.06


@pytest.mark.parametrize("method", ["random-uniform", "random-er", "random-erk"])
def test_random_masks_have_the_densities_their_names_say(method):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 10), nn.Linear(10, 10))  # 288, 80, 100
    mask = anymask.prune(model, method, sparsity=0.5)
    # uniform: a half each; ER: eps = 234 / 146, kept 173.1, 28.8, 32.05; ERK: eps = 234 / 56, kept 75.2, 75.2, 83.6
    expected = {"random-uniform": [144, 40, 50], "random-er": [173, 29, 32], "random-erk": [75, 75, 84]}[method]
    assert [int(kept.sum()) for kept in mask.values()] == expected
