"""Ghost soft neurons: ReLU made smooth early in training, exact ReLU at the end."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymask.errors import SettingError
from anymask.registry import lookup
from anymask.techniques.base import AttachedGhosts, Context, Ghost, Technique, device_of

_CHILD = "ghost_activation"


def _swish(x: Tensor, beta: Tensor | float) -> Tensor:
    return x * torch.sigmoid(beta * x)


def _mish(x: Tensor, beta: Tensor | float) -> Tensor:
    return x * torch.tanh(F.softplus(beta * x))


SOFT = {"swish": _swish, "mish": _mish}
FADES = ("blend", "sharpen")


@dataclass(frozen=True)
class GhostActivation(Technique):
    r"""Each ReLU of the model becomes a soft activation that fades back to exact ReLU.

    With strength s falling from 1 to 0, each `nn.ReLU` (and `nn.ReLU6`, whose output stays capped at 6) gives

        blend:    s * soft(x) + (1 - s) * relu(x)
        sharpen:  soft(x) with beta / s in place of beta, which tends to relu(x)

    where soft is Swish, x * sigmoid(beta * x), or Mish, x * tanh(softplus(beta * x)). Units that a ReLU would silence
    pass gradients while s > 0. At s = 0 the output is relu(x), bit for bit, and then the hooks are gone.

    Args:
        soft: "swish" (arXiv 1710.05941) or "mish" (arXiv 1908.08681).
        beta: steepness, > 0; the larger the nearer to ReLU.
        fade: "blend" or "sharpen".

    Raises:
        TechniqueError: on attach, when the model has no ReLU module.

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
        relus = [m for m in context.model.modules() if isinstance(m, (nn.ReLU, nn.ReLU6))]
        if not relus:
            raise self.nothing("nn.ReLU or nn.ReLU6 modules", context.model, fix="write ReLUs as modules")
        ghosts = AttachedGhosts(child=_CHILD, found=f"{len(relus)} ReLU modules")
        for relu in relus:
            ghost = _SoftReLU(self, device=device_of(context.model), cap=6.0 if isinstance(relu, nn.ReLU6) else None)
            # A hook on the output needs the input as it was, which an in-place ReLU would overwrite.
            handles: list[Any] = [_OutOfPlace(relu), relu.register_forward_hook(ghost.soften)]
            ghosts.add(relu, ghost, handles)
        return ghosts


class _OutOfPlace:
    """A ReLU that works out of place until `remove`."""

    def __init__(self, relu: nn.Module) -> None:
        self.relu, self.was = relu, relu.inplace
        relu.inplace = False  # type: ignore[assignment]

    def remove(self) -> None:
        self.relu.inplace = self.was


class _SoftReLU(Ghost):
    def __init__(self, settings: GhostActivation, *, device: torch.device, cap: float | None) -> None:
        super().__init__(device)
        self.soft, self.beta, self.fade, self.cap = SOFT[settings.soft], settings.beta, settings.fade, cap
        self.silu = settings.soft == "swish" and settings.beta == 1.0 and settings.fade == "blend"

    def soften(self, _relu: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x, strength = args[0], self.strength
        if self.fade == "sharpen":
            # No 1/0: below 1e-6 the swish is ReLU to float32 precision for |x| > 1e-4, and at 0 exactly ReLU is taken.
            soft = self.soft(x, (self.beta / strength.clamp(min=1e-6)).to(x.dtype))
            return torch.where(strength > 0, self._capped(soft), out)
        soft = F.silu(x) if self.silu else self.soft(x, self.beta)  # silu: one fused pass instead of three
        return torch.lerp(out, self._capped(soft), strength.to(out.dtype))

    def _capped(self, soft: Tensor) -> Tensor:
        return soft if self.cap is None else soft.clamp(max=self.cap)
