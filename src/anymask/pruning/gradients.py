"""The gradients at all places, pruned ones too, that nobody else gets to see while a mask is held."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymask.ranks import mean_over_ranks, on_any_rank


class DenseGradients:
    """Sums up the gradients that reach `parameters`, before they are masked, clipped or reduced, from now on until `remove`.

    A sum begins anew where the next gradient finds None, or 0 although the sum is not 0 where `kept`: after `zero_grad`, so that what a
    training threw away (a step that `GradScaler` skipped) is not counted. The sums hold one more gradient in memory, for as long as this
    listens.

    Args:
        parameters: by name; those that are frozen when a gradient comes give none.
        kept: by name, of `Hold`: where gradients are not masked.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> heard = DenseGradients({"w": weight}, {"w": torch.tensor([True, False])})
        >>> for x in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])):
        ...     (weight * x).sum().backward()
        >>> heard.mean()["w"].tolist()
        [4.0, 6.0]
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        self._parameters, self._kept = parameters, kept
        self._sums: dict[str, Tensor] = {}
        self._handles = [self._listen(name, parameter) for name, parameter in parameters.items()]

    def mean(self) -> dict[str, Tensor]:
        """The sums by name, averaged over the ranks of torch.distributed; without those that got no gradient on any rank."""
        if not self._parameters:
            return {}
        device = next(iter(self._parameters.values())).device
        found = on_any_rank([name in self._sums for name in self._parameters], device=device)
        names = [name for name, there in zip(self._parameters, found, strict=True) if there]
        return {name: mean_over_ranks(self._sums.get(name, _nothing_like(self._parameters[name]))) for name in names}

    def remove(self) -> None:
        """Listen no more, and forget the sums."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums = [], {}

    def _listen(self, name: str, parameter: torch.nn.Parameter) -> Any:
        trains = parameter.requires_grad
        handle = parameter.requires_grad_(True).register_hook(partial(self._add, name))  # refused on a frozen one
        parameter.requires_grad_(trains)  # which may be thawed before the gradient comes
        return handle

    def _add(self, name: str, gradient: Tensor) -> None:
        # Called before the gradient is accumulated: .grad still holds what was there before.
        gradient = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
        total = self._sums.get(name)
        if total is None or self._thrown_away(total, self._parameters[name].grad, self._kept[name]):
            total = _nothing_like(gradient)
        self._sums[name] = total.add_(gradient)

    @staticmethod
    def _thrown_away(total: Tensor, gradient: Tensor | None, kept: Tensor) -> bool:
        if gradient is None:
            return True
        zero = not bool((gradient.coalesce().values() if gradient.is_sparse else gradient).any())
        return zero and bool(total[kept.to(total.device)].any())


def _nothing_like(tensor: Tensor) -> Tensor:
    """Zeros of its shape, contiguous, in float32 or what is wider."""
    return torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
