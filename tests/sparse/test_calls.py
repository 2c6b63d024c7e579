"""How the operators are called: directly where nobody looks, through PyTorch's dispatcher where somebody does, with the same numbers."""

import copy
import gc
import io
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import anymask
from anymask import prune
from anymask.errors import SettingError, TechniqueError
from anymask.kernels import Gather, available
from anymask.sparse import ops

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built here")


def net() -> nn.Sequential:
    """Sparse: conv, norm + ReLU + max pool, conv, average pool."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1), nn.AvgPool2d(3))
    anymask.to_sparse(made, prune(made, "random-uniform", sparsity=0.5, seed=0), torch.ones(2, 2, 6, 6), measure=False)
    return made


def called(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and parameters."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


class Seeing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_both_ways_give_the_same_bits_and_whoever_looks_sees_the_operators() -> None:
    model, x = net(), torch.randn(5, 2, 6, 6)
    direct = called(model, x)
    with Seeing() as seeing:
        seen = called(model, x)
    with profile() as profiled:
        again = called(model, x)
    for other in (seen, again):
        assert all(torch.equal(a, b) for a, b in zip(direct, other, strict=True))
    names = {"conv", "conv_gradient", "norm", "norm_gradient", "pool", "pool_gradient"}
    assert {f"anymask.{name}.default" for name in names} <= seeing.names
    assert {"anymask::conv_gradient", "anymask::norm_gradient", "anymask::pool_gradient"} <= {e.key for e in profiled.key_averages()}


def test_saved_tensors_may_come_back_with_other_strides() -> None:
    model, x = net(), torch.randn(5, 2, 6, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.empty(t.size(), dtype=t.dtype).copy_(t), lambda t: t):
        other = called(model, x)
    assert all(torch.equal(a, b) for a, b in zip(called(model, x), other, strict=True))


@pytest.mark.parametrize("wanted", [(True, False, True), (False, True, False), (False, False, True)])
def test_only_wanted_gradients_are_made_and_of_what_they_need(wanted: tuple[bool, bool, bool]) -> None:
    gather = Gather((3, 2, 3, 3), np.arange(0, 54, 2), padding=(1, 1))
    x, values, bias = torch.randn(17, 2, 5, 5), torch.randn(27), torch.zeros(3)
    every = [t.clone().requires_grad_() for t in (x, values, bias)]
    ops.conv(*every, gather.handle).square().sum().backward()
    some = [t.clone().requires_grad_(want) for t, want in zip((x, values, bias), wanted, strict=True)]
    other = torch.bfloat16 if not wanted[1] else torch.float32  # the weight's gradient alone needs more of the input than its shape
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.to(other) if t.ndim == 4 and t.shape[1] == 2 else t):
        ops.conv(*some, gather.handle).square().sum().backward()
    for mine, right, want in zip(some, every, wanted, strict=True):
        assert (mine.grad is not None) == want
        if want:
            torch.testing.assert_close(mine.grad, right.grad)


def test_no_images_are_no_images() -> None:
    conv = net()[4]
    y = conv(torch.zeros(0, conv.in_channels, 5, 5, requires_grad=True))
    y.sum().backward()
    assert len(y) == 0
    assert not conv.weight.grad.any()


def test_numbers_that_are_not_in_memory_as_they_are_read() -> None:
    model, x = net(), torch.randn(2, 2, 6, 6)
    torch.testing.assert_close(model(torch._neg_view(x)), model(-x))
    torch.testing.assert_close(model(torch._efficientzerotensor(2, 2, 6, 6)), model(torch.zeros(2, 2, 6, 6)))
    with pytest.raises(SettingError, match="on meta"):
        ops.conv.__wrapped__(x.to("meta"), model[4].weight, None, model[4].gather.handle)


def test_what_a_norm_remembers_must_be_of_its_size_and_is_the_batch_where_momentum_is_1() -> None:
    model, x = net(), torch.randn(6, 2, 6, 6)
    norm, dense = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)), torch.nn.BatchNorm2d(4, momentum=1.0)
    norm.running_var.fill_(1e4)
    norm.momentum = 1.0
    seen = []
    norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(x)
    dense(seen[0].contiguous())
    torch.testing.assert_close(norm.running_var, dense.running_var)
    norm.running_mean = torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        model(x)


def test_autograds_nodes_have_names() -> None:
    assert net()(torch.randn(2, 2, 6, 6)).grad_fn.name() == "anymask_poolBackward"


def test_second_derivatives_are_refused_on_the_direct_way() -> None:
    x = torch.randn(2, 2, 6, 6, requires_grad=True)
    (g,) = torch.autograd.grad(net()(x).square().sum(), x, create_graph=True)
    with pytest.raises(TechniqueError, match="differentiated twice"):
        g.sum().backward()


def test_batched_gradients_and_vmap_over_weights() -> None:
    model, x = net(), torch.randn(2, 2, 6, 6)
    y = model(x).flatten()
    rows = torch.autograd.grad(y, list(model.parameters()), torch.eye(len(y)), is_grads_batched=True, retain_graph=True)
    for k in (0, len(y) - 1):
        for row, right in zip(rows, torch.autograd.grad(y[k], list(model.parameters()), retain_graph=True), strict=True):
            torch.testing.assert_close(row[k], right)
    conv = model[4]
    inputs, many = torch.randn(2, 4, 3, 3), torch.randn(3, len(conv.weight))
    together = torch.func.vmap(lambda w: ops.conv(inputs, w, None, conv.gather.handle))(many)
    torch.testing.assert_close(together[1], ops.conv(inputs, many[1], None, conv.gather.handle))


def test_shapes_are_known_on_meta_and_what_is_traced_can_be_saved() -> None:
    model = net().eval()
    x = torch.randn(2, 2, 6, 6)
    assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == (2, 3, 1, 1)
    graph = torch.fx.experimental.proxy_tensor.make_fx(model)(x).graph
    assert torch.ops.anymask.conv.default in {node.target for node in graph.nodes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and warns of each number that it freezes
        torch.jit.save(torch.jit.trace(model[:-1], x), io.BytesIO())  # its tracer knows no lists, which the other pool takes
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), buffer)
    assert buffer.getvalue()


def test_a_graph_whose_layer_is_not_here_is_refused_and_takes_no_other_layer() -> None:
    model, x, buffer = net().eval(), torch.randn(2, 2, 6, 6), io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), buffer)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    torch.testing.assert_close(loaded(x), model(x))
    first, second = (Gather((1, 1, 1, 1), np.array([0])).handle for _ in range(2))
    assert abs(first - second) > 1  # as a counter's would: those of two processes are the same
    del model
    gc.collect()
    with pytest.raises(SettingError, match=r"not in this process.*Allowed.*to_dense"):
        loaded(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch's own forward mode
def test_forward_mode_is_refused_and_not_taken_for_a_gradient_of_0() -> None:
    model, x = net().eval(), torch.randn(2, 2, 6, 6)
    for ask in (lambda: torch.func.jvp(model, (x,), (x,)), lambda: torch.func.jacfwd(model)(x)):
        with pytest.raises(TechniqueError, match="in forward mode"):
            ask()
    (_, beside) = torch.func.jvp(lambda scale: scale * model(x), (torch.ones(()),), (torch.ones(()),))
    torch.testing.assert_close(beside, model(x))
