"""What every row of METHODS promises. A new row is tested here without a line being written."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import anymask
from anymask.errors import MaskError
from anymask.prunables import prunable
from anymask.pruning import METHODS, CollapseWarning, Method

every_method = pytest.mark.parametrize("method", METHODS)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def conv_net():
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Grouped(nn.Module):
    """Depth-wise, grouped and transposed convolutions, and a layer of one weight."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.up, self.scale, self.out = nn.ConvTranspose2d(8, 4, 2, groups=2), nn.Linear(1, 1, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        x = self.up(F.relu(self.grouped(F.relu(self.depthwise(x))))).mean((2, 3))
        return self.out(self.scale(x.unsqueeze(-1)).squeeze(-1))


NETS = {
    "conv": (conv_net, (2, 5, 5), 3),
    "grouped": (Grouped, (4, 5, 5), 3),
    "one layer": (lambda: nn.Linear(12, 5), (12,), 5),
    "tied": (Tied, (6,), 6),
}


def make(net):
    torch.manual_seed(1)
    build, shape, classes = NETS[net]
    model, data = build(), TensorDataset(torch.randn(12, *shape), torch.arange(12) % classes)
    return model, DataLoader(data, batch_size=4, shuffle=True)


def train_on(loader):
    """A training of two steps that holds its mask and draws random numbers."""

    def train(model, mask, first, last):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in [*loader][:2]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if mask is not None:
                mask.apply(model)

    return train


def prune(model, loader, method, **how):
    rewind = {"rewind_step": 1} if "rewind_step" in METHODS[method].needs else {}
    return anymask.prune(model, method, **{"data": loader, "train": train_on(loader), "sparsity": 0.7, **rewind, **how})


def is_kept(mask, method, count):
    """Whether `mask` keeps `count`: exactly, or with a pattern by default less by less than a step for each of its layers."""
    if METHODS[method].pattern == "unstructured":
        return mask.kept == count
    assert METHODS[method].pattern == "fan-in"
    each = [mask[name].flatten(1).sum(1) for name in mask if name != "up.weight"]  # whose outputs are not its rows
    return 0 <= count - mask.kept < max(map(len, each)) and all(len(set(sums.tolist())) == 1 for sums in each)


def test_rows_are_filed_under_their_own_names_and_describe_themselves_in_a_line():
    assert all(isinstance(row, Method) and row.name == name for name, row in METHODS.items())
    assert all(row.about and "\n" not in row.about and len(row.about) <= 80 for row in METHODS.values())
    assert {"random", "magnitude", "snip", "snip-iterative", "force", "grasp", "synflow", "taylor", "wanda", "lottery"} <= set(METHODS)


@every_method
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.999])
@pytest.mark.filterwarnings("ignore::anymask.pruning.CollapseWarning")
def test_the_count_is_exact(method, net, sparsity):
    model, loader = make(net)
    total = sum(p.numel() for p in prunable(model).values())
    mask = prune(model, loader, method, sparsity=sparsity)
    assert mask.total == total
    assert is_kept(mask, method, round((1 - sparsity) * total))
    assert list(mask) == list(prunable(model))
    mask.check(model)


@every_method
@pytest.mark.filterwarnings("ignore::anymask.pruning.CollapseWarning", "ignore::anymask.pruning.TieWarning")
def test_the_count_is_exact_where_all_scores_are_equal(method):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    for weight in model.parameters():
        nn.init.constant_(weight, 0.25)
    loader = [(torch.ones(4, 8), torch.arange(4))]
    for sparsity in (0.3, 0.61, 0.9):
        assert is_kept(prune(model, loader, method, sparsity=sparsity), method, round((1 - sparsity) * 128))


@every_method
@pytest.mark.filterwarnings("ignore::anymask.pruning.CollapseWarning", "ignore::anymask.pruning.TieWarning")
def test_all_zero_weights_work(method):
    model = nn.Linear(10, 10)
    nn.init.zeros_(model.weight)
    assert prune(model, [(torch.ones(4, 10), torch.arange(4))], method, sparsity=0.9).kept == 10


@every_method
@pytest.mark.parametrize("net", NETS)
@pytest.mark.filterwarnings("ignore::anymask.pruning.CollapseWarning")
def test_the_same_seed_gives_the_same_mask_whatever_the_global_random_state(method, net):
    model, loader = make(net)
    first = prune(model, loader, method, seed=3)
    torch.manual_seed(99)
    assert prune(model, loader, method, seed=3) == first


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("random")])
def test_another_seed_gives_another_random_mask(method):
    model, loader = make("conv")
    assert prune(model, loader, method, seed=3) != prune(model, loader, method, seed=4)


@every_method
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, lambda: torch.autocast("cpu")])
def test_model_and_random_state_are_left_as_they_were(method, context):
    model, loader = make("conv")
    model.train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    F.cross_entropy(model(torch.randn(4, 2, 5, 5)), torch.arange(4) % 3).backward()
    before, random_before = picture(model), random_picture()
    with context():
        prune(model, loader, method)
    assert random_picture() == random_before
    assert picture(model) == before


def picture(model):
    """All that may not change, as plain values."""
    tensors = {name: (t.tolist(), t.requires_grad, t._version, id(t)) for name, t in model.state_dict(keep_vars=True).items()}
    grads = {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()}
    return tensors, grads, {name: module.training for name, module in model.named_modules()}


def random_picture():
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]


@every_method
def test_the_result_is_the_same_under_no_grad_and_autocast(method):
    model, loader = make("conv")
    plain = prune(model, loader, method)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        again = prune(model, loader, method)
    assert again == plain or "train" in METHODS[method].needs  # what `train` computes under autocast is the caller's own affair


@every_method
def test_a_collapsed_layer_is_reported_or_refused_or_avoided(method):
    model, loader = make("conv")  # 72 + 144 + 12 weights
    with pytest.warns(CollapseWarning, match=r"0\.weight, 4\.weight, 8\.weight"):
        mask = prune(model, loader, method, sparsity=0.999)
    assert mask.info["collapsed"] == mask.collapsed() == ["0.weight", "4.weight", "8.weight"]
    with pytest.raises(MaskError, match=r"3 of 3 layers keep no weight.*0\.weight"):
        prune(model, loader, method, sparsity=0.999, on_collapse="raise")
    least = 3 if METHODS[method].pattern == "unstructured" else 4 + 4 + 3  # one in each layer, or for each output
    with pytest.raises(MaskError, match=f"a budget of {least - 1} weights came for 3 layers.*{least} or more"):
        prune(model, loader, method, sparsity=1 - (least - 1) / 228, on_collapse="avoid")
    for kept in (least, least + 4):
        mask = prune(model, loader, method, sparsity=1 - kept / 228, on_collapse="avoid")
        assert (mask.kept, mask.collapsed(), mask.info["collapsed"]) == (kept, [], [])


@every_method
def test_info_is_plain_json_and_survives_a_file(method, tmp_path):
    model, loader = make("conv")
    mask = prune(model, loader, method, seed=5, exclude=["8"])
    assert json.loads(json.dumps(mask.info)) == mask.info
    assert (mask.info["method"], mask.info["sparsity"], mask.info["seed"], mask.info["exclude"]) == (method, 0.7, 5, ["8"])
    assert "8.weight" not in mask
    mask.save(tmp_path / "m")
    loaded = anymask.load_mask(tmp_path / "m")
    assert loaded == mask
    assert loaded.info == mask.info


@every_method
def test_what_a_method_needs_and_does_not_get_is_named(method):
    model, _ = make("one layer")
    needs = METHODS[method].needs
    if not needs:
        assert anymask.prune(model, method, sparsity=0.5).kept == 30
        return
    with pytest.raises(anymask.errors.SettingError, match=f"{method} came without .*To do: give "):
        anymask.prune(model, method, sparsity=0.5)
