"""Sparse layers in a model: trained side by side with the dense one, converted back and forth in the middle of it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anymask
from anymask import models, prune
from anymask.errors import AnymaskError, MaskError, SettingError, TechniqueError
from anymask.kernels import available
from anymask.prunables import compact
from anymask.sparse import layers, layout
from anymask.surgery import fingerprint

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built here (no C compiler)")


class Strange(nn.Module):
    """Groups, dilation, a rectangular kernel, padding by name, bias, functional ReLU, a norm used twice, a linear layer on tokens."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, (3, 1), padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=4, bias=False)
        self.bn = nn.BatchNorm2d(12, affine=False)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.mix = nn.Linear(12, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        x = self.norm(x)
        x = self.pool(self.relu(self.bn(self.b(x))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.fc(self.mix(tokens).relu().mean(1))


class PreActivation(nn.Module):
    """The output of a norm is used by a ReLU and by a sum: the two must not become one."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.relu, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.conv1(x))
        x = self.conv2(self.relu(x)) + x
        return self.fc(x.mean((2, 3)))


NETS = {
    "resnet20": lambda: models.build("resnet20", classes=5, seed=0),
    "demonet": lambda: models.build("demonet", classes=5, seed=0),
    "strange": Strange,
    "pre-activation": PreActivation,
    "plain": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 20), nn.ReLU(), nn.Linear(20, 5)),
}


def made(name, *, sparsity=0.7):
    torch.manual_seed(0)
    model = NETS[name]()
    mask = prune(model, "random-uniform", sparsity=sparsity, seed=0)
    mask.apply(model)
    generator = torch.Generator().manual_seed(1)
    return model, mask, torch.randn(20, 3, 16, 16, generator=generator), torch.arange(20) % 5


def steps(model, optimizer, x, y, *, many=3):
    losses = []
    for _ in range(many):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("optim", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)], ids=["sgd", "adamw"])
def test_training_is_that_of_the_dense_model_through_both_conversions(name, optim):
    model, mask, x, y = made(name)
    model.to(memory_format=torch.channels_last)
    dense = copy.deepcopy(model)
    ours, theirs = optim(model), optim(dense)
    held = anymask.hold(mask, model, ours)
    anymask.hold(mask, dense, theirs)
    names, before = list(model.state_dict()), fingerprint(model)
    strides = [p.stride() for p in model.parameters()]
    identity = {n: id(p) for n, p in model.named_parameters()}
    right = steps(dense, theirs, x, y, many=7)
    losses = steps(model, ours, x, y, many=2)
    anymask.to_sparse(model, mask, x, optimizer=ours, measure=False)
    assert len(compact(model)) == len(mask)
    assert all(len(p) == int(mask[n].sum()) for n, p in model.named_parameters() if n in mask)
    losses += steps(model, ours, x, y)
    assert all(slot.shape == p.shape for p in model.parameters() for slot in ours.state[p].values() if slot.ndim)
    assert list(model.state_dict()) == names
    anymask.to_dense(model, optimizer=ours)
    losses += steps(model, ours, x, y, many=2)
    assert losses == pytest.approx(right, abs=2e-3)
    assert fingerprint(model) == before
    assert [p.stride() for p in model.parameters()] == strides
    assert {n: id(p) for n, p in model.named_parameters()} == identity
    assert all(not model.state_dict()[n][~mask[n]].any() for n in mask)
    held.release()


@pytest.mark.parametrize("name", NETS)
def test_one_step_gives_the_dense_outputs_and_gradients(name):
    model, mask, x, y = made(name)
    exact = copy.deepcopy(model).double()
    anymask.to_sparse(model, mask, x, measure=False)
    model.eval(), exact.eval()
    torch.testing.assert_close(model(x), exact(x.double()).float(), atol=1e-5, rtol=1e-5)
    model.train(), exact.train()
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(exact(x.double()), y).backward()
    found = compact(model)
    for n, p in exact.named_parameters():
        right = found[n].collect(p.grad) if n in found else p.grad
        mine = model.get_parameter(n).grad
        assert (mine - right).abs().max() <= 1e-4 * max(1e-3, right.abs().max()), n
    for n, b in exact.named_buffers():
        torch.testing.assert_close(model.get_buffer(n), b.to(model.get_buffer(n).dtype), atol=1e-5, rtol=1e-4)


def test_a_norm_takes_its_relu_along_only_where_nobody_sees_it():
    model, mask, x, _ = made("resnet20")
    anymask.to_sparse(model, mask, x, measure=False)
    norm = model.stem.bn1
    assert isinstance(norm, layers.BatchLastNorm2d)
    assert isinstance(model.stem.relu1, layers.FusedReLU)
    seen = []
    model.eval()
    plain = model(x)
    handle = norm.register_forward_hook(lambda m, i, out: seen.append(out))
    torch.testing.assert_close(model(x), plain)
    assert (seen[0] < 0).any()
    handle.remove()
    handle = model.stem.relu1.register_forward_hook(lambda m, i, out: out + 1)
    assert not torch.allclose(model(x), plain)
    handle.remove()
    other, mask, x, _ = made("pre-activation")
    anymask.to_sparse(other, mask, x, measure=False)
    assert type(other.relu) is nn.ReLU


def test_state_dicts_are_the_dense_models():
    model, mask, x, _ = made("resnet20")
    right = {k: v.clone() for k, v in model.state_dict().items()}
    anymask.to_sparse(model, mask, x, measure=False)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    state = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    assert all(torch.equal(state[k], right[k]) for k in right)
    other, *_ = made("resnet20")
    other.load_state_dict(state)
    double = {k: v * 2 for k, v in right.items()}
    model.load_state_dict(double)
    assert torch.equal(model.state_dict()["fc.weight"], double["fc.weight"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**right, "fc.weight": torch.ones(1, 1)})


def test_copies_are_models_of_their_own():
    model, mask, x, y = made("resnet20")
    anymask.to_sparse(model, mask, x, measure=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x), model.eval()(x))
        other.train()
        steps(other, sgd(other), x, y)
        assert not torch.equal(other.eval()(x), model(x))
        assert other.stem.bn1.relu[0] is other.stem.relu1
        anymask.to_dense(other)
        assert not compact(other)


@pytest.mark.parametrize("name", ["resnet20", "strange"])
def test_ghosts_act_on_top_and_leave_nothing(name):
    model, mask, x, y = made(name)
    dense = copy.deepcopy(model)
    anymask.to_sparse(model, mask, x, measure=False)
    recipe = "tost:-lrsi" if name == "resnet20" else "tost:-lrsi,-ghost_skip"
    runs = []
    for net in (model, dense):
        optimizer = sgd(net)
        anymask.hold(mask, net, optimizer)
        running = anymask.Recipe.preset(recipe).attach(net, optimizer, total_steps=6, example=x)
        losses, found = [], dict(running.found)
        for _ in range(6):
            loss = running.loss(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            running.step()
            losses.append(loss.item())
        running.finish()
        runs.append((losses, found))
    assert runs[0][1] == runs[1][1]
    assert runs[0][0] == pytest.approx(runs[1][0], abs=5e-3)


def test_lrsi_learns_the_scales_of_the_dense_model():
    scales = []
    for sparse in (False, True):
        model, mask, x, y = made("resnet20")
        if sparse:
            anymask.to_sparse(model, mask, x, measure=False)
        optimizer = sgd(model)
        anymask.hold(mask, model, optimizer)
        anymask.Recipe.preset("tost:lrsi").attach(model, optimizer, total_steps=100, example=x, data=[(x, y)])
        assert bool(compact(model)) is sparse
        scales.append(model.state_dict())
    for key, right in scales[0].items():
        torch.testing.assert_close(scales[1][key], right, atol=1e-5, rtol=1e-4)


def test_hold_goes_with_a_mask_that_keeps_less_and_refuses_one_that_keeps_more():
    model, mask, x, y = made("resnet20")
    anymask.to_sparse(model, mask, x, measure=False)
    less = anymask.Mask({n: mask[n] & (torch.rand(mask[n].shape) < 0.5) for n in mask})
    optimizer = sgd(model)
    held = anymask.hold(mask, model, optimizer)
    held.move(less)
    steps(model, optimizer, x, y)
    assert all(not model.state_dict()[n][~less[n]].any() for n in less)
    more = anymask.Mask({n: torch.ones_like(mask[n]) for n in mask})
    with pytest.raises(MaskError, match="does not store"):
        held.move(more)
    with pytest.raises(MaskError, match="store their kept weights alone"):
        prune(model, "magnitude", sparsity=0.9)


def test_torch_compile_passes_over_the_operators():
    model, mask, x, y = made("resnet20")
    other = copy.deepcopy(model)
    for net in (model, other):
        anymask.to_sparse(net, mask, x, measure=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert steps(compiled, sgd(model), x, y) == pytest.approx(steps(other, sgd(other), x, y), abs=1e-3)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor", "test_aot_dispatch_static"])
def test_the_operators_pass_pytorchs_own_checks(check):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    mask = prune(conv, "random-uniform", sparsity=0.5, seed=0)
    anymask.to_sparse(conv, mask, torch.ones(2, 3, 5, 5), measure=False)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    last = x.detach().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2).requires_grad_()
    ops = torch.ops.anymask
    ones = torch.ones(3, requires_grad=True)
    torch.library.opcheck(ops.conv.default, (x, conv.weight, conv.bias, conv.gather.handle), test_utils=check)
    for add, *more in ((None, 0.0, 2, 1, 2, 3), (last.detach().clone(), 0.5, 0, 0, 0, 0)):
        torch.library.opcheck(ops.norm.default, (last, add, ones, ones, None, None, 1e-5, True, *more), test_utils=check)
    torch.library.opcheck(ops.pool.default, (last, [2, 2], [2, 2, 2, 2, 0, 0], False), test_utils=check)


def test_a_second_derivative_is_refused_in_three_parts():
    model, mask, x, y = made("resnet20")
    anymask.to_sparse(model, mask, x, measure=False)
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(TechniqueError, match=r"differentiated twice.*Allowed.*to_dense"):
        sum(g.square().sum() for g in grads).backward()


def test_autocast_and_accumulation():
    model, mask, x, y = made("resnet20")
    dense = copy.deepcopy(model)
    anymask.to_sparse(model, mask, x, measure=False)
    for net in (model, dense):
        for part in (slice(0, 10), slice(10, 20)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x[part]), y[part])
            loss.backward()
    right = dense.fc.weight.grad
    assert (model.fc.scatter(model.fc.weight.grad) - right * mask["fc.weight"]).abs().max() < 0.1 * right.abs().max()


@pytest.mark.parametrize(
    "layer", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d((1, 3), (2, 1)), nn.AvgPool2d(2),
              nn.AvgPool2d(1, 2), nn.AvgPool2d(3, 1, ceil_mode=True), nn.AvgPool2d(3, 2, padding=1), nn.MaxPool2d(2, dilation=2),
              nn.ZeroPad3d((0, 0, 0, 0, 1, 2)), nn.ZeroPad3d((1, 0, 2, 1, 0, 3))]
)  # fmt: skip
@pytest.mark.parametrize("images", [1, 5, 16, 33])
def test_pools_and_pads_of_batch_last_tensors(layer, images):
    net = nn.Sequential(nn.Conv2d(2, 3, 1), layer)
    other = copy.deepcopy(net)
    x = torch.randn(images, 2, 9, 7)
    anymask.to_sparse(net, prune(net, "random-uniform", sparsity=0.5, seed=0), x, measure=False)
    other.load_state_dict(net.state_dict())
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, right = net(a), other(b)
    torch.testing.assert_close(mine, right)
    if isinstance(layer, nn.ZeroPad3d):
        assert layout.is_batch_last(mine)  # a residual network's shortcut is not copied from layout to layout: 8 of 128 ms of a resnet32
    g = torch.randn_like(right)
    mine.backward(g), right.backward(g)
    torch.testing.assert_close(a.grad, b.grad)


def test_only_what_is_faster_is_converted_and_it_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYMASK_CACHE", str(tmp_path))
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32))
    x = torch.randn(16, 32, 16, 16)
    mask = anymask.Mask({"0.weight": torch.rand(32, 32, 3, 3) < 0.02, "2.weight": torch.ones(32, 1, 3, 3)})
    anymask.to_sparse(net, mask, x)
    assert isinstance(net[0], layers.SparseConv2d)
    found = (tmp_path / "layers-3.json").read_text()
    anymask.to_dense(net)
    anymask.to_sparse(net, mask, x)
    assert (tmp_path / "layers-3.json").read_text() == found
    (tmp_path / "layers-3.json").write_text("{damaged")
    anymask.to_sparse(anymask.to_dense(net), mask, x)


def test_weights_outside_of_the_mask_are_dropped_in_layers_that_stay_dense_too(tmp_path, monkeypatch):
    from anymask.sparse import converting

    monkeypatch.setattr(converting, "worth_it", lambda measured: set(list(measured)[:3]))
    monkeypatch.setattr(converting, "times", lambda *_: None)
    model, mask, x, _ = made("resnet20")
    for p in model.parameters():
        p.data += 1
    anymask.to_sparse(model, mask, x)
    assert len(compact(model)) == 3
    assert all(not model.state_dict()[n][~mask[n]].any() for n in mask)


def test_tied_weights_stay_dense_and_empty_layers_work():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    mask = anymask.Mask({"0.weight": torch.eye(8), "3.weight": torch.zeros(8, 8)})
    anymask.to_sparse(net, mask, torch.ones(4, 8), measure=False)
    assert list(compact(net)) == ["3.weight"]
    out = net(torch.ones(4, 8))
    assert torch.equal(out, net[3].bias.expand(4, 8))
    out.sum().backward()
    assert net[3].weight.grad.shape == (0,)


def test_what_is_refused():
    model, mask, x, _ = made("plain")
    with pytest.raises(SettingError, match="float64"):
        anymask.to_sparse(copy.deepcopy(model).double(), mask, x)
    with pytest.raises(MaskError, match="does not fit"):
        anymask.to_sparse(nn.Linear(3, 3), mask, x)
    anymask.to_sparse(model, mask, x, measure=False)
    with pytest.raises(SettingError, match="sparse already"):
        anymask.to_sparse(model, mask, x)


def test_without_the_native_library_it_says_what_is_missing(monkeypatch):
    from anymask.sparse import converting

    monkeypatch.setattr(converting, "available", lambda: False)
    model, mask, x, _ = made("plain")
    with pytest.raises(AnymaskError, match="C compiler"):
        anymask.to_sparse(model, mask, x)


@pytest.mark.parametrize("kind", ["set", "rigl"])
def test_a_mask_that_moves_takes_new_tables_when_it_moves(kind):
    runs = []
    for sparse in (True, False):
        model, mask, x, y = made("resnet20")
        optimizer = sgd(model)
        held = anymask.hold(mask, model, optimizer)
        if sparse:
            anymask.to_sparse(model, mask, x, optimizer=optimizer, measure=False)
        rewiring = anymask.rewire(held, kind, total_steps=9, every="3it", end="100%")
        handles, losses = [], []
        for _ in range(9):
            losses += steps(model, optimizer, x, y, many=1)
            layer = compact(model).get("fc.weight")
            handles.append(layer.gather.handle if layer is not None else None)
        runs.append((rewiring.mask, losses))
        assert len(rewiring.history) == 2
        if sparse:
            assert handles[-1] is not None
            assert len({handle for handle in handles if handle is not None}) == 3
            assert all(len(model.get_parameter(n)) == int(rewiring.mask[n].sum()) for n in rewiring.mask)
    (ours, losses), (theirs, right) = runs
    assert losses == pytest.approx(right, abs=5e-3)
    same = sum(int((ours[n] & theirs[n]).sum()) for n in ours)
    assert same > 0.99 * theirs.kept  # what is nearly equal may fall on either side of the line
