"""Ghost skip connections: extra shortcuts around layers and their norms early in training, gone at the end."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.dataflow import Unit, units
from anymask.errors import SettingError, TechniqueError
from anymask.ranks import together
from anymask.registry import lookup
from anymask.surgery import Cost, device_of
from anymask.techniques.base import AttachedGhosts, Context, Ghost, Technique

_CHILD = "ghost_skip"
KINDS = ("free", "learned")
WHERE = ("auto", "spatial", "all")


@dataclass(frozen=True)
class GhostSkip(Technique):
    r"""Each unit of a layer and its norm gets an extra shortcut that fades to nothing.

    With strength s falling from 1 to 0, a unit y = norm(layer(x)), or y = layer(activation(norm(x))), gives

        y + s * scale * skip(x)

    where skip is parameter-free (identity; average pooling where the map shrinks; zero channels appended where
    channels grow, groups of channels averaged where they shrink) or learned (1x1 convolution + batch norm). At s = 0
    the output is y, bit for bit; then the branch, its weights and its buffers are gone.

    Learned weights join the optimiser (in the group that holds the layer's weight) and leave it at the end. They
    are never masked: `added` says what they cost while they exist.

    Args:
        kind: "free" or "learned".
        scale: factor of the branch at full strength, > 0.
        where: "spatial" (convolutions with a kernel larger than 1), "all" (linear layers, too), or "auto": the spatial ones,
            and all in a network that has none. The unit that takes the model's input and units whose input cannot be
            brought to the output's shape are left out.

    Raises:
        TechniqueError: on attach, when there is no such unit, no example, or (learned) no optimiser.

    Example:
        >>> import torch
        >>> from anymask.techniques import Context
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4))
        >>> x = torch.randn(2, 1, 8, 8)
        >>> ghost = GhostSkip().attach(Context(net, None, torch.nn.functional.cross_entropy, example=x))
        >>> ghost.found
        '1 conv + norm units'

    Reference: ToST (arXiv 2206.12755). Differs from the authors' code: there the branch is never removed, never counted,
    and starts at full strength because its batch norm undoes the 1e-4 of its weights; here the factor comes after the
    norm and ends at exactly 0.
    """

    name: ClassVar[str] = "ghost_skip"
    seam: ClassVar[str] = "model"
    about: ClassVar[str] = "extra shortcuts around conv + norm units early in training"
    paper: ClassVar[str] = "arXiv 2206.12755"

    kind: str = "free"
    scale: float = 1.0
    where: str = "auto"

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(KINDS), self.kind, what="kind of ghost skip")
        lookup(dict.fromkeys(WHERE), self.where, what="place of ghost skips")
        if not self.scale > 0:
            raise SettingError(f"scale came as {self.scale}", allowed="a number > 0", fix="1.0 is the full branch")

    def attach(self, context: Context) -> AttachedGhosts:
        chosen = self._chosen(units(context.model, context.needs_example(self.name)))
        if not chosen:
            raise self.nothing(
                "convolutions or linear layers that go with a norm (norms may come before or after)", context.model, fix='try where="all"'
            )
        made = _make(chosen, self, context)
        added = sum((_cost(unit, ghost) for unit, ghost in made), Cost())
        counts = Counter(unit.kind for unit, _ in made)
        found = ", ".join(f"{count} {kind} units" for kind, count in counts.items())
        ghosts = AttachedGhosts(context.model, child=_CHILD, found=found, added=added)
        for unit, ghost in made:
            handles: list[Any] = [_Joined(context.optimizer, unit.layer, ghost)] if self.kind == "learned" else []
            handles.append(unit.entry.register_forward_pre_hook(ghost.enter, with_kwargs=True))
            handles.append(unit.exit.register_forward_hook(ghost.leave))
            ghosts.add(ghost, handles)
        return ghosts

    def _chosen(self, found: list[Unit]) -> list[Unit]:
        fit = [unit for unit in found if not unit.stem]
        spatial = [unit for unit in fit if unit.spatial]
        return fit if self.where == "all" or (self.where == "auto" and not spatial) else spatial


def _make(chosen: list[Unit], settings: GhostSkip, context: Context) -> list[tuple[Unit, "_Skip"]]:
    if settings.kind == "learned" and context.optimizer is None:
        raise TechniqueError(
            "learned ghost skips got no optimizer", allowed="an optimizer that they can join", fix="pass optimizer=, or use kind='free'"
        )
    if settings.kind == "learned" and together():
        raise TechniqueError(
            "learned ghost skips on several ranks, whose gradients nobody would average (they are hidden from parameters())",
            allowed="learned ghost skips in one process",
            fix='use kind="free"',
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(context.seed)  # torch.manual_seed would seed every GPU's, too
        return [(unit, _Skip(settings, unit, device=device_of(context.model))) for unit in chosen]


class _Skip(Ghost):
    entered: Tensor | None = None

    def __init__(self, settings: GhostSkip, unit: Unit, *, device: torch.device) -> None:
        super().__init__(device)
        self.scale, self.size, self.channels = settings.scale, unit.output_shape[2:], unit.output_shape[1]
        self.entry_dim, self.exit_dim = unit.entry_dim, unit.exit_dim
        self.branch: nn.Module | None = None
        if settings.kind == "learned":
            self.branch = _learned(unit.input_shape[1], self.channels, dims=len(self.size))
            self.branch.to(device, next(unit.layer.parameters()).dtype)

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.gone:
            self.entered = args[0] if args else next(iter(kwargs.values()))

    def leave(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        x, self.entered = self.entered, None  # not kept: the graph would outlive the step
        if x is None:
            return out
        skip = _shrink(x.movedim(self.entry_dim, 1), out.movedim(self.exit_dim, 1).shape[2:])
        skip = _match_channels(skip, self.channels) if self.branch is None else self.branch(skip)
        return out + skip.movedim(1, self.exit_dim) * (self.strength * self.scale).to(out.dtype)


def _learned(inputs: int, outputs: int, *, dims: int) -> nn.Sequential:
    if dims == 0:
        layer: nn.Module = nn.Linear(inputs, outputs, bias=False)
        norm: nn.Module = nn.LayerNorm(outputs)
    else:
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](inputs, outputs, 1, bias=False)
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](outputs)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    return nn.Sequential(layer, norm)


def _shrink(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if x.shape[2:] == torch.Size(size):
        return x
    if len(size) == 2 and torch.are_deterministic_algorithms_enabled() and not any(a % b for a, b in zip(x.shape[2:], size, strict=True)):
        return F.avg_pool2d(x, [a // b for a, b in zip(x.shape[2:], size, strict=True)])  # CUDA has no deterministic backward of the others
    pools: tuple[Any, ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    return pools[len(size) - 1](x, size)


def _match_channels(x: Tensor, channels: int) -> Tensor:
    """`x` (N, C, ...) with `channels` channels: zeros appended, or neighbours averaged."""
    if x.shape[1] < channels:
        return F.pad(x, [0, 0] * (x.ndim - 2) + [0, channels - x.shape[1]])
    if x.shape[1] > channels:
        groups = -(-x.shape[1] // channels)
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, groups * channels - x.shape[1]])
        return x.unflatten(1, (channels, groups)).mean(2)
    return x


def _cost(unit: Unit, ghost: _Skip) -> Cost:
    places = math.prod(unit.output_shape[2:])
    multiply_adds = unit.input_shape[1] if ghost.branch is not None else 1
    return Cost(sum(p.numel() for p in ghost.parameters()), 2 * multiply_adds * places * unit.output_shape[1])


class _Joined:
    """Ghost weights as guests of the optimiser, in the group of their unit's layer, until `remove`.

    A group of their own would not be known to a learning-rate scheduler that was made before.
    """

    def __init__(self, optimizer: Optimizer | None, layer: nn.Module, ghost: nn.Module) -> None:
        assert optimizer is not None  # _make raised before
        self.optimizer, self.guests = optimizer, list(ghost.parameters())
        self.group = next(
            (g for g in optimizer.param_groups if any(p is layer.weight for p in g["params"])),
            optimizer.param_groups[0],
        )
        if any("momentum_buffer" in optimizer.state.get(p, {}) for p in self.group["params"]):
            for guest in self.guests:  # a fused SGD wants momentum of all in a group, or of none
                optimizer.state[guest]["momentum_buffer"] = torch.zeros_like(guest)
        self.group["params"].extend(self.guests)
        if "param_names" in self.group:
            self.group["param_names"].extend(f"{_CHILD}.{id(ghost)}.{i}" for i in range(len(self.guests)))
        # `model.zero_grad()` does not know them (see Haunted).
        self.handle = optimizer.register_step_post_hook(self._forget_gradients)

    def _forget_gradients(self, *_: Any) -> None:
        for guest in self.guests:
            guest.grad = None

    def remove(self) -> None:
        self.handle.remove()
        gone = {id(p) for p in self.guests}
        stay = [i for i, p in enumerate(self.group["params"]) if id(p) not in gone]
        for key in ("params", "param_names"):
            if key in self.group:
                self.group[key][:] = [self.group[key][i] for i in stay]
        for guest in self.guests:
            self.optimizer.state.pop(guest, None)
