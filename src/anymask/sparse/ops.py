"""The kernels as PyTorch operators: autograd, fake tensors (so `torch.compile` passes over them), threads of `torch.set_num_threads`."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from anymask.errors import SettingError, TechniqueError
from anymask.kernels import library, native, norms
from anymask.sparse import calls, memory
from anymask.sparse.layout import array, batch_last, empty, into, is_batch_last


# -- how they are called ----------------------------------------------------------------------------------------------
def _kernel(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """A function of tensors as the operator anymask::`name`, which keeps it as `raw`."""

    def made(raw: Callable[..., Any]) -> CustomOpDef:
        operator: Any = torch.library.custom_op(f"anymask::{name}", raw, mutates_args=())
        operator.raw, operator.name = raw, name
        return operator

    return made


def _differentiated(operator: Any, save: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`operator` with a gradient: one function of autograd where nobody else looks.

    What torch.library wraps around an operator in Python takes a fifth of a small call and its gradient, which shows in a resnet32's step.
    """
    operator.register_autograd(backward, setup_context=save)

    def forward(ctx: Any, *args: Any) -> Any:
        output = operator.raw(*args)
        save(ctx, args, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    direct: Any = type(f"anymask_{operator.name}", (torch.autograd.Function,), parts)

    @wraps(operator.raw)
    def call(*args: Any) -> Any:
        if unseen(args):
            return direct.apply(*args)
        _no_forward_mode(args)
        return operator(*args)

    return call


def _gradient(operator: Any) -> Callable[..., Any]:
    """`operator`, which is a gradient: called directly where nobody looks and nobody differentiates it."""
    operator.register_autograd(no_second)

    @wraps(operator.raw)
    def call(*args: Any) -> Any:
        return operator.raw(*args) if not torch.is_grad_enabled() and unseen(args) else operator(*args)

    return call


def unseen(args: Iterable[Any]) -> bool:
    """Whether nobody but autograd has to know what is done with the tensors of `args`: they are plain, no mode and no profiler is there."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or torch._C._autograd._profiler_enabled():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if forward_ad._current_level >= 0:
        return False
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is nn.Parameter:
            if not x.is_cpu or _wrapped(x):
                return False
        elif kind not in _OTHERS:
            return False
    return True


_OTHERS = {type(None), int, float, bool, list}  # arguments of operators that are no tensors


def _wrapped(x: Tensor) -> bool:
    functorch = torch._C._functorch  # the legacy ones are is_grads_batched's
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def _plain(x: Tensor) -> bool:
    """Whether `x` is nobody's stand-in: no torch.compile, no torch.func, no forward mode."""
    if torch.compiler.is_compiling() or type(x) not in {Tensor, nn.Parameter}:
        return False
    return not _wrapped(x) and forward_ad._current_level < 0


def no_second(ctx: Any, *_: Any) -> Any:
    raise TechniqueError(
        "a sparse layer was differentiated twice",
        allowed="one backward pass",
        fix="convert the model back with anymask.to_dense for what needs second derivatives (LRsI and GraSP do so by themselves)",
    )


def _no_forward_mode(args: Iterable[Any]) -> None:
    """Refuse tensors that carry a tangent: in torch.func.jvp PyTorch would drop that of an operator of ours without a word."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise TechniqueError(
            "a sparse layer was differentiated in forward mode",
            allowed="a backward pass",
            fix="convert the model back with anymask.to_dense for torch.func.jvp, jacfwd and hessian",
        )


# -- convolution ----------------------------------------------------------------------------------------------------
@_kernel("conv")
def _conv(x: Tensor, values: Tensor, bias: Tensor | None, handle: int) -> Tensor:
    """The convolution that `handle` stands for, of x (N, C, H, W) with the kept weights `values` (K,)."""
    out = _fake_conv(x, values, bias, handle)
    calls.conv(calls.sized(native.gather_of(handle), x.shape), x, values, bias, out)
    return out


@_kernel("conv_gradient")
def _conv_gradient(  # noqa: PLR0917
    x: Tensor, g: Tensor, values: Tensor, handle: int, of_input: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of the input and of the kept weights; one that is not asked for is empty. Both at once share what they read."""
    gx, gvalues = _fake_conv_gradient(x, g, values, handle, of_input, of_weight)
    out = {"gx": gx if of_input else None, "gvalues": gvalues.zero_() if of_weight else None}
    calls.conv_gradient(calls.sized(native.gather_of(handle), x.shape), x, g, values, **out)
    return gx, gvalues


@_conv.register_fake
def _fake_conv(x: Tensor, values: Tensor, bias: Tensor | None, handle: int) -> Tensor:
    o, rows, cols, n = native.gather_of(handle).output_shape(x.shape[2], x.shape[3], images=x.shape[0])
    return empty(x, (n, o, rows, cols))


@_conv_gradient.register_fake
def _fake_conv_gradient(  # noqa: PLR0917
    x: Tensor, g: Tensor, values: Tensor, handle: int, of_input: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    gx = empty(g, x.shape) if of_input else x.new_empty(0)
    return gx, x.new_empty(len(native.gather_of(handle).conv.kept) if of_weight else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, ctx.handle = inputs
    ctx.gather = native.gather_of(ctx.handle)  # the layer may be gone when backward comes
    ctx.save_for_backward(x, values)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, values = ctx.saved_tensors
    wants_x, wants_values, wants_bias, _ = ctx.needs_input_grad
    gx = gvalues = None
    if wants_x or wants_values:
        gx, gvalues = conv_gradient(x, g, values, ctx.handle, wants_x, wants_values)
    return gx if wants_x else None, gvalues if wants_values else None, g.sum((0, 2, 3)) if wants_bias else None, None


conv = _differentiated(_conv, _save, _backward)
conv_gradient = _gradient(_conv_gradient)


# -- batch norm -----------------------------------------------------------------------------------------------------
@_kernel("norm")
def _norm(  # noqa: PLR0917  an operator's arguments are a list
    x: Tensor,
    add: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    relu: bool,
    soft: float,
    rows: int,
    cols: int,
    high: int,
    wide: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm of x (N, C, H, W), plus `add` of its shape, then if asked ReLU, as soft as `soft` says. Gives (y, mean, var, place).

    The statistics are those of the batch where mean and var are None. After a ReLU without `add`, a max pool of windows side by side may
    follow: to (rows, cols), of windows (high, wide), all 0 where none does; torch.jit.trace knows no lists. `place`, of y's shape and empty
    without a pool, says which place of its window each output is, for the gradient.
    """
    given = mean is not None
    y, _, _, place = _fake_norm(x, add, weight, bias, mean, var, eps, relu, soft, rows, cols, high, wide)
    mean, var = (t.clone() if t is not None else x.new_empty(x.shape[1]) for t in (mean, var))
    how = calls.Norm(weight, bias, mean, var, eps, relu, soft, given)
    if not high:
        calls.norm(how, x, add, y)
        return y, mean, var, place
    if add is not None or not relu or high * wide > 256:  # places are bytes
        allowed = "norm, ReLU and a pool of at most 256 places"
        raise SettingError("a norm with a pool too large, no ReLU, or a sum", allowed=allowed, fix="leave the pool out")
    calls.pooled_norm(how, _windows(x.shape, [rows, cols], [high, wide, high, wide, 0, 0], mean=False), x, y, place)
    return y, mean, var, place


@_kernel("norm_gradient")
def _norm_gradient(  # noqa: PLR0917
    x: Tensor,
    add: Tensor | None,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    place: Tensor,
    eps: float,
    relu: bool,
    soft: float,
    rows: int,
    cols: int,
    high: int,
    wide: int,
    given: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, add, weight and bias; g is that of what `norm` gave. That of add is empty where it is none, or g itself."""
    gx, gadd, gweight, gbias = _gradients_of_norm(x, add, relu=relu)
    how = calls.Norm(weight, bias, mean, var, eps, relu, soft, given)
    if high:
        pool = _windows(x.shape, [rows, cols], [high, wide, high, wide, 0, 0], mean=False)
        calls.pooled_norm_gradient(how, pool, x, g, place=place, out=(gx, gweight, gbias))
    else:
        calls.norm_gradient(how, x, add, g, (gx, gadd if gadd.numel() else None, gweight, gbias))
    return gx, gadd, gweight, gbias


@_norm.register_fake
def _fake_norm(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols, high, _ = others[-4:]
    size = (*x.shape[:2], rows, cols) if high else x.shape
    place = empty(x, size if high else (0, 0, 0, 0), dtype=torch.uint8)
    return empty(x, size), x.new_empty(x.shape[1]), x.new_empty(x.shape[1]), place


@_norm_gradient.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients_of_norm(args[0], args[1], relu=args[9])


def _gradients_of_norm(x: Tensor, add: Tensor | None, *, relu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gadd = empty(x, x.shape) if add is not None and relu else x.new_empty(0)
    return empty(x, x.shape), gadd, x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, add, weight, bias, mean, _, ctx.eps, ctx.relu, ctx.soft, *ctx.pool = inputs
    ctx.given, ctx.adds = mean is not None, add is not None
    ctx.save_for_backward(x, add if ctx.relu else None, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_norm(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, add, weight, bias, mean, var, place = ctx.saved_tensors
    gx, gadd, gw, gb = norm_gradient(x, add, g, weight, bias, mean, var, place, ctx.eps, ctx.relu, ctx.soft, *ctx.pool, ctx.given)
    gadd = (gadd if add is not None else g) if ctx.adds else None
    return gx, gadd, gw if ctx.needs_input_grad[2] else None, gb if ctx.needs_input_grad[3] else None, *[None] * 9


norm = _differentiated(_norm, _save_norm, _backward_norm)
norm_gradient = _gradient(_norm_gradient)


# -- the ghost of a ReLU --------------------------------------------------------------------------------------------
def softens(x: Tensor) -> bool:
    """Whether `soft_relu` takes `x`: float32 on the CPU, without gaps in memory, outside of torch.compile, torch.func and forward mode."""
    if not _plain(x) or x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel() or not library.available():
        return False
    return x.is_contiguous() or is_batch_last(x) or x.is_contiguous(memory_format=torch.channels_last)


@_kernel("soft_relu")
def _soft_relu(x: Tensor, strength: float) -> Tensor:
    """s x sigmoid(x) + (1 - s) relu(x) of finite x that `softens`, with the strength s in [0, 1], in one pass."""
    return _softened(x, None, strength)


@_kernel("soft_relu_gradient")
def _soft_relu_gradient(x: Tensor, g: Tensor, strength: float) -> Tensor:
    """The gradient of x, for the gradient g of what `soft_relu` gave."""
    return _softened(x, g, strength)


def _softened(x: Tensor, g: Tensor | None, strength: float) -> Tensor:
    memory.follow()
    out = torch.empty_like(x)
    if g is not None and g.stride() != x.stride():
        g = torch.empty_like(x).copy_(g)
    x, g, into = (None if t is None else t.detach().as_strided((t.numel(),), (1,)).numpy() for t in (x, g, out))  # type: ignore[assignment]
    native.soften(x, into, strength=strength, g=g, threads=torch.get_num_threads())  # type: ignore[arg-type]
    return out


@_soft_relu.register_fake
def _(x: Tensor, _: float) -> Tensor:
    return torch.empty_like(x)


@_soft_relu_gradient.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _save_soft(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x, ctx.strength = inputs
    ctx.save_for_backward(x)


def _backward_soft(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    (x,), s = ctx.saved_tensors, ctx.strength
    if not torch.is_grad_enabled():
        return soft_relu_gradient(x, g, s), None
    sigmoid = x.sigmoid()  # somebody differentiates once more
    return g * (s * sigmoid * (1 + x * (1 - sigmoid)) + (1 - s) * (x > 0)), None


soft_relu = _differentiated(_soft_relu, _save_soft, _backward_soft)
soft_relu_gradient = _gradient(_soft_relu_gradient)


# -- pools ----------------------------------------------------------------------------------------------------------
@_kernel("pool")
def _pool(x: Tensor, size: list[int], window: list[int], mean: bool) -> Tensor:
    """Max or average pool of x (N, C, H, W) to `size` = (OH, OW); `window` is (KH, KW, SH, SW, PH, PW)."""
    out = empty(x, (*x.shape[:2], *size))
    _windows(x.shape, size, window, mean=mean).forward(array(batch_last(x)), into(out), threads=torch.get_num_threads())
    return out


@_kernel("pool_gradient")
def _pool_gradient(x: Tensor, y: Tensor, g: Tensor, window: list[int], mean: bool) -> Tensor:
    """The gradient of x."""
    out = empty(x, x.shape)
    how = _windows(x.shape, list(y.shape[2:]), window, mean=mean)
    how.gradient(array(batch_last(x)), array(batch_last(y)), array(batch_last(g)), into(out), threads=torch.get_num_threads())
    return out


def _windows(shape: Any, size: list[int], window: list[int], *, mean: bool) -> norms.Pool:
    n, c, rows, cols = shape
    return norms.Pool(n, c, rows, cols, *size, *window, int(mean))


@_pool.register_fake
def _(x: Tensor, size: list[int], window: list[int], mean: bool) -> Tensor:
    return empty(x, (*x.shape[:2], *size))


@_pool_gradient.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return empty(x, x.shape)


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.size, ctx.window, ctx.mean = inputs
    ctx.save_for_backward(x)  # not the output: a ReLU may write into it, and PyTorch's pools let it


def _backward_pool(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    y = g if ctx.mean else pool(x, ctx.size, ctx.window, False)  # a mean's gradient needs its size alone
    return pool_gradient(x, y, g, ctx.window, ctx.mean), None, None, None


pool = _differentiated(_pool, _save_pool, _backward_pool)
pool_gradient = _gradient(_pool_gradient)
