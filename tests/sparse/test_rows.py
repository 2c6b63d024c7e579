"""A residual block as one function of autograd: the same as layer by layer, while nobody looks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anymask
from anymask.errors import SettingError, TechniqueError
from anymask.kernels import available, why_not
from anymask.models.blocks import Conv, Residual, basic, bottleneck, pad, project, stack
from anymask.sparse import layout
from anymask.techniques import Context, GhostActivation

pytestmark = pytest.mark.skipif(not available(), reason=why_not())


def linear_end(inputs: int) -> nn.Module:
    return Residual(stack(inputs, [Conv(inputs)], last=False), nn.Identity(), act=nn.Identity())


def odd_norms(inputs: int) -> nn.Module:
    block: Any = basic(inputs, inputs, 1)
    block.body.bn1 = nn.BatchNorm2d(inputs, affine=False, momentum=0.3)
    block.body.bn2 = nn.BatchNorm2d(inputs, track_running_stats=False)
    return block


BLOCKS = {
    "basic": lambda: basic(8, 8, 1),
    "strided": lambda: basic(8, 12, 2, change=project),
    "padded": lambda: basic(8, 16, 2, change=pad),
    "bottleneck": lambda: bottleneck(8, 8, 1),
    "no ReLU at the end": lambda: linear_end(8),
    "other norms": lambda: odd_norms(8),
}


def made(kind: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(BLOCKS[kind](), nn.Identity())
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.normal_(norm.weight, 1.0)
            nn.init.normal_(norm.bias)
    x = torch.randn(17, 8, 7, 6)
    mask = anymask.Mask({name: torch.rand(p.shape) < 0.4 for name, p in net.named_parameters() if p.ndim == 4})
    return anymask.to_sparse(net, mask, x, measure=False), layout.batch_last(x).permute(3, 0, 1, 2)


def trained(net: nn.Module, x: Tensor) -> tuple[list[Tensor], str]:
    """The output, every gradient, and what the norms remember; and what autograd calls the last function."""
    x = x.detach().requires_grad_()
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *gradients, *net.buffers()], y.grad_fn.name()


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_gives_what_its_layers_give(kind: str) -> None:
    net, x = made(kind)
    hooked = copy.deepcopy(net)
    for module in hooked.modules():
        module.register_forward_hook(lambda *_: None)
    (ours, name), (theirs, other) = trained(net, x), trained(hooked, x)
    assert name == "_RowBackward"
    assert other != name
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_a_ghost_is_taken_along(strength: float) -> None:
    net, x = made("basic")
    ghost = GhostActivation().attach(Context(net, None, nn.functional.cross_entropy, example=x))
    ghost.set_strength(strength)
    (ours, name), hook = trained(net, x), net[0].body.relu1.register_forward_hook(lambda *_: None)
    net.zero_grad()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
    theirs, other = trained(net, x)
    assert name == "_RowBackward" != other
    hook.remove()
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_a_row_stays_one_while_preconditioning_does_not_look() -> None:
    net, x = made("basic")
    net[1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    optimizer, mask = (
        torch.optim.SGD(net.parameters(), lr=0.01),
        anymask.Mask({k: p != 0 for k, p in net.state_dict().items() if p.ndim == 4}),
    )
    anymask.hold(mask, net, optimizer)
    attach = anymask.Recipe.preset("best").only("preconditioning").attach
    running, names = attach(net, optimizer, total_steps=90, mask=mask, example=x), []
    net[0].register_forward_hook(lambda _m, _x, y: names.append(y.grad_fn.name()))
    for _ in range(6):
        loss = running.loss(net(x), torch.arange(17) % 8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        running.step()
    assert names[0] != "_RowBackward" == names[-1]


def test_backward_may_come_again_and_leaves_what_it_was_given() -> None:
    for kind in ("basic", "padded", "no ReLU at the end"):
        net, x = made(kind)
        y = net(x.requires_grad_())
        g = torch.randn_like(y)
        before = g.clone()
        first, again = (torch.autograd.grad(y, [x, *net.parameters()], g, retain_graph=True) for _ in range(2))
        assert torch.equal(g, before)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same() -> None:
    net, x = made("basic")
    whole, _ = trained(copy.deepcopy(net), x)
    frozen = {"0.body.conv1.weight", "0.body.bn2.bias"}
    for name, p in net.named_parameters():
        p.requires_grad_(name not in frozen)
    trained(net, x)
    right = dict(zip([name for name, _ in net.named_parameters()], whole[2:], strict=False))
    for name, p in net.named_parameters():
        assert p.grad is None if name in frozen else torch.equal(p.grad, right[name])


def test_second_derivatives_are_refused() -> None:
    net, x = made("basic")
    (g,) = torch.autograd.grad(net(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(TechniqueError, match="differentiated twice"):
        g.sum().backward()


def test_gradients_of_gradients_are_refused_too() -> None:
    net, x = made("basic")
    y = net(x.requires_grad_())
    g = torch.ones_like(y).requires_grad_()
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    with pytest.raises(TechniqueError, match="differentiated twice"):
        torch.autograd.grad(gx.sum(), g)


@pytest.mark.parametrize("kind", ["basic", "padded", "no ReLU at the end", "soft"])
def test_batched_gradients(kind: str) -> None:
    net, x = made("basic" if kind == "soft" else kind)
    if kind == "soft":
        GhostActivation().attach(Context(net, None, nn.functional.cross_entropy, example=x)).set_strength(0.4)
    y, inputs = net(x.requires_grad_()), [x, *net.parameters()]
    assert y.grad_fn.name() == "_RowBackward"
    g = torch.randn(3, *y.shape)
    del net  # its tables are needed still
    together = torch.autograd.grad(y, inputs, g, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        for rows, right in zip(together, torch.autograd.grad(y, inputs, g[k], retain_graph=True), strict=True):
            torch.testing.assert_close(rows[k], right, rtol=1e-5, atol=1e-5)


def test_another_forward_or_another_tensor_in_a_parameters_place_is_not_passed_over() -> None:
    called = []
    for name in ("conv1", "bn1", "relu1"):
        net, x = made("basic")
        module = getattr(net[0].body, name)
        module.forward = lambda input, whole=module.forward, name=name: (called.append(name), whole(input))[1]
        assert net(x).grad_fn.name() != "_RowBackward"
    assert called == ["conv1", "bn1", "relu1"]
    net, x = made("basic")
    right = net(x)
    weight = net[0].body.conv1.weight.detach().clone()
    del net[0].body.conv1.weight
    net[0].body.conv1.weight = weight
    torch.testing.assert_close(net(x), right)


def test_saved_tensors_may_come_back_with_other_strides() -> None:
    net, x = made("basic")
    twin = copy.deepcopy(net)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.empty(t.size(), dtype=t.dtype).copy_(t), lambda t: t):
        ours, name = trained(net, x)
    assert name == "_RowBackward"
    for mine, right in zip(ours, trained(twin, x)[0], strict=True):
        torch.testing.assert_close(mine, right)


def test_saved_tensors_of_another_kind_are_refused() -> None:
    net, x = made("basic")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.float(), lambda t: t), pytest.raises(SettingError, match="let through"):
        trained(net, x)


def test_a_shortcut_of_another_shape_is_the_models_own_affair() -> None:
    net, x = made("basic")
    net[0].shortcut = nn.AvgPool2d(2)
    with pytest.raises(RuntimeError, match="must match the size"):
        net(x)
    net[0].shortcut = nn.AdaptiveAvgPool2d(1)  # which is broadcast
    assert net(x).grad_fn.name() != "_RowBackward"


def test_in_evaluation_and_without_gradients_it_is_as_before() -> None:
    net, x = made("basic")
    with torch.no_grad():
        y = net(x)
    assert not y.requires_grad
    assert int(net[0].body.bn1.num_batches_tracked) == 1
    net.eval()
    assert net(x).grad_fn.name() != "_RowBackward"
