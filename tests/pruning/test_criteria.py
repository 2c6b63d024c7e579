"""Every criterion against its formula, written out a second time by hand in float64. Nothing is shared with the package."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import anymask
from anymask.errors import MaskError
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


def best_of(scores, count):
    """The mask that keeps the `count` highest of hand-made scores without ties."""
    flat = torch.cat([torch.as_tensor(s).reshape(-1) for s in scores.values()])
    threshold = flat.sort(descending=True).values[count - 1]
    return {name: torch.as_tensor(s) >= threshold for name, s in scores.items()}


# -- SNIP: backpropagation through W2 relu(W1 x) and cross-entropy, loop by loop ---------------------------------------
def snip_by_hand(w1, w2, pairs):
    g1, g2 = np.zeros_like(w1), np.zeros_like(w2)
    for xs, ys in pairs:
        for x, y in zip(xs.numpy(), ys.numpy(), strict=True):
            hidden = [max(0.0, sum(w1[j, i] * x[i] for i in range(len(x)))) for j in range(len(w1))]
            logits = [sum(w2[k, j] * hidden[j] for j in range(len(hidden))) for k in range(len(w2))]
            z = sum(math.exp(v) for v in logits)
            error = [math.exp(v) / z - (k == y) for k, v in enumerate(logits)]
            for k in range(len(w2)):
                for j in range(len(hidden)):
                    g2[k, j] += error[k] * hidden[j] / len(xs)
            for j in range(len(hidden)):
                back = sum(error[k] * w2[k, j] for k in range(len(w2))) if hidden[j] > 0 else 0.0
                for i in range(len(x)):
                    g1[j, i] += back * x[i] / len(xs)
    return {"0.weight": abs(w1 * g1), "2.weight": abs(w2 * g2)}


def test_snip_equals_weight_times_gradient_by_hand():
    model, pairs = net(3, 4, 2), data()
    by_hand = snip_by_hand(model[0].weight.detach().numpy(), model[2].weight.detach().numpy(), pairs)
    got = scores_of(criteria.snip, model, pairs=pairs)
    for name, score in by_hand.items():
        np.testing.assert_allclose(got[name].numpy(), score, rtol=1e-9, atol=1e-15)


def test_prune_by_snip_keeps_the_best_by_hand_of_just_the_batches_asked_for():
    model, pairs = net(3, 4, 2), data(batches=3)
    w1, w2 = (model[i].weight.detach().numpy() for i in (0, 2))
    for batches in (1, 2, 3):
        by_hand = best_of(snip_by_hand(w1, w2, pairs[:batches]), 8)
        assert anymask.prune(model, "snip", sparsity=0.6, data=pairs, batches=batches) == anymask.Mask(by_hand)
    assert anymask.prune(model, "snip", sparsity=0.6, data=pairs) == anymask.Mask(best_of(snip_by_hand(w1, w2, pairs[:1]), 8))


# -- GraSP: the whole Hessian of the temperature-divided loss ----------------------------------------------------------
def grasp_by_hand(w1, w2, pairs):
    def loss(flat):
        a, b = flat[: w1.numel()].reshape(w1.shape), flat[w1.numel() :].reshape(w2.shape)
        total = 0.0
        for x, y in pairs:
            logits = (b @ (a @ x.T).clamp(min=0)).T / 200
            total = total + (logits.exp().sum(1).log() - logits[torch.arange(len(y)), y]).mean()
        return total

    theta = torch.cat([w1.reshape(-1), w2.reshape(-1)]).detach()
    gradient = torch.autograd.functional.jacobian(loss, theta)
    removal = -theta * (torch.autograd.functional.hessian(loss, theta) @ gradient)  # the paper's S: the highest are removed
    return {"0.weight": -removal[: w1.numel()].reshape(w1.shape), "2.weight": -removal[w1.numel() :].reshape(w2.shape)}


def test_grasp_equals_weight_times_hessian_times_gradient_by_hand():
    model, pairs = net(3, 4, 2), data()
    by_hand = grasp_by_hand(model[0].weight, model[2].weight, pairs)
    got = scores_of(criteria.grasp, model, pairs=pairs)
    for name, score in by_hand.items():
        torch.testing.assert_close(got[name], score, rtol=1e-8, atol=1e-20)
    assert anymask.prune(model, "grasp", sparsity=0.6, data=pairs) == anymask.Mask(best_of(by_hand, 8))


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


# -- SynFlow: sums over the paths of a linear chain --------------------------------------------------------------------
def synflow_by_hand(matrices):
    """|w_l[i, j]| * (sum of all paths from i to an output) * (sum of all paths from an input to j)."""
    matrices = [np.abs(m) for m in matrices]
    scores = []
    for at, matrix in enumerate(matrices):
        score = np.zeros_like(matrix)
        into = np.ones(matrices[0].shape[1])
        for m in matrices[:at]:
            into = m @ into
        out = np.ones(matrices[-1].shape[0])
        for m in reversed(matrices[at + 1 :]):
            out = out @ m
        for i in range(matrix.shape[0]):
            for j in range(matrix.shape[1]):
                score[i, j] = matrix[i, j] * out[i] * into[j]
        scores.append(score)
    return scores


def test_synflow_equals_the_sum_over_paths_divided_by_all_paths():
    model = net(3, 4, 5, 2)
    by_hand = synflow_by_hand([model[i].weight.detach().numpy() for i in (0, 2, 4)])
    flow = by_hand[0].sum()
    got = scores_of(criteria.synflow, model.float(), shape=(3,))
    for score, hand in zip(got.values(), by_hand, strict=True):
        assert float(score.sum()) == pytest.approx(1, abs=1e-6)  # the paper's law of conservation, layer by layer
        np.testing.assert_allclose(score.numpy(), hand / flow, rtol=1e-6)


@pytest.mark.parametrize("rounds", [1, 3, 100])
def test_synflow_prunes_round_by_round_as_by_hand(rounds):
    model = net(6, 12, 12, 6)
    names, kept = ["0.weight", "2.weight", "4.weight"], 140  # of 288; with few left, weights in a row have equal scores
    weights = [model[i].weight.detach().numpy().copy() for i in (0, 2, 4)]
    for number in range(1, rounds + 1):
        scores = dict(zip(names, synflow_by_hand(weights), strict=True))
        left = best_of(scores, round(288 * (kept / 288) ** (number / rounds)))
        weights = [w * left[name].numpy() for name, w in zip(names, weights, strict=True)]
    assert sum(int(t.sum()) for t in left.values()) == kept
    assert anymask.prune(model, "synflow", sparsity=1 - kept / 288, example=torch.zeros(2, 6), rounds=rounds) == anymask.Mask(left)


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


@pytest.mark.parametrize("weight", [1e27, 1e30])  # the sum of the outputs only, or activations too
def test_synflow_refuses_a_flow_beyond_float64_rather_than_rank_what_is_left(weight):
    model = net(*[10] * 12)
    for parameter in model.parameters():
        nn.init.constant_(parameter, weight)
    with pytest.raises(MaskError, match=r"the flow of synflow came as inf"):
        anymask.prune(model, "synflow", sparsity=0.5, example=torch.zeros(1, 10))


# -- magnitude and random ----------------------------------------------------------------------------------------------
def test_magnitude_equals_torch_global_unstructured():
    model = net(6, 9, 5)
    mask = anymask.prune(model, "magnitude", sparsity=0.7)
    torch_prune.global_unstructured([(model[0], "weight"), (model[2], "weight")], torch_prune.L1Unstructured, amount=99 - 30)
    assert mask == anymask.Mask({"0.weight": model[0].weight_mask, "2.weight": model[2].weight_mask})


@pytest.mark.parametrize(("scope", "kept"), [("uniform", {"0.weight": 27, "2.weight": 23}), ("erk", {"0.weight": 26, "2.weight": 24})])
def test_scope_sets_the_layer_counts_and_each_layer_keeps_its_own_best(scope, kept):
    model = net(6, 9, 5)  # 54 and 45 weights; ERK: 50 * 15 / 29 = 25.9 and 50 * 14 / 29 = 24.1
    mask = anymask.prune(model, "magnitude", sparsity=49 / 99, scope=scope)
    assert mask == anymask.Mask({name: best_of({name: model.get_parameter(name).detach().abs()}, n)[name] for name, n in kept.items()})


def test_random_is_random_erk_and_keeps_every_weight_equally_often():
    model = nn.Linear(4, 5)
    assert anymask.prune(model, "random", sparsity=0.5, seed=1) == anymask.prune(model, "random-erk", sparsity=0.5, seed=1)
    hits = sum(anymask.prune(model, "random", sparsity=0.7, seed=seed)["weight"].double() for seed in range(400))
    # 400 draws with p = 0.3: standard deviation 9.2; five of them
    assert bool(((hits - 120).abs() < 46).all()), hits


@pytest.mark.parametrize("method", ["random-uniform", "random-er", "random-erk"])
def test_random_masks_have_the_densities_their_names_say(method):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 10), nn.Linear(10, 10))  # 288, 80, 100
    mask = anymask.prune(model, method, sparsity=0.5)
    # uniform: a half each; ER: eps = 234 / 146, kept 173.1, 28.8, 32.05; ERK: eps = 234 / 56, kept 75.2, 75.2, 83.6
    expected = {"random-uniform": [144, 40, 50], "random-er": [173, 29, 32], "random-erk": [75, 75, 84]}[method]
    assert [int(kept.sum()) for kept in mask.values()] == expected
