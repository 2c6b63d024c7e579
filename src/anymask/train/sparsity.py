"""Whether a training runs on sparse layers, how it gets there, and how the model comes back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anymask.errors import SettingError
from anymask.kernels import available, why_not
from anymask.mask import Mask
from anymask.prunables import bare, compact
from anymask.registry import unknown
from anymask.sparse import to_dense, to_sparse

MODES = ("auto", "on", "off")


def sparse_possible(
    mode: str, *, device: str, precision: str, masked: bool = True, moves: bool = False, model: nn.Module | None = None
) -> bool:
    """Whether `mode` is not "off" and sparse layers can be trained: with a mask that stays, in float32, by native kernels on the CPU.

    Args:
        mode: "auto", "on" or "off".
        device, precision: of the training.
        masked, moves: whether there is a mask, and whether it is a moving one.
        model: dense, on its device; None where there is none yet.

    Raises:
        SettingError: for another mode, or for "on" where it cannot be.

    Example:
        >>> sparse_possible("off", device="cpu", precision="float32"), sparse_possible("auto", device="cuda", precision="float32")
        (False, False)
    """
    if mode not in MODES:
        raise unknown(mode, MODES, what="value of sparse:")
    if mode == "off":
        return False
    kinds = {p.dtype for p in model.parameters()} if model is not None else {torch.float32}
    hindrances = (
        (not masked, "without a mask", "a training with a mask", "give a mask"),
        (moves, "with a mask that moves", "a mask that stays", "take a mask that stays"),
        (device != "cpu", f"on {device}", "training on the CPU", "take device cpu"),
        (precision != "float32", f"with precision {precision}", "precision float32", "take that"),
        (kinds != {torch.float32}, f"with {', '.join(sorted(map(str, kinds)))}", "a model in float32", "call model.float()"),
        (model is not None and bare(model) is not model, "with a model inside a wrapper", "the bare model", "give that"),
        (not available(), "without native kernels", "a machine where they were built", why_not()),
    )
    for there, came, allowed, fix in hindrances:
        if there and mode == "on":
            raise SettingError(f"sparse='on' came {came}", allowed=allowed, fix=f"{fix}, or leave sparse at 'auto'")
        if there:
            return False
    return True


class SparseLayers:
    """The sparse layers of one training, of a model that was dense before and is dense again after `leave`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self._ours = not compact(model)  # a model that came sparse stays so
        self.count = len(compact(model))
        self.names: list[str] | None = None  # of the weights that were converted; None where that was not decided

    def enter(self, mask: Mask, example: Tensor, *, measure: bool, known: list[str] | None) -> list[str] | None:
        """Convert the layers of `mask` that are faster sparse, or all that can be if not `measure`; of `known` ones those.

        Args:
            mask: what is kept.
            example: a batch of the training's size, which decides what is faster.
            measure: ask what is faster.
            known: `names` of the training that goes on, which was measured then.

        Returns:
            `names` of this one.
        """
        if not self._ours:
            return self.names
        wanted = {name: mask[name] for name in mask if not measure or known is None or name in known}
        if wanted:
            to_sparse(self.model, Mask(wanted), example, optimizer=self.optimizer, measure=measure and known is None)
        self.names = list(compact(self.model))
        self.count = len(self.names)
        return self.names

    def leave(self) -> None:
        """Make the model dense; once is enough, and it may be at any moment."""
        if self._ours:
            to_dense(self.model, optimizer=self.optimizer)


def slots_stored(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of `optimizer` as that of the dense training: slots of sparse layers have the dense shape, learning rates are numbers.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> slots_stored(net, torch.optim.SGD(net.parameters(), lr=0.1))["state"]
        {}
    """
    stored = _converted(model, optimizer, optimizer.state_dict(), lambda layer, slot: layer.dense(slot))
    for group in stored["param_groups"]:  # as `rates_on_device` found them: the next part of a training may be on a CPU
        group |= {"lr": float(group["lr"])} | ({"capturable": False} if "capturable" in group else {})
    return stored


def slots_loaded(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load into `optimizer` what `slots_stored` gave, whichever layers of `model` were sparse then, and are now, and wherever it was."""
    loaded = _converted(model, optimizer, state, lambda layer, slot: layer.stored(slot))
    here = [{name: group[name] for name in ("fused", "foreach", "capturable") if name in group} for group in optimizer.param_groups]
    loaded["param_groups"] = [saved | now for saved, now in zip(loaded["param_groups"], here, strict=True)]  # steps made as this device can
    optimizer.load_state_dict(loaded)


@torch.no_grad()
def _converted(model: nn.Module, optimizer: Optimizer, state: dict[str, Any], change: Callable[[Any, Any], Any]) -> dict[str, Any]:
    layers = {id(layer.weight): layer for layer in compact(model).values()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # in the order of their numbers in a state dict
    slots = dict(state["state"])
    for number, parameter in enumerate(parameters):
        layer = layers.get(id(parameter))
        if layer is not None and number in slots:
            slots[number] = {name: change(layer, slot) for name, slot in slots[number].items()}
    return {**state, "state": slots}
