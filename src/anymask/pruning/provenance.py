"""What a mask remembers of the network and the versions that it was made with."""

import hashlib
from typing import Any

import torch
from torch import nn

from anymask.version import __version__


def made_with(model: nn.Module) -> dict[str, Any]:
    """Plain values for `mask.info`: "model" (class, parameters, a hash of names and shapes, a hash of the weights) and "versions".

    Two models with equal "structure" take the same masks; with equal "weights", too, the mask was made on these very weights.

    Example:
        >>> made_with(nn.Linear(2, 3))["model"]["class"]
        'Linear'
    """
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        structure.update(f"{name} {tuple(parameter.shape)}\n".encode())
        weights.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    count = sum(p.numel() for p in model.parameters())
    about = {
        "class": type(model).__name__,
        "parameters": count,
        "structure": structure.hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
    }
    return {"model": about, "versions": {"anymask": __version__, "torch": str(torch.__version__)}}
