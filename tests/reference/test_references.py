"""Every row of METHODS against its formula written out a second time; tiny networks by hand; torch's own pruning."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import anymask
from anymask.pruning import METHODS
from anymask.pruning.distribution import DISTRIBUTIONS
from tests.reference import formulas, masks
from tests.reference.cases import (
    LOTTERIES,
    NETS,
    RANDOM,
    SCORED,
    arrays,
    compare,
    compare_lottery,
    compare_random,
    data_of,
    layers_of,
    model_of,
    reference_score,
    scores_of,
    size_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::anymask.pruning.CollapseWarning")
SPARSITIES = (0.5, 0.9, 0.98)
SEED = 4  # with which no unit is dead in any network: no ties among zeros
MODELS = ("chain", "conv", "norm")


def equal(mask, wanted):
    return mask == anymask.Mask({name: torch.from_numpy(kept) for name, kept in wanted.items()})


def test_every_method_has_a_reference():
    assert set(METHODS) == {*SCORED, *LOTTERIES, *RANDOM}


# -- the references themselves -------------------------------------------------------------------------------------------
def loss(net, x, y):
    logits = formulas.forward(net, x)[-1]
    return sum(np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, y, strict=True)) / len(y)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_the_slopes_of_the_loss(name):
    net, (x, y) = layers_of(model_of(name, 0)), arrays(data_of(name, 0))[0]
    slopes, weights = formulas.gradients(net, x, y), formulas.weights_of(net)
    for key, weight in weights.items():
        for at in np.random.default_rng(0).integers(weight.size, size=8):
            moved = weight.astype(complex)
            moved.reshape(-1)[at] += 1e-30j
            step = loss(formulas.with_weights(net, {**weights, key: moved}), x, y).imag / 1e-30
            assert slopes[key].reshape(-1)[at] == pytest.approx(step, rel=1e-9, abs=1e-16)


def test_the_products_with_the_hessian_are_those_of_the_whole_matrix_from_differences_of_the_loss():
    torch.manual_seed(0)
    net = layers_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double())
    x, y = np.random.default_rng(1).normal(size=(6, 3)), [0, 1, 1, 0, 1, 0]
    weights = formulas.weights_of(net)
    cuts, flat = np.cumsum([w.size for w in weights.values()])[:-1], np.concatenate([w.reshape(-1) for w in weights.values()])

    def as_dict(vector):
        return {name: part.reshape(weights[name].shape) for name, part in zip(weights, np.split(vector, cuts), strict=True)}

    def at(i, j, a, b):
        moved = flat.copy()
        moved[i] += a
        moved[j] += b
        return loss(formulas.with_weights(net, as_dict(moved)), x, y)

    h, units = 1e-4, range(len(flat))
    hessian = [[(at(i, j, h, h) - at(i, j, h, -h) - at(i, j, -h, h) + at(i, j, -h, -h)) / (4 * h * h) for j in units] for i in units]
    direction = np.random.default_rng(2).normal(size=len(flat))
    product = formulas.hessian_times(net, as_dict(direction), x, y)
    got = np.concatenate([part.reshape(-1) for part in [product[name] for name in weights]])
    np.testing.assert_allclose(got, np.array(hessian) @ direction, atol=1e-6)


def test_a_tie_is_not_decided_by_the_references():
    with pytest.raises(masks.Tie):
        masks.best({"a": np.array([1.0, 2.0, 2.0])}, 1)


# -- every method ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("net", MODELS)
@pytest.mark.parametrize("method", SCORED)
def test_scores_and_masks_equal_the_formula_written_out_a_second_time(method, net, sparsity):
    found = compare(method, net, SEED, sparsity)
    assert found.difference <= 1e-9
    assert found.agree == found.entries
    assert found.rounds >= min(found.asked, 14)  # with few weights left there are ties at last, which are decided by lot


@pytest.mark.parametrize("method", SCORED)
def test_a_model_in_float64_which_needs_no_conversion_is_only_read(method):
    model, data = model_of("norm", SEED), data_of("norm", SEED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    anymask.prune(model, method, sparsity=0.5, data=data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("method", LOTTERIES)
def test_lottery_tickets_equal_those_of_a_training_written_out_in_numpy(method, sparsity):
    found = compare_lottery(method, SEED, sparsity)
    assert found.difference <= 1e-9
    assert found.agree == found.entries


def test_the_four_lotteries_differ():
    found = {method: compare_lottery(method, SEED, 0.9).mask for method in LOTTERIES}
    assert len(found) == len({tuple(np.concatenate([k.reshape(-1) for k in mask.values()])) for mask in found.values()})


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("net", MODELS)
@pytest.mark.parametrize("method", RANDOM)
def test_layers_of_a_random_mask_keep_what_bisection_finds(method, net, sparsity):
    found = compare_random(method, net, SEED, sparsity)
    assert found.agree == found.entries


@pytest.mark.parametrize("batches", [None, 1, 2, 3])
def test_just_the_batches_asked_for_are_looked_at_and_one_unless_told_otherwise(batches):
    model, data = model_of("chain", SEED), data_of("chain", SEED)
    wanted = masks.best(formulas.snip(layers_of(model), arrays(data)[: batches or 1]), 448)
    assert equal(anymask.prune(model, "snip", sparsity=0.5, data=data, batches=batches), wanted)


@pytest.mark.parametrize("rounds", [1, 3])
def test_synflow_prunes_in_as_many_rounds_as_asked_for(rounds):
    model = model_of("conv", SEED)
    net = layers_of(model)
    wanted = masks.in_rounds(net, 174, rounds, reference_score("synflow", net, (), (4, 6, 6)))
    assert equal(anymask.prune(model, "synflow", sparsity=0.75, example=torch.zeros(1, 4, 6, 6), rounds=rounds), wanted)


@pytest.mark.parametrize("method", ["random-uniform", "snip", "synflow"])
@pytest.mark.parametrize("scope", DISTRIBUTIONS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_layers_keep_what_bisection_finds_and_each_its_own_best(method, scope, sparsity):
    model, data, shape = model_of("conv", SEED), data_of("conv", SEED), NETS["conv"][1]
    net = layers_of(model)
    shapes = {name: weight.shape for name, weight in formulas.weights_of(net).items()}
    counts = masks.layer_counts(shapes, round((1 - sparsity) * size_of(net)), scope)
    mask = anymask.prune(model, method, sparsity=sparsity, scope=scope, data=data, rounds=1)
    assert {name: int(kept.sum()) for name, kept in mask.items()} == counts
    if method in SCORED:  # else which weights is a matter of lots
        scores = reference_score(method, net, arrays(data)[:1], shape)(net)
        assert equal(mask, masks.best_by_layer(scores, counts))


# -- patterns ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("net", ["chain", "conv"])
@pytest.mark.parametrize("method", ["magnitude", "taylor"])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4", "1:2"])
def test_n_of_every_m_inputs_are_the_best_of_them(net, method, pattern):
    model, data = model_of(net, SEED), data_of(net, SEED)
    n, m = map(int, pattern.split(":"))
    scores = reference_score(method, layers_of(model), arrays(data)[:1], None)(layers_of(model))
    assert equal(anymask.prune(model, f"{method}+{pattern}", data=data, batches=1), masks.n_of_m(scores, n, m))


@pytest.mark.parametrize("net", MODELS)
@pytest.mark.parametrize(("pattern", "rows", "columns"), [("channel", 1, None), ("4x1", 4, 1), ("1x2", 1, 2), ("3x5", 3, 5)])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.filterwarnings("ignore::anymask.pruning.OutputWarning")
def test_units_are_kept_whole_by_their_mean_score(net, pattern, rows, columns, sparsity):
    model = model_of(net, 3)
    scores = formulas.magnitude(layers_of(model), ())
    count = round((1 - sparsity) * size_of(layers_of(model)))
    mask = anymask.prune(model, "magnitude", sparsity=sparsity, pattern=pattern)
    assert equal(mask, masks.whole_units(scores, count, rows, columns))


# -- torch's own pruning ------------------------------------------------------------------------------------------------------
def named(model):
    return {f"{i}.weight": module for i, module in enumerate(model) if hasattr(module, "weight") and module.weight.ndim > 1}


def torch_masks(model):
    return anymask.Mask({name: module.weight_mask for name, module in named(model).items()})


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_magnitude_equals_torch_global_unstructured(sparsity):
    model = model_of("conv", 0)
    mask = anymask.prune(model, "magnitude", sparsity=sparsity)
    pairs = [(module, "weight") for module in named(model).values()]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=mask.total - mask.kept)
    assert mask == torch_masks(model)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_magnitude_by_layer_equals_torch_l1_unstructured(sparsity):
    model = model_of("norm", 0)
    mask = anymask.prune(model, "magnitude+uniform", sparsity=sparsity)
    for name, module in named(model).items():
        torch_prune.l1_unstructured(module, "weight", amount=int((~mask[name]).sum()))
        assert abs(int(mask[name].sum()) - (1 - sparsity) * mask[name].numel()) < 1
    assert mask == torch_masks(model)


@pytest.mark.parametrize("kept", [1, 5, 11])
def test_channels_by_magnitude_equal_torch_ln_structured(kept):
    torch.manual_seed(kept)
    model = nn.Sequential(nn.Conv2d(3, 12, 3))
    mask = anymask.prune(model, "magnitude+channel", sparsity=1 - kept / 12)
    torch_prune.ln_structured(model[0], "weight", amount=12 - kept, n=1, dim=0)
    assert mask == torch_masks(model)


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("sparsity", [0.3, 0.52, 0.77])
def test_random_masks_of_one_layer_keep_as_many_as_torch_random_unstructured(method, sparsity):
    model = nn.Sequential(nn.Linear(7, 9))
    mask = anymask.prune(model, method, sparsity=sparsity)
    torch_prune.random_unstructured(model[0], "weight", amount=sparsity)
    assert mask.kept == torch_masks(model).kept == round((1 - sparsity) * 63)


# -- tiny networks, with pencil and paper ---------------------------------------------------------------------------------------
# One layer without bias, x = (1, 2, 3), W = ((1, 1, -1), (4, -2, 0)): both logits are 0, both probabilities 1/2. For label 0 the
# gradient is (-1/2, 1/2) times x; the Hessian ((1/4, -1/4), (-1/4, 1/4)) times x x', so H g = (-1/4, 1/4) times 14 x, over 200^3.
X = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
W = [[1.0, 1.0, -1.0], [4.0, -2.0, 0.0]]
ONCE, BOTH = [(X, torch.tensor([0]))], [(X, torch.tensor([0])), (X, torch.tensor([1]))]
INPUTS = [(torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64), None), (torch.tensor([[4.0, 2.0, 0.0]], dtype=torch.float64), None)]


def linear(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False).double()
    layer.weight.data.copy_(torch.tensor(rows))
    return layer


@pytest.mark.parametrize(
    ("method", "pairs", "by_hand"),
    [
        ("magnitude", (), [[1, 1, 1], [4, 2, 0]]),
        ("snip", ONCE, [[0.5, 1, 1.5], [2, 2, 0]]),
        ("snip", BOTH, [[0, 0, 0], [0, 0, 0]]),  # the two labels pull in opposite directions, equally
        ("taylor", ONCE, [[0.25, 1, 2.25], [4, 4, 0]]),
        ("taylor", BOTH, [[0.25, 1, 2.25], [4, 4, 0]]),  # and here either counts
        ("grasp", ONCE, [[-1, -2, 3], [4, -4, 0]]),
        ("wanda", INPUTS, [[5, 2, 1], [20, 4, 0]]),  # norms 5, 2 and 1 of the inputs (3, 4), (0, 2) and (1, 0)
    ],
)
def test_scores_of_one_layer_with_pencil_and_paper(method, pairs, by_hand):
    got = scores_of(method, nn.Sequential(linear(W)), pairs, None)["0.weight"]
    unit = np.abs(got).sum() / max(np.abs(by_hand).sum(), 1)  # factors that all scores share are left out
    np.testing.assert_allclose(got, np.array(by_hand) * unit, atol=1e-14 * unit)


def test_synflow_of_two_layers_with_pencil_and_paper():
    model = nn.Sequential(linear([[1.0], [-2.0]]), nn.ReLU(), linear([[3.0, -4.0]]))
    got = scores_of("synflow", model, (), (1,))  # two paths, of 1 * 3 and 2 * 4: all flow is 11
    np.testing.assert_allclose(got["0.weight"], [[3 / 11], [8 / 11]])
    np.testing.assert_allclose(got["2.weight"], [[3 / 11, 8 / 11]])


def test_wanda_keeps_the_best_of_each_output():
    mask = anymask.prune(nn.Sequential(linear(W)), "wanda", sparsity=2 / 3, data=INPUTS, batches=2)
    assert mask["0.weight"].tolist() == [[True, False, False], [True, False, False]]


# -- published values -----------------------------------------------------------------------------------------------------------
def resnet50():
    """Of every convolution and the classifier of ResNet-50: the shape of the weight and the width of the image it gives."""
    layers, width, size = {"conv1": ((64, 3, 7, 7), 112)}, 64, 56
    for stage, (narrow, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), 1):
        for block in range(blocks):
            out = size // 2 if stage > 1 and block == 0 else size
            name = f"layer{stage}.{block}"
            layers[f"{name}.conv1"] = (narrow, width, 1, 1), size
            layers[f"{name}.conv2"] = (narrow, narrow, 3, 3), out
            layers[f"{name}.conv3"] = (4 * narrow, narrow, 1, 1), out
            if block == 0:
                layers[f"{name}.downsample"] = (4 * narrow, width, 1, 1), out
            width, size = 4 * narrow, out
    return layers | {"fc": ((1000, 2048), 1)}


def megabytes_and_operations(densities):
    """As google-research/google-research counts them (micronet_challenge/counting.py): kept weights and biases in 32 bits, and one
    bit for each weight of a layer that is not dense; for each output a multiplication and an addition per kept weight, and a ReLU."""
    bits = operations = 0.0
    for name, (shape, width) in resnet50().items():
        density = densities.get(name, 1.0)
        bits += 32 * (density * math.prod(shape) + shape[0]) + (math.prod(shape) if density < 1 else 0)
        operations += shape[0] * width**2 * (2 * density * math.prod(shape[1:]) + 1)
    return bits / 8e6, operations


def of_resnet50(sparsity, scope, dense):
    shapes = {name: shape for name, (shape, _) in resnet50().items() if name not in dense}
    wanted = anymask.pruning.distribution.densities(
        shapes, round((1 - sparsity) * sum(map(math.prod, shapes.values()))), distribution=scope
    )
    return megabytes_and_operations(wanted)


def test_the_dense_resnet50_is_the_published_one():
    megabytes, operations = megabytes_and_operations({})
    assert megabytes == pytest.approx(102.122, abs=1e-3)
    assert operations == pytest.approx(8.2e9, abs=5e7)


@pytest.mark.parametrize(
    ("sparsity", "scope", "dense", "megabytes", "ratio"),
    [
        ("0.8", "erk", (), 23.683, None),
        ("0.9", "erk", (), 13.499, 0.24),
        ("0.95", "erk", (), 8.399, 0.12),
        ("0.99", "erk", ("conv1",), 4.354, 0.05),
        ("0.9", "uniform", ("conv1",), 13.532, 0.13),
        ("0.95", "uniform", ("conv1",), 8.433, 0.08),
        ("0.965", "uniform", ("conv1",), 6.904, None),
    ],
)
def test_sizes_and_operations_of_resnet50_are_those_that_rigl_publishes(sparsity, scope, dense, megabytes, ratio):
    """The table of google-research/rigl, README.md. docs/masks.md names the entries of it that are not met."""
    found, operations = of_resnet50(float(sparsity), scope, dense)
    assert found == pytest.approx(megabytes, abs=1e-3)
    if ratio is not None:
        assert operations / megabytes_and_operations({})[1] == pytest.approx(ratio, abs=5e-3)


@pytest.mark.parametrize(
    ("scope", "sparsity", "published"),
    [
        ("erk", 0.5, {"a": 0.0, "b": 0.31, "c": 0.655}),
        ("erk", 0.8, {"a": 0.556, "b": 0.70, "c": 0.85}),
        ("er", 0.5, {"a": 0.21, "b": 0.47, "c": 0.56}),
    ],
)
def test_layer_sparsities_are_those_of_jaxpruners_own_tests(scope, sparsity, published):
    """google-research/jaxpruner, jaxpruner/sparsity_distributions_test.py, to its two decimals; its layout has channels last."""
    shapes = {"a": (4, 2), "b": (6, 3), "c": (6, 4, 2)}
    kept = sum(size - math.floor(sparsity * size) for size in map(math.prod, shapes.values()))  # it rounds the zeros of each layer down
    found = anymask.pruning.distribution.densities(shapes, kept, distribution=scope)
    assert {name: 1 - density for name, density in found.items()} == pytest.approx(published, abs=0.01)
