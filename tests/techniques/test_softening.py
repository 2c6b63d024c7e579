"""The softening itself: nothing of it is left whenever Ctrl-C comes, and the native kernel gives what PyTorch's operators give."""

import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymask.kernels import available, library, why_not
from anymask.techniques import Context, GhostActivation, ghost_activation


def attach(model: nn.Module):
    return GhostActivation().attach(Context(model, None, F.cross_entropy))


def interrupted(call: Callable[[], object], *, at: int) -> bool:
    """Whether Ctrl-C came: before the `at`-th instruction of the technique's own code and of the modes of PyTorch that it enters."""
    files, left = {ghost_activation.__file__, torch.overrides.__file__}, at

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        nonlocal left
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace if frame.f_code.co_filename in files else None

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_ctrl_c_at_any_instruction_leaves_no_mode_behind() -> None:
    model, x, depth, at = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU()), torch.randn(2, 4), torch._C._len_torch_function_stack(), 1
    while True:
        attached = attach(model)
        came = interrupted(lambda: model(x), at=at)
        attached.detach()
        assert torch._C._len_torch_function_stack() == depth, f"before instruction {at}"
        if not came:
            break
        at += 1
    assert at > 100


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it comes": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "with gaps": lambda x: torch.stack([x, x])[:, :, ::2][0],
}


@pytest.mark.skipif(not available(), reason=why_not())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_native_kernel_gives_the_same_in_every_layout_and_may_be_differentiated_twice(layout: str) -> None:
    x, model = LAYOUTS[layout](torch.randn(3, 8, 4, 4)).requires_grad_(), nn.ReLU()
    attached = attach(model)
    for strength in (1.0, 0.25, 0.0):
        attached.set_strength(strength)
        results = []
        for there in (available, lambda: False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(library, "available", there)
                y = model(x)
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).expand(2, *y.shape)[0]
            (first,) = torch.autograd.grad((y * weight).sum(), x, retain_graph=True)
            (again,) = torch.autograd.grad((y * weight).sum(), x, create_graph=True)
            twice = torch.autograd.grad(again.square().sum(), x)[0] if strength else first
            results.append([y, first, again, twice])
        names = {type(y.grad_fn).__name__ for y, *_ in results}
        assert len(names) == 1 + (strength > 0 and layout != "with gaps")  # the kernel was there once, and once not
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # within torch.func
def test_other_ways_to_differentiate_go_on_as_before() -> None:
    model, x = nn.ReLU(), torch.randn(5, 3)
    attach(model)
    slope = torch.autograd.functional.jacobian(lambda x: model(x).sum(), x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(x), slope)
    torch.testing.assert_close(torch.func.jvp(model, (x,), (torch.ones(5, 3),))[1], slope)
    with torch.autograd.forward_ad.dual_level():
        made = model(torch.autograd.forward_ad.make_dual(x, torch.ones(5, 3)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(made).tangent, slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sharpening_swish_has_finite_values_and_gradients_up_to_its_end(dtype: torch.dtype) -> None:
    """float16 does not hold beta / strength where the strength is next to nothing, and infinity times 0 is NaN."""
    x, model = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype, requires_grad=True), nn.ReLU()
    attached = GhostActivation(fade="sharpen").attach(Context(model, None, F.cross_entropy))
    for strength in (1e-3, 1e-5, 1e-9):
        attached.set_strength(strength)
        out = model(x)
        assert out.isfinite().all()
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
    torch.testing.assert_close(out, x.relu())
