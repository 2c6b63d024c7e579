"""Leaving the caller's model as it was."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anymask.surgery import copied


def masked_copy(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of `model`, without its wrapper and without gradients, its weights 0 where `kept` is False.

    Tied weights stay tied.
    """
    twin = copied(model)
    twin.zero_grad(set_to_none=True)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, keep in kept.items():
            parameters[name].masked_fill_(~keep.to(parameters[name].device), 0)
    return twin
