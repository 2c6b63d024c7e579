"""Networks for these tests, their norms as after a training."""

import numpy as np
import pytest
import torch
from torch import nn

from anymask import models
from anymask.shipping.fusing import fused
from anymask.shipping.plan import Plan
from anymask.shipping.tracing import plain, traced

both = pytest.mark.parametrize("portable", [False, True], ids=["native", "portable"])


def trained_like(model: nn.Module, *, density: float = 0.1, seed: int = 0) -> nn.Module:
    """`model` with random norms and with zeros in its weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.running_mean, module.bias):
                    if tensor is not None:
                        tensor.normal_(0, 0.3, generator=generator)
                for tensor in (module.running_var, module.weight):
                    if tensor is not None:
                        tensor.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                left = torch.rand(module.weight.shape, generator=generator) < density
                scale = left.numel() / max(1, int(left.sum()))
                module.weight.mul_(left * scale**0.5)
    return model.eval()


def network(name: str, *, density: float = 0.1) -> nn.Module:
    """A network of `anymask.models` for 10 classes, as after a training."""
    return trained_like(models.build(name, classes=10, seed=0), density=density)


def plan_of(model: nn.Module, example: torch.Tensor) -> Plan:
    """What would be shipped of it, in float32."""
    return fused(traced(plain(model), example))


def said(plan: Plan) -> list[str]:
    """The steps by name, with what a layer does besides."""
    names = []
    for step in plan.steps:
        extra = [name for name in ("bias", "add", "relu") if getattr(step.op, name, False)]
        names.append("+".join([type(step.op).__name__, *extra]))
    return names


def close(found: np.ndarray, wanted: torch.Tensor, *, within: float = 1e-5) -> bool:
    """Equal up to `within` of the largest number (or of 1)."""
    wanted_ = wanted.detach().numpy()
    off = np.abs(found - wanted_).max(initial=0)
    return found.shape == wanted_.shape and found.dtype == np.float32 and off <= within * max(1, np.abs(wanted_).max(initial=0))
