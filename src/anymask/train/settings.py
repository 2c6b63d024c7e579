"""How a network is trained: the protocol."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from anymask.durations import Duration
from anymask.errors import SettingError
from anymask.pauses import arrive, pause
from anymask.prunables import compact
from anymask.registry import lookup
from anymask.surgery import evaluating

OPTIMIZERS = ("sgd", "adamw")
_LARGE = 0.1  # the default, for SGD; at 0.03 AdamW was behind already (results/adamw-rates)
SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")


def with_momentum(optimizer: SGD) -> SGD:
    """`optimizer` with momentum of 0 from the start, which gives the same steps.

    A fused SGD fails where some weights of a group have none yet, because their first gradient comes after that of others.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@dataclass(frozen=True)
class Protocol:
    """The settings of one training, apart from data, model, mask, recipe and seed."""

    epochs: int = 12
    """Passes over the training images, >= 1."""
    batch_size: int = 128
    """Images in a batch, >= 1."""
    optimizer: str = "sgd"
    """sgd or adamw."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    nesterov: bool = True
    """Nesterov's form of it."""
    lr: float = 0.1
    """Peak learning rate, > 0."""
    schedule: str = "cosine"
    """Learning rate over time: cosine (to 0), step (x0.1 at each of the drops), constant."""
    drops: tuple[str, ...] = ("50%", "75%")
    """When step lowers it: 90ep, or 75% of what follows the warmup."""
    warmup: str = "0%"
    """How long the learning rate rises linearly from 0, such as 5% or 1ep."""
    weight_decay: float = 5e-4
    """Weight decay of convolution and linear weights, >= 0."""
    clip: float = 0.0
    """Largest gradient norm; 0 for none."""
    accumulate: int = 1
    """Batches whose gradients are added up for one optimiser step, >= 1."""
    precision: str = "float32"
    """float32, or bfloat16 / float16 for mixed precision."""
    augment: bool = True
    """Random crops (4 pixels of padding) and flips of the training images."""

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(OPTIMIZERS), self.optimizer, what="optimizer")
        lookup(dict.fromkeys(SCHEDULES), self.schedule, what="learning-rate schedule")
        lookup(dict.fromkeys(PRECISIONS), self.precision, what="precision")
        Duration.parse(self.warmup)
        for name, least in {"epochs": 1, "batch_size": 1, "accumulate": 1, "weight_decay": 0, "clip": 0}.items():
            value = getattr(self, name)
            if not least <= value < math.inf:  # a ledger takes no infinity
                fix = f"set {name} higher" if not value >= least else f"set {name} lower" + (", or 0 for none" if name == "clip" else "")
                raise SettingError(f"{name} came as {value}", allowed=f"a number >= {least}", fix=fix)
        if not 0 < self.lr < math.inf:
            raise SettingError(f"lr came as {self.lr}", allowed="a number > 0", fix="0.1 suits SGD, 0.001 AdamW")
        if not 0 <= self.momentum < 1:
            raise SettingError(f"momentum came as {self.momentum}", allowed="a number in [0, 1)", fix="0.9 is usual")
        for drop in map(Duration.parse, self.drops):
            end = {"ep": self.epochs, "%": 100}.get(drop.unit, math.inf)
            if self.schedule == "step" and drop.amount >= end:  # what does nothing says so
                raise SettingError(
                    f"drops came with {drop} and epochs as {self.epochs}",
                    allowed="drops before the end of the training",
                    fix="give drops as shares, such as 50% and 75%, where a protocol is shortened",
                )

    def plain(self) -> dict[str, Any]:
        """These settings as plain values, for the ledger: the ids of runs are made from them.

        Settings that came after the first ledgers are left out where they are as those had them, or decide nothing, so that the
        same training has the same id as ever.

        Example:
            >>> Protocol(schedule="step", drops=("90ep", "135ep"), epochs=182).plain()["drops"]
            ['90ep', '135ep']
            >>> "drops" in Protocol().plain()
            False
        """
        decides = {"drops": self.schedule == "step", "momentum": self.optimizer == "sgd", "nesterov": self.optimizer == "sgd"}
        kept = [f.name for f in fields(self) if f.name not in decides or (decides[f.name] and getattr(self, f.name) != f.default)]
        plain: dict[str, Any] = {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in kept}
        return {name: float(value) if name in _FLOATS else value for name, value in plain.items()}  # lr=1 is lr=1.0

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimiser for `model`; biases and norms are not decayed."""
        vectors = {id(layer.weight) for layer in compact(model).values()}  # weights, though they are stored as vectors
        decayed = [p for p in model.parameters() if p.ndim > 1 or id(p) in vectors]
        others = [p for p in model.parameters() if p.ndim <= 1 and id(p) not in vectors]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        # One kernel for all weights. Not with GradScaler: fused optimisers skip a step without their hooks knowing of it.
        fused = all(p.is_cuda for p in model.parameters()) and self.precision != "float16"
        if self.optimizer == "adamw":
            if self.lr >= _LARGE:
                warnings.warn(f"AdamW came with lr={self.lr:g}, which suits SGD: 0.001 to 0.01 is what AdamW likes", stacklevel=2)
            return AdamW(groups, lr=self.lr, fused=fused or None)
        made = SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov and self.momentum > 0, fused=fused or None)
        return with_momentum(made) if fused and self.momentum else made

    def lr_at(self, step: int, *, total: int, per_epoch: int) -> float:
        """The learning rate of optimiser step number `step` (from 0) of `total`."""
        warmup = Duration.parse(self.warmup).steps(total=total, per_epoch=per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "step":
            return self.lr * 0.1 ** sum(_reached(drop, step=step, done=done, total=total, per_epoch=per_epoch) for drop in self.drops)
        return self.lr


_FLOATS = frozenset(field.name for field in fields(Protocol) if isinstance(field.default, float))


def _reached(drop: str, *, step: int, done: float, total: int, per_epoch: int) -> bool:
    """Whether `drop` has come: a share counts what follows the warmup, `done` of it, and the others count from the first step."""
    when = Duration.parse(drop)
    return done >= when.amount / 100 if when.unit == "%" else step >= when.steps(total=total, per_epoch=per_epoch)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group of `optimizer` the learning rate `lr`; where one is a tensor, in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype for autocast, or None for plain float32."""
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def accuracy(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of images, in [0, 1], whose class `model` gives the largest logit, in eval mode."""
    return share_right(*count_right(model, batches))


def count_right(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int]:
    """How many images `model` gives the right class, in eval mode, and how many there are."""
    right, total = torch.zeros((), dtype=torch.int64), 0
    with torch.no_grad(), evaluating(model):
        for x, y in batches:
            right = right.to(y.device) + (model(x).argmax(1) == y).sum()  # stays on the device: one synchronisation in all
            total += len(y)
            pause()
    arrive()
    return int(right), total


def share_right(right: int, total: int) -> float:
    """`right` of `total` images as a share.

    Raises:
        SettingError: for no image at all.
    """
    if total == 0:
        raise SettingError("no batch to evaluate on", allowed="at least one image", fix="check the data split")
    return right / total
