"""fan_in_init: the formula in loops, in float64, for every kind of layer; and what it leaves alone."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anymask
from anymask import Mask, Recipe
from anymask.errors import MaskError, SettingError, TechniqueError
from anymask.kernels import available
from anymask.techniques import Context, FanInInit, IsometryInit

INITS = [FanInInit(), FanInInit(redraw=True), IsometryInit()]


def attach(technique, model, mask, *, seed=0):
    return technique.attach(Context(model, None, F.cross_entropy, mask=mask, seed=seed))


def random_mask(model, names, *, density=0.4):
    return Mask({name: torch.rand_like(model.get_parameter(name)) < density for name in names})


def place_of(kind, groups, shape, index):
    """The output neuron (group, number) that the weight at `index` belongs to, and how many inputs the neuron has."""
    taps = math.prod(shape[2:])
    if kind == "transposed":  # (in, out / groups, *kernel)
        return (index[0] // (shape[0] // groups), index[1]), shape[0] // groups * taps
    if kind == "inputs first":  # (in, out)
        return (0, index[1]), shape[0]
    return (0, index[0]), shape[1] * taps  # (out, in / groups, *kernel)


def scaled_by_hand(weight, kept, kind, groups):
    count, found = {}, np.zeros_like(weight)
    for index in np.ndindex(weight.shape):
        neuron, _ = place_of(kind, groups, weight.shape, index)
        count[neuron] = count.get(neuron, 0) + bool(kept[index])
    for index in zip(*np.nonzero(kept), strict=True):
        neuron, fan_in = place_of(kind, groups, weight.shape, index)
        found[index] = weight[index] * math.sqrt(fan_in / count[neuron])
    return found


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), "weight", "plain"),
    "conv": (lambda: nn.Conv2d(3, 4, (2, 3)), "weight", "plain"),
    "grouped": (lambda: nn.Conv1d(6, 4, 3, groups=2), "weight", "plain"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 2, groups=2), "weight", "transposed"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", "plain"),
    "recurrent": (lambda: nn.LSTM(4, 3), "weight_hh_l0", "plain"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_neuron_is_scaled_by_the_root_of_dense_over_kept_fan_in(name):
    torch.manual_seed(3)
    make, weight, kind = LAYERS[name]
    layer = make().double()
    mask = random_mask(layer, [weight])
    start = layer.get_parameter(weight).detach().numpy().copy()
    attach(FanInInit(), layer, mask)
    by_hand = scaled_by_hand(start, mask[weight].numpy(), kind, getattr(layer, "groups", 1))
    np.testing.assert_allclose(layer.get_parameter(weight).detach().numpy(), by_hand, rtol=1e-12)


def test_the_layers_of_gpt2_lie_the_other_way_round():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layer = nn.Sequential(conv(5, 7)).double()  # 7 inputs, 5 outputs, weight (7, 5)
    mask = random_mask(layer, ["0.weight"])
    start = layer[0].weight.detach().numpy().copy()
    attach(FanInInit(), layer, mask)
    by_hand = scaled_by_hand(start, mask["0.weight"].numpy(), "inputs first", 1)
    np.testing.assert_allclose(layer[0].weight.detach().numpy(), by_hand, rtol=1e-12)


def test_the_variance_of_each_neuron_fits_what_it_keeps():
    torch.manual_seed(0)
    rows, density = 3, torch.tensor([0.1, 0.5, 1.0])
    for technique in (FanInInit(), FanInInit(redraw=True)):
        layer = nn.Linear(20_000, rows, bias=False)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        mask = Mask({"weight": torch.rand(rows, 20_000) < density[:, None]})
        attach(technique, layer, mask)
        for weight, kept in zip(layer.weight.detach(), mask["weight"], strict=True):
            assert weight[kept].square().mean() * kept.sum() == pytest.approx(2, rel=0.1)
            assert not weight[~kept].any()


def test_redrawn_weights_depend_on_the_seed_alone_and_scale_with_the_gain():
    def drawn(**settings):
        torch.manual_seed(0)
        layer = nn.Linear(9, 9)
        mask = random_mask(layer, ["weight"])
        nn.init.normal_(layer.weight, std=settings.pop("std", 1.0))
        attach(FanInInit(redraw=True, **{k: v for k, v in settings.items() if k == "gain"}), layer, mask, seed=settings.get("seed", 0))
        return layer.weight.detach()

    assert torch.equal(drawn(std=1.0), drawn(std=5.0))
    assert not torch.equal(drawn(), drawn(seed=1))
    torch.testing.assert_close(drawn(gain=3.0), drawn(gain=1.0) * 3)


def test_a_neuron_that_keeps_nothing_is_left_alone():
    layer = nn.Linear(4, 3)
    kept = torch.ones(3, 4, dtype=torch.bool)
    kept[1] = False
    for technique in INITS:
        attach(technique, layer, Mask({"weight": kept}))
        assert not layer.weight[1].any()
        assert layer.weight.isfinite().all()
        assert layer.weight[0].any()


@pytest.mark.parametrize("technique", INITS)
def test_a_layer_that_keeps_nothing_does_not_disturb_the_others(technique):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    attach(technique, model, Mask({"0.weight": torch.zeros(4, 4), "1.weight": torch.ones(4, 4)}))
    assert not model[0].weight.any()
    assert model[1].weight.isfinite().all()


def test_tied_weights_are_scaled_once_by_what_all_their_names_keep():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    nn.init.ones_(model[0].weight)
    first, second = torch.ones(4, 4), torch.ones(4, 4)
    first[0, 0] = second[0, 1:3] = 0
    assert attach(FanInInit(), model, Mask({"0.weight": first, "2.weight": second})).found.startswith("1 layers")
    assert model[2].weight.tolist() == [[0, 0, 0, 2], *[[1] * 4] * 3]


def test_embeddings_and_biases_of_a_mask_stay_as_they_are():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = random_mask(model, before)
    assert attach(FanInInit(), model, mask).found.startswith("1 layers")
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in ("0.weight", "1.bias"))


def test_memory_formats_and_types_stay_what_they_were():
    torch.manual_seed(0)
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    twin = nn.Conv2d(4, 4, 3)
    twin.load_state_dict(model.state_dict())
    mask = random_mask(model, ["weight"])
    for technique in INITS:
        attach(technique, model, mask)
        attach(technique, twin, mask)
        assert torch.equal(model.weight, twin.weight)
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
    half = nn.Linear(8, 8).bfloat16()
    for technique in INITS:
        attach(technique, half, random_mask(half, ["weight"]))
        assert half.weight.dtype is torch.bfloat16


@pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")
@pytest.mark.parametrize("technique", INITS)
def test_sparse_layers_get_the_weights_that_dense_ones_get(technique):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))

    dense, sparse, x = net(), net(), torch.randn(4, 3, 6, 6)
    mask = anymask.prune(dense, "random", sparsity=0.7)
    mask.apply(dense)
    anymask.to_sparse(sparse, mask, x, measure=False)
    for model in (dense, sparse):
        attach(technique, model, mask)
    assert sparse[0].weight.dim() == 1
    assert all(torch.equal(value, sparse.state_dict()[key]) for key, value in dense.state_dict().items())
    torch.testing.assert_close(sparse.eval()(x), dense.eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("technique", INITS)
def test_it_refuses_what_it_cannot_do_and_leaves_the_model_alone(technique):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TechniqueError, match=f"{technique.name} got no mask"):
        attach(technique, model, None)
    with pytest.raises(TechniqueError, match=f"{technique.name} found nothing"):
        attach(technique, model, random_mask(model, ["0.weight"]))
    with pytest.raises(TechniqueError, match=f"{technique.name} found nothing"):
        attach(technique, nn.BatchNorm1d(3), Mask({"weight": torch.ones(3)}))
    with pytest.raises(MaskError, match="does not fit"):
        attach(technique, model, Mask({"2.weight": torch.ones(4, 3)}))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_recipe_brings_it_the_mask_that_is_held():
    model = nn.Linear(16, 4, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anymask.hold(anymask.prune(model, "random-uniform", sparsity=0.75, pattern="fan-in"), model, optimizer)
    running = Recipe((FanInInit(),)).attach(model, optimizer, total_steps=2)
    assert running.found == {"fan_in_init": "1 layers, kept weights times 2 to 2"}
    assert model.weight.sum() == 4 * 4 * 2


@pytest.mark.parametrize("gain", [0.0, -1.0, math.inf, math.nan])
def test_a_gain_out_of_range_is_refused(gain):
    for kind in (FanInInit, IsometryInit):
        with pytest.raises(SettingError, match="gain"):
            kind(gain=gain)
