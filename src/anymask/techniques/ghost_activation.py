"""Ghost soft neurons: ReLU made smooth early in training, exact ReLU at the end."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anymask.errors import SettingError, TechniqueError
from anymask.interrupts import Mode, withdraw
from anymask.prunables import bare
from anymask.registry import lookup
from anymask.sparse import layers, ops
from anymask.surgery import device_of, evaluating, run
from anymask.techniques.base import AttachedGhosts, Context, Ghost, Technique

_CHILD = "ghost_activation"
_CHECKPOINT = torch.utils.checkpoint.__file__


def _swish(x: Tensor, beta: Tensor | float) -> Tensor:
    return x * torch.sigmoid(beta * x)


def _mish(x: Tensor, beta: Tensor | float) -> Tensor:
    return x * torch.tanh(F.softplus(beta * x))


SOFT = {"swish": _swish, "mish": _mish}
FADES = ("blend", "sharpen")

# ReLU in all its spellings. A module's is one of them too: nn.ReLU calls F.relu, nn.ReLU6 calls F.hardtanh(x, 0, 6).
_RELU = frozenset({F.relu, torch.relu, torch.Tensor.relu})
_RELU_ = frozenset({F.relu_, torch.relu_, torch.Tensor.relu_})
_HARDTANH = frozenset({F.hardtanh, F.hardtanh_})
_SMOOTH = {F.gelu: "gelu", F.silu: "silu", F.mish: "mish", F.elu: "elu", F.selu: "selu", F.celu: "celu", F.softplus: "softplus"}
_SMOOTH |= {torch.tanh: "tanh", F.tanh: "tanh", torch.Tensor.tanh: "tanh", torch.selu: "selu", torch.celu: "celu"}
_OTHER = {F.hardswish: "hardswish", F.leaky_relu: "leaky_relu", F.prelu: "prelu", torch.prelu: "prelu", F.rrelu: "rrelu"}
_LEFT = {**_SMOOTH, **_OTHER}
_LEFT_MODULES = (nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Tanh, nn.Hardswish, nn.LeakyReLU, nn.PReLU, nn.RReLU)


@dataclass(frozen=True)
class GhostActivation(Technique):
    r"""Each ReLU of the model becomes a soft activation that fades back to exact ReLU.

    With strength s falling from 1 to 0, each ReLU (and ReLU6, whose output stays capped at 6) gives

        blend:    s * soft(x) + (1 - s) * relu(x)
        sharpen:  soft(x) with beta / s in place of beta, which tends to relu(x)

    where soft is Swish, x * sigmoid(beta * x), or Mish, x * tanh(softplus(beta * x)). Units that a ReLU would silence
    pass gradients while s > 0. At s = 0 the output is relu(x), bit for bit, and then the hooks are gone.

    A ReLU is found however it is written: `nn.ReLU` and `nn.ReLU6` modules, and, where there is an example input, in the
    code of any module that calls F.relu, torch.relu, Tensor.relu, F.relu6, F.hardtanh(x, 0, 6) or one of their in-place
    forms, in whichever branch. Modules that the example does not reach in eval mode are left out unless they are of
    the class of one that it does reach. Not seen: clamp(min=0), and whole recurrent layers (nn.RNN).

    Smooth activations (GELU, SiLU, Mish, ELU, Softplus, tanh) have from the start what this gives to a ReLU. A network
    that has no others is refused; in a mixed one `found` names what was left as it is.

    Args:
        soft: "swish" (arXiv 1710.05941) or "mish" (arXiv 1908.08681).
        beta: steepness, > 0; the larger the nearer to ReLU.
        fade: "blend" or "sharpen".

    Raises:
        TechniqueError: on attach, when the model has no ReLU; in the first training step, when a ReLU runs inside
            torch.utils.checkpoint of a function, whose second run could not be softened.

    Example:
        >>> import torch
        >>> from anymask.techniques import Context
        >>> relu = torch.nn.Sequential(torch.nn.ReLU())
        >>> ghost = GhostActivation(beta=1.0).attach(Context(relu, None, torch.nn.functional.cross_entropy))
        >>> float(relu(torch.tensor(-1.0))) < 0
        True
        >>> ghost.detach(); float(relu(torch.tensor(-1.0)))
        0.0

    Reference: ToST (arXiv 2206.12755). Differs from the authors' code: there the swap is for the whole training and the
    network that is tested is not a ReLU network; here it ends as one.
    """

    name: ClassVar[str] = "ghost_activation"
    seam: ClassVar[str] = "model"
    about: ClassVar[str] = "soft neurons (Swish, Mish) instead of ReLU early in training"
    paper: ClassVar[str] = "arXiv 2206.12755"

    soft: str = "swish"
    beta: float = 1.0
    fade: str = "blend"

    def __post_init__(self) -> None:
        lookup(SOFT, self.soft, what="soft activation")
        lookup(dict.fromkeys(FADES), self.fade, what="fade")
        if not self.beta > 0:
            raise SettingError(f"beta came as {self.beta}", allowed="a number > 0", fix="1.0 is Swish as published")

    def attach(self, context: Context) -> AttachedGhosts:
        model = bare(context.model)
        owners, relus, left = _found(model, context.example)
        if not relus:
            raise self._nothing_soft(model, left, traced=context.example is not None)
        more = ", ".join(f"{count} {name}" for name, count in left.items())
        seen = "" if context.example is not None else " (no example: what its code calls is not seen)"
        ghosts = AttachedGhosts(model, child=_CHILD, found=f"{relus} ReLU" + (f", {more} left as they are" if more else "") + seen)
        ghost = _SoftReLU(self, device=device_of(model))
        handles: list[Any] = []
        for owner in owners:
            # Entered after, and left before, whatever else is hooked there. On the owners, not once on the model:
            # torch.utils.checkpoint runs modules again on their own.
            handles.append(owner.register_forward_pre_hook(ghost.enter))
            handles.append(owner.register_forward_hook(ghost.leave, prepend=True, always_call=True))
        ghosts.add(ghost, [*handles, ghost])
        return ghosts

    def _nothing_soft(self, model: nn.Module, left: Mapping[str, int], *, traced: bool) -> TechniqueError:
        if not left:
            fix = "see that the example reaches its ReLUs" if traced else "pass example=x, which shows ReLUs that are no modules"
            return self.nothing("ReLUs", model, fix=fix)
        seen = ", ".join(f"{count} {name}" for name, count in left.items())
        what = "smooth already" if all(name in _SMOOTH.values() for name in left) else "no ReLUs"
        return TechniqueError(
            f"{self.name} found nothing to apply to in {type(model).__name__}: its activations are {what}: {seen}",
            allowed="a model with ReLUs, which a soft activation can stand in for",
            fix="leave it out of the recipe" + ("" if traced else ", or pass example=x to see its code"),
        )


# -- what is called ------------------------------------------------------------------------------------------------
def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, *, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def relu_call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bool, bool] | None:
    """(capped at 6, in place) of a call that is a ReLU; None of any other."""
    if func in _RELU_:
        return False, True
    if func in _RELU:
        return False, bool(_argument(args, kwargs, 1, name="inplace", default=False))
    if func is F.relu6:
        return True, bool(_argument(args, kwargs, 1, name="inplace", default=False))
    if func in _HARDTANH:
        low, high = _argument(args, kwargs, 1, name="min_val", default=-1.0), _argument(args, kwargs, 2, name="max_val", default=1.0)
        inplace = func is F.hardtanh_ or bool(_argument(args, kwargs, 3, name="inplace", default=False))
        return (True, inplace) if low == 0 and high == 6 else None
    return None


def _is_relu(module: nn.Module) -> bool:
    return isinstance(module, nn.ReLU) or (isinstance(module, nn.Hardtanh) and module.min_val == 0 and module.max_val == 6)


# -- where they are ------------------------------------------------------------------------------------------------
def _found(model: nn.Module, example: Any) -> tuple[list[nn.Module], int, dict[str, int]]:
    """The modules whose own code calls a ReLU, how many calls there are, and how many of other activations."""
    modules = list(model.modules())
    owners = {id(m) for m in modules if _is_relu(m)}
    if example is None:
        left = Counter(type(m).__name__.lower() for m in modules if type(m) in _LEFT_MODULES)
        named = {name.replace("leakyrelu", "leaky_relu"): count for name, count in left.items()}
        return [m for m in modules if id(m) in owners], len(owners), named
    traced = _Tracing()
    traced.run(model, example)
    owners |= {id(m) for m in traced.owners}
    kinds = {type(m) for m in traced.owners}  # a block that runs in training only is like those that run always
    return [m for m in modules if id(m) in owners or type(m) in kinds], traced.relus, dict(traced.left)


class _Tracing(Mode):
    """Sees which module runs while an activation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.owners: list[nn.Module] = []
        self.relus, self.left = 0, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = _argument(args, kwargs, 0, name="input")
        if relu_call(func, args, kwargs) is not None and x.is_floating_point():
            self.relus += 1
            self.owners.append(self.running[-1])
        elif func in _LEFT:
            self.left[_LEFT[func]] += 1
        return func(*args, **kwargs)

    def run(self, model: nn.Module, example: Any) -> None:
        handles: list[Any] = []
        try:
            for module in model.modules():
                handles.append(module.register_forward_pre_hook(lambda m, _args: self.running.append(m)))
                handles.append(module.register_forward_hook(lambda _m, _args, _out: (self.running.pop(), None)[1], always_call=True))
            with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"), self:
                run(model, example)
        finally:
            for handle in handles:
                handle.remove()


# -- the ghost -----------------------------------------------------------------------------------------------------
class _SoftReLU(Ghost, layers.Softens):
    """What each ReLU gives instead, while one of the modules that call them runs."""

    def __init__(self, settings: GhostActivation, *, device: torch.device) -> None:
        super().__init__(device)
        self.soft, self.beta, self.fade = SOFT[settings.soft], settings.beta, settings.fade
        self.silu = settings.soft == "swish" and settings.beta == 1.0 and settings.fade == "blend"
        self.modes: list[_Softened] = []

    def enter(self, owner: nn.Module, _args: Any) -> None:
        if self.gone:
            return
        if not torch.compiler.is_compiling():
            self._exit_dead(begun=owner)
        # Known before it is entered, until after it is left: Ctrl-C may come between any two steps.
        self.modes.append(_Softened(self, owner))
        self.modes[-1].__enter__()

    def leave(self, *_: Any) -> None:  # nothing by name: compiled by itself, its frame is searched for tensors, which warns of their .grad
        if not self.gone and self.modes:
            self.modes[-1].__exit__(None, None, None)
            self.modes.pop()

    def remove(self) -> None:
        """As a handle that is removed on detach."""
        self._exit_dead()

    def _exit_dead(self, *, begun: nn.Module | None = None) -> None:
        """Exit the modes of calls that ended without their hooks; `begun` is called just now and has no mode yet."""
        while self.modes:
            owner = self.modes[-1].owner
            if sum(mode.owner is owner for mode in self.modes) <= _calls(owner) - (owner is begun):
                return
            withdraw(self.modes[-1])
            self.modes.pop()

    def softness(self) -> float | None:
        """For a norm that takes its ReLU along."""
        return 0.0 if self.gone else float(self.strength) if self.silu else None

    def soften(self, x: Tensor, *, capped: bool) -> Tensor:
        """`x` (any shape) through a ReLU as soft as the strength says."""
        if not capped and ops.softens(x) and (level := self.softness()):
            return ops.soft_relu(x, level)
        # Operators, which the mode of a module around this one does not take for a ReLU of its own.
        out = torch.ops.aten.hardtanh.default(x, 0.0, 6.0) if capped else torch.ops.aten.relu.default(x)
        strength = self.strength
        if self.fade == "sharpen":
            # No 1/0: below 1e-6 the swish is ReLU to float32 precision for |x| > 1e-4, and at 0 exactly ReLU is taken. Nor a quotient
            # that float16 does not hold: inf times x = 0 is NaN.
            least = max(1e-6, 2 * self.beta / torch.finfo(x.dtype).max)
            soft = self.soft(x, (self.beta / strength.clamp(min=least)).to(x.dtype))
            return torch.where(strength > 0, soft.clamp(max=6.0) if capped else soft, out)
        soft = F.silu(x) if self.silu else self.soft(x, self.beta)  # silu: one fused pass instead of three
        return torch.lerp(out, soft.clamp(max=6.0) if capped else soft, strength.to(out.dtype))


class _Softened(TorchFunctionMode):  # torch.compile knows how this leaves, and not how Mode does
    """Softens the ReLUs that are called while it is entered."""

    def __init__(self, ghost: _SoftReLU, owner: nn.Module) -> None:
        super().__init__()
        self.ghost, self.owner = ghost, owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = relu_call(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        x = _argument(args, kwargs, 0, name="input")
        if not x.is_floating_point():
            return func(*args, **kwargs)
        running, checkpointed = (True, False) if torch.compiler.is_dynamo_compiling() else _around(self.owner)  # torch.export has frames
        if not running:  # Ctrl-C went through it, for which modules call no hooks (Module._call_impl catches Exception)
            return func(*args, **kwargs)
        if checkpointed and self.owner.training:
            raise TechniqueError(
                f"a ReLU of {type(self.owner).__name__} runs inside torch.utils.checkpoint of a function",
                allowed="checkpoints of whole modules, which are softened in their second run, too",
                fix="put the function's code into a module and checkpoint that, or leave ghost_activation out of the recipe",
            )
        capped, inplace = call
        # In place stays in place: what reads the tensor afterwards (a shortcut) must see what the ReLU wrote.
        return x.copy_(self.ghost.soften(x.clone(), capped=capped)) if inplace else self.ghost.soften(x, capped=capped)


def _around(owner: nn.Module) -> tuple[bool, bool]:
    """Whether `owner` runs now, and whether torch.utils.checkpoint runs a part of it: its second run would be a plain one."""
    checkpointed = False
    for frame in _frames():
        if _is_call(frame, owner) or frame.f_code.co_name.startswith("torch_dynamo_resume"):
            return True, checkpointed
        checkpointed = checkpointed or frame.f_code.co_filename == _CHECKPOINT
    return False, checkpointed


def _calls(owner: nn.Module) -> int:
    """How many calls of `owner` run now, one within the other."""
    return sum(_is_call(frame, owner) for frame in _frames())


def _is_call(frame: FrameType, owner: nn.Module) -> bool:
    return frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is owner


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
