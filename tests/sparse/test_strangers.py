"""Sparse layers in networks and uses that nobody here thought of: wrong shapes and types, hooks, names that happen to be ours."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import anymask
from anymask import prune
from anymask.errors import SettingError
from anymask.kernels import available
from anymask.prunables import compact
from anymask.sparse import calls, layers, layout, ops
from anymask.techniques import Context, GhostActivation
from tests.sparse.test_converting import made, sgd, steps

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")


class Stranger(nn.Module):
    """A network with names of its own that happen to mean something here."""

    is_sum, dense_shape, relu, norm = True, (1,), (), ()

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None)
        self.free = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x):
        return self.free(self.bn(self.conv(x))).mean((2, 3))


def test_a_network_of_a_stranger():
    _, _, x, y = made("plain")
    model = Stranger()
    mask = prune(model, "random-uniform", sparsity=0.5, seed=0)
    mask.apply(model)
    dense = copy.deepcopy(model)
    anymask.to_sparse(model, mask, x, measure=False)
    assert list(compact(model)) == ["conv.weight"]
    ours, theirs = sgd(model), sgd(dense)
    anymask.hold(mask, dense, theirs)
    assert steps(model, ours, x, y) == pytest.approx(steps(dense, theirs, x, y), abs=1e-4)
    for name, buffer in dense.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.eval()(x), dense.eval()(x), atol=1e-4, rtol=1e-4)


def test_what_would_be_read_wrongly_is_refused():
    model, mask, x, _ = made("resnet20")
    anymask.to_sparse(model, mask, x, measure=False)
    with pytest.raises(SettingError, match="the input of a sparse operator"):
        model(x[:, :2])
    conv = nn.Conv2d(3, 4, 3)
    anymask.to_sparse(conv, anymask.Mask({"weight": torch.ones(4, 3, 3, 3)}), x, measure=False)
    with pytest.raises(SettingError, match="larger images"):
        conv(x[:, :, :2, :2])
    with pytest.raises(SettingError, match=r"float64.*model\.float"):
        model.double()(x.double())
    with pytest.raises(SettingError, match="float16"):
        model.half()(x.half())


def test_a_residual_sum_is_one_operator_unless_somebody_looks():
    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names = [*getattr(self, "names", []), str(func)]
            return func(*args, **(kwargs or {}))

    model, mask, x, _ = made("resnet20")
    anymask.to_sparse(model, mask, x, measure=False)
    model.eval()

    def sums_and_relus():
        with torch.no_grad(), Counted() as seen:
            out = model(x)
        return out, sum(name.startswith(("aten.add.", "aten.relu", "aten.clamp_min")) for name in seen.names)

    plain, none = sums_and_relus()
    assert none == 0
    block = model.layer2[1]
    for module in (block.body, block.body.bn2, block.act):
        for register in (module.register_forward_hook, module.register_full_backward_hook):
            handle = register(lambda *_: None)
            out, some = sums_and_relus()
            assert some == 2
            torch.testing.assert_close(out, plain)
            handle.remove()
    assert sums_and_relus()[1] == 0


def test_a_backward_hook_on_a_relu_sees_what_the_dense_one_shows():
    model, mask, x, y = made("resnet20")
    dense = copy.deepcopy(model)
    anymask.to_sparse(model, mask, x, measure=False)
    seen = []
    for net in (model, dense):
        net.stem.relu1.register_full_backward_hook(lambda m, given, out: seen.append(given[0].clone()))
        F.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(*seen, atol=1e-6, rtol=1e-3)


def test_memory_is_kept_in_huge_pages_only_where_it_is_asked_for():
    code = "import torch; from anymask.sparse import memory; memory.prepare(); memory.prepare(); memory.follow(); print(memory._top > 0)"
    for setting, expected in (("1", sys.platform.startswith("linux")), ("0", False)):
        env = {**os.environ, "ANYMASK_MALLOC": setting}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(expected)


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
def test_a_norm_takes_a_ghost_activation_along_while_nobody_else_looks(strength):
    model, mask, x, y = made("resnet20")
    dense = copy.deepcopy(model)
    anymask.to_sparse(model, mask, x, measure=False)
    ghosts = [GhostActivation().attach(Context(net, None, F.cross_entropy, example=x)) for net in (model, dense)]
    for ghost in ghosts:
        ghost.set_strength(strength)
    called = []

    def trained(net):
        with pytest.MonkeyPatch.context() as patch:
            for where, name in ((calls, "norm"), (ops, "soft_relu")):
                real = getattr(where, name)
                patch.setattr(where, name, lambda *args, name=name, real=real, **kwargs: (called.append(name), real(*args, **kwargs))[1])
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
        return [compact(net)[n].scatter(p.grad) if n in compact(net) else p.grad for n, p in net.named_parameters()]

    right = [g * mask[n] if n in mask else g for (n, _), g in zip(dense.named_parameters(), trained(dense), strict=True)]
    assert called.count("soft_relu") == (19 if strength else 0)  # one by one in a dense network
    called.clear()
    fused = trained(model)
    assert called.count("norm") >= 19
    assert "soft_relu" not in called
    handles = [m.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, nn.ReLU)]
    seen = trained(model)
    assert ("soft_relu" in called) == (strength > 0)
    for handle in handles:
        handle.remove()
    for ours, hooked, theirs in zip(fused, seen, right, strict=True):
        torch.testing.assert_close(ours, hooked, atol=1e-5, rtol=1e-3)
        assert (ours - theirs).abs().max() <= 1e-3 * max(1e-2, theirs.abs().max())


class Between(nn.Module):
    """What training alone puts between a ReLU and a pool."""

    def forward(self, x):
        return x * 0.5 + 1 if self.training else x


def pooling(*between, pool=None, inplace=False):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace), *between]
    return nn.Sequential(*first, pool or nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Blocks(nn.Module):
    """Two parts, and what is done with what lies between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.rest, self.between = pooling()[:3], pooling()[3:], between

    def forward(self, x):
        return self.between(self, self.first(x))


def in_pieces():
    class Pieces(nn.Sequential):
        def forward(self, x):
            for layer in self[0]:
                x = layer(x)
            return x

    return Pieces(pooling())


def again():
    drop = nn.Dropout(1e-9)
    return nn.Sequential(drop, *pooling(drop))


@pytest.mark.parametrize(
    ("net", "fuses"),
    [
        (pooling, True),
        (lambda: pooling(inplace=True), True),
        (lambda: pooling(pool=nn.MaxPool2d((3, 2))), True),
        (lambda: pooling(pool=nn.MaxPool2d(2, ceil_mode=True)), True),
        (lambda: nn.Sequential(pooling()[:3], pooling()[3:]), True),
        (lambda: nn.Sequential(nn.Sequential(pooling()[:2], nn.ReLU()), *pooling()[3:]), True),
        (lambda: pooling(pool=nn.MaxPool2d(2, 1)), False),
        (lambda: pooling(nn.Dropout(1e-9)), False),
        (lambda: pooling(Between()), False),
        (again, False),
        (in_pieces, False),
        (lambda: Blocks(lambda net, y: net.rest(y)), False),
        (lambda: Blocks(lambda net, y: (net.rest(y), y.mean())[0] + y.amax((2, 3))[:, :4]), False),
        (lambda: Blocks(lambda net, y: net.rest(y * 0.5 if net.training else y)), False),
        (lambda: Blocks(lambda net, y: torch.cat([net.rest(y), y.mean((2, 3))], 1)), False),
    ],
)
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_a_norm_takes_the_max_pool_after_its_relu_along(net, fuses, strength):
    torch.manual_seed(1)
    model, x = net(), torch.randn(5, 3, 11, 9)
    dense = copy.deepcopy(model)
    mask = anymask.prune(model, "random-uniform", sparsity=0.3, seed=0)
    mask.apply(dense)
    anymask.to_sparse(model, mask, x, measure=False)
    if net is pooling:
        model = pickle.loads(pickle.dumps(model))
    if strength:
        for one in (model, dense):
            GhostActivation().attach(Context(one, None, F.cross_entropy, example=x)).set_strength(strength)
    norm, pool = (next(m for m in model.modules() if isinstance(m, kind)) for kind in (layers.BatchLastNorm2d, nn.MaxPool2d))
    assert norm.fuses(layout.batch_last(torch.ones(5, 8, 11, 9)).permute(3, 0, 1, 2)) == pytest.approx(strength)
    assert norm.pools() == fuses

    def same(x=x):
        for part in (nn.Module.train, nn.Module.eval):
            found = []
            for one in (part(model), part(dense)):
                torch.manual_seed(2)
                given, named = x.clone().requires_grad_(), dict(one.named_parameters())
                one(given).square().sum().backward()
                found.append([given.grad, *(compact(one)[n].scatter(p.grad) if n in compact(one) else p.grad for n, p in named.items())])
                one.zero_grad()
            right = [value * mask[n] if n in mask else value for n, value in zip(["", *named], found[1], strict=True)]
            torch.testing.assert_close(found[0], right, atol=1e-4, rtol=1e-3)

    same()
    same(x[:1])
    seen = []
    for looked_at in (pool, *norm.pool[1:]):
        handle = looked_at.register_forward_hook(lambda m, given, out: seen.append(given[0].shape[-2:]))
        assert not norm.pools()
        same()
        handle.remove()
    assert (11, 9) in seen
    if fuses:
        anymask.to_dense(norm if strength else pool)
        same()


def test_what_is_used_before_its_relu_is_not_taken_along():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.relu, self.last = pooling()[:2], nn.ReLU(), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            y = self.first(x)
            return self.last(torch.cat([y, self.relu(y)], 1))

    model, x = Both(), torch.randn(2, 3, 6, 6)
    mask = anymask.prune(model, "random-uniform", sparsity=0.3, seed=0)
    mask.apply(model)
    right = model(x)
    torch.testing.assert_close(anymask.to_sparse(model, mask, x, measure=False)(x), right, atol=1e-5, rtol=1e-4)


def test_a_map_that_is_smaller_than_its_pools_window_is_refused_as_before():
    model = pooling()
    anymask.to_sparse(model, anymask.prune(model, "random-uniform", sparsity=0.3, seed=0), torch.ones(2, 3, 8, 8), measure=False)
    with pytest.raises(RuntimeError, match=r"[Oo]utput size is too small"):
        model(torch.ones(2, 3, 8, 1))


class Own(nn.Linear):
    """Like a Linear, but who knows what its forward does."""


def test_where_no_layer_can_become_sparse_a_warning_names_their_kinds():
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), Own(18, 4))
    mask = prune(net, "random", sparsity=0.5, seed=0)
    with pytest.warns(UserWarning, match=r"leaves all layers dense: Conv1d, Own\. Only nn\.Conv2d and nn\.Linear"):
        anymask.to_sparse(net, mask, torch.ones(2, 2, 8), measure=False)
    anymask.to_sparse(net, mask, torch.ones(2, 2, 8))  # whether it pays was asked, and the answer is no
    assert not compact(net)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(16, 8), (2, 4, 4, 16)), (nn.Linear(16, 8), (16,)), (nn.Conv2d(4, 8, 3), (4, 6, 6))]
)
def test_a_layer_is_measured_with_inputs_of_any_rank_that_it_takes(layer, shape):
    """As ConvNeXt's linear layers on (N, H, W, C), and an image without a batch."""
    net, x = nn.Sequential(layer), torch.randn(shape)
    mask = prune(net, "magnitude", sparsity=0.9)
    mask.apply(net)
    right = net(x)
    torch.testing.assert_close(anymask.to_sparse(net, mask, x)(x), right, atol=1e-5, rtol=1e-4)
