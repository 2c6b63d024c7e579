"""`anymask.prune`: what it takes, what it refuses, and that pruned stays pruned."""

from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.prune import random_unstructured

import anymask
from anymask.errors import DataError, MaskError, SettingError, TechniqueError, UnknownName
from anymask.pruning import METHODS, Method, prune
from anymask.surgery import fingerprint

NET = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
LOADER = [(torch.randn(4, 8), torch.arange(4))]


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"method": "synflw"}, UnknownName, "unknown mask method 'synflw'.*'synflow'"),
        ({"sparsity": 1.0}, SettingError, r"sparsity came as 1\.0.*\[0, 1\)"),
        ({"sparsity": -0.1}, SettingError, "sparsity came as -0.1"),
        ({"sparsity": float("nan")}, SettingError, "sparsity came as nan"),
        ({"sparsity": "0.9"}, SettingError, "sparsity came as '0.9'"),
        ({"scope": "erkk"}, UnknownName, "unknown scope 'erkk'.*'erk'"),
        ({"on_collapse": "rise"}, UnknownName, "unknown on_collapse 'rise'.*'raise'"),
        ({"rounds": 0}, SettingError, "rounds came as 0.*>= 1"),
        ({"method": "lottery", "rounds": 0, "train": print}, SettingError, "rounds came as 0.*>= 1"),
        ({"batches": 1.5}, SettingError, "batches came as 1.5"),
        ({"data": None}, SettingError, r"snip came without data.*give data=loader"),
        ({"data": []}, DataError, "data holds no batch"),
        ({"data": [torch.zeros(4, 8)]}, DataError, r"a batch came as Tensor.*pairs \(x, y\)"),
        ({"data": [(torch.zeros(4, 8),)]}, DataError, "a batch came as tuple of Tensor"),
        ({"data": [({"pixels": "none"}, torch.zeros(4))]}, DataError, "a batch came as tuple of dict, Tensor"),
        ({"method": "synflow", "data": []}, DataError, "data holds no batch"),
        ({"method": "synflow", "data": ["text"]}, DataError, "the input came as str.*give example="),
        ({"method": "synflow", "data": None}, SettingError, r"synflow came without the shape of an input.*example=x\[:1\]"),
        ({"method": "lottery"}, SettingError, "lottery came without train"),
        ({"method": "lottery-rewind", "train": print}, SettingError, "lottery-rewind came without rewind_step"),
        ({"method": "snip+erkk"}, UnknownName, "unknown pattern 'erkk'"),
        ({"method": "snip+erk+er"}, SettingError, r"snip\+erk\+er.*at most one scope"),
        ({"method": "snp+erk"}, UnknownName, "unknown mask method 'snp'.*'snip'"),
        ({"pattern": "2:5:3"}, UnknownName, "unknown pattern '2:5:3'"),
        ({"pattern": "5:4"}, SettingError, "pattern came as 5:4.*1 <= N <= M"),
        ({"pattern": "0x4"}, SettingError, "pattern came as 0x4"),
        ({"pattern": "2:4", "sparsity": 0.9}, SettingError, r"sparsity came as 0\.9 with pattern 2:4.*0\.5"),
        ({"pattern": "2:4"}, MaskError, r"pattern 2:4 does not fit 2\.weight \(6 inputs\).*exclude=\['2\.weight'\]"),
        ({"sparsity": None}, SettingError, "sparsity came as None"),
        ({"seed": 1.5}, SettingError, r"seed came as 1\.5.*a whole number"),
        ({"seed": 2**64, "method": "random"}, SettingError, "seed came as 18446744073709551616"),
        ({"seed": None, "method": "lottery", "train": print}, SettingError, "seed came as None"),
        ({"exclude": "02"}, SettingError, r"exclude came as '02', a text.*write exclude=\['02'\]"),
        ({"kinds": "linear"}, SettingError, "kinds came as 'linear', a text"),
        ({"floor": -1}, SettingError, "floor came as -1"),
        ({"floor": 25}, MaskError, "a budget of 36 weights came for 2 layers.*49 or more"),
    ],
)
def test_what_cannot_be_is_refused_in_three_parts(how, error, says):
    how = {"method": "snip", "sparsity": 0.5, "data": LOADER, **how}
    with pytest.raises(error, match=says) as caught:
        prune(NET, how.pop("method"), **how)
    assert caught.value.came
    assert caught.value.allowed
    assert caught.value.fix


def test_a_seed_of_numpy_is_the_seed_of_that_number_and_can_be_saved(tmp_path):
    mask = prune(NET, "random", sparsity=0.5, seed=np.int64(3))
    assert mask == prune(NET, "random", sparsity=0.5, seed=3)
    mask.save(tmp_path / "my.mask")
    assert anymask.load_mask(tmp_path / "my.mask").info["seed"] == 3


def test_nan_in_a_weight_is_refused_with_the_layer_named():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight.data[0, 0] = torch.nan
    with pytest.raises(MaskError, match=r"magnitude gave NaN or infinite scores for 1\.weight\."):
        prune(net, "magnitude", sparsity=0.5)


def test_no_more_batches_are_read_than_asked_for():
    read = []

    def endless():
        while True:
            read.append(1)
            yield LOADER[0]

    prune(NET, "snip", sparsity=0.5, data=endless())
    assert len(read) == 1
    prune(NET, "grasp", sparsity=0.5, data=endless(), batches=3)
    assert len(read) == 4
    prune(NET, "synflow", sparsity=0.5, data=endless())
    assert len(read) == 5


def test_synflow_needs_a_shape_only_from_an_example_or_the_first_batch_labelled_or_not():
    of_example = prune(NET, "synflow", sparsity=0.5, example=torch.randn(7, 8))
    assert prune(NET, "synflow", sparsity=0.5, data=LOADER) == of_example
    assert prune(NET, "synflow", sparsity=0.5, data=[torch.full((2, 8), torch.nan)]) == of_example


def test_the_loss_is_the_callers_own():
    def last_output(out, y):
        return out[:, 3].square().mean()

    mask = prune(nn.Linear(8, 4), "snip", sparsity=0.75, data=LOADER, loss=last_output)
    assert mask["weight"].tolist() == [[False] * 8] * 3 + [[True] * 8]


class Within(nn.Module):
    """A model whose output is not the bare tensor of logits."""

    def __init__(self, net, wrap):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, x):
        return self.wrap(self.net(x))


@pytest.mark.parametrize("method", ["snip", "force", "taylor", "grasp", "synflow"])
def test_the_logits_are_found_in_mappings_and_tuples(method):
    bare = prune(NET, method, sparsity=0.5, data=LOADER)
    for wrap in (lambda logits: {"loss": None, "logits": logits}, lambda logits: (logits, "hidden")):
        got = prune(Within(NET, wrap), method, sparsity=0.5, data=LOADER)
        assert {name.removeprefix("net."): kept.tolist() for name, kept in got.items()} == {n: k.tolist() for n, k in bare.items()}
    with pytest.raises(TechniqueError, match=r"output is a dict.*wrap the model"):
        prune(Within(NET, lambda logits: {"out": logits}), method, sparsity=0.5, data=LOADER)


@pytest.mark.parametrize("method", ["snip", "grasp", "taylor", "wanda", "snip-iterative", "force"])
def test_inputs_may_have_names_or_be_several(method):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, first, second):
            return self.out(torch.tanh(self.a(first) + self.b(second)))

    draws = torch.Generator().manual_seed(3)
    model, x, z = Two(), torch.randn(16, 8, generator=draws), torch.randn(16, 8, generator=draws)
    found = [
        prune(model, method, sparsity=0.6, data=[(inputs, torch.arange(16) % 3)])
        for inputs in ((x, z), [x, z], {"second": z, "first": x}, UserDict({"first": x, "second": z}))
    ]
    assert all(mask == found[0] for mask in found)
    assert 0 < int(found[0]["b.weight"].sum()) < 48


@pytest.mark.filterwarnings("ignore:.*weight_norm")  # torch advises the newer one
@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp", "synflow"])
def test_weights_that_hooks_compute_are_pruned_in_the_tensors_that_they_come_from(method):
    for wrap, name in ((lambda layer: random_unstructured(layer, "weight", 0.25), "weight_orig"), (nn.utils.weight_norm, "weight_v")):
        net = nn.Sequential(wrap(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 4))
        before, made = net(LOADER[0][0]), fingerprint(net)
        mask = prune(net, method, sparsity=0.5, data=LOADER)
        assert list(mask) == [f"0.{name}", "2.weight"]
        assert torch.equal(net(LOADER[0][0]), before)
        assert fingerprint(net) == made
        if name == "weight_orig" and method == "synflow":  # nothing flows through what is pruned already
            assert not bool((mask[f"0.{name}"] & (net[0].weight_mask == 0)).any())


def test_more_rounds_never_bring_a_weight_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for method in ("snip", "synflow"):
        few = prune(net, method, sparsity=1 - 96 / 192, data=LOADER, rounds=1)
        more = prune(net, method, sparsity=1 - 48 / 192, data=LOADER, rounds=2)  # its first round keeps the same 96
        assert all(bool((few[name] | ~more[name]).all()) for name in more)
        assert more != prune(net, method, sparsity=1 - 48 / 192, data=LOADER, rounds=1)  # scored anew in between


def test_avoid_gives_a_tiny_layer_its_best_weight_and_takes_it_from_the_others():
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    net[1].weight.data.mul_(1e-6)
    mask = prune(net, "magnitude", sparsity=0.5, on_collapse="avoid")
    assert mask["1.weight"].sum() == 1
    assert int(mask["1.weight"].reshape(-1).nonzero()) == int(net[1].weight.abs().argmax())
    assert mask.kept == 36


def test_a_half_precision_model_is_ranked_without_underflow():
    net = nn.Linear(4, 4, bias=False).half()
    net.weight.data.copy_(torch.arange(1, 17).reshape(4, 4) * 1e-4)
    wanted = prune(net, "magnitude", sparsity=0.5)
    got = prune(net, "snip", sparsity=0.5, data=[(torch.full((2, 4), 1e-4).half(), None)], loss=lambda out, y: out.sum())
    assert got == wanted  # equal gradients of 2e-4: in float16 the products, from 2e-8 up, would run together


def test_the_example_of_the_design_runs_as_written():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    loader = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    mask = anymask.prune(model, "synflow", sparsity=0.98, data=loader)
    assert (mask.kept, mask.info["method"]) == (round(0.02 * mask.total), "synflow")


def test_a_method_of_ones_own_needs_no_row():
    def first_column(model, weights, batches):
        return {name: torch.arange(w.numel(), 0, -1).reshape(w.shape) % w.shape[1] == 0 for name, w in weights.items()}

    row = Method("mine", "the first input of each output", first_column, "0000.00000", scope="uniform")
    mask = prune(NET, row, sparsity=0.875, exclude=["2"])
    assert mask["0.weight"].nonzero()[:, 1].tolist() == [0] * 6
    assert mask.info["method"] == "mine"


def test_a_floor_of_several_weights_is_kept_in_every_layer_within_the_count():
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    net[1].weight.data.mul_(1e-6)
    for scope in ("global", "erk"):
        mask = prune(net, "magnitude", sparsity=0.5, floor=15, scope=scope)
        assert (mask.kept, mask.info["floor"]) == (36, 15)
        assert mask["1.weight"].sum() >= 15


def test_a_mask_remembers_its_model_and_versions():
    info = prune(NET, "magnitude", sparsity=0.5).info
    assert info["model"]["class"] == "Sequential"
    assert info["model"]["parameters"] == sum(p.numel() for p in NET.parameters())
    assert set(info["versions"]) == {"anymask", "torch"}
    other = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    there = prune(other, "magnitude", sparsity=0.5).info["model"]
    assert there["structure"] == info["model"]["structure"]
    assert there["weights"] != info["model"]["weights"]


def test_a_method_that_trains_and_has_another_criterion_is_refused_and_not_pruned_by_magnitude():
    row = Method("mine", "snip after training", METHODS["snip"].criterion, "0000.00000", needs=frozenset({"train"}))
    with pytest.raises(SettingError, match="mine needs train and has a criterion of its own"):
        prune(NET, row, sparsity=0.5, train=print)


def test_wanda_sees_inputs_that_are_given_by_keyword():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = NET[0], NET[2]

        def forward(self, x):
            return self.second(input=self.first(input=x).relu())

    plain, named = (prune(net, "wanda", sparsity=0.5, data=LOADER) for net in (NET, ByName()))
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), named.values(), strict=True))
