"""What oneDNN, with which PyTorch convolves on a CPU, does wrong."""

import torch
from torch import nn

_BLOCK = 16  # input channels that it takes at a time with AVX-512; 8 with AVX2


def overruns(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of `model`, by name, whose weight gradient is written past its memory when images come as channels_last.

    Those with a kernel of one pixel, a stride, and fewer than 16 input channels a group. Crashes, hangs and wrong gradients come of it,
    in PyTorch 2.14 and before: https://github.com/uxlfoundation/oneDNN/issues/6035.

    Example:
        >>> list(overruns(nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(4, 8, 3, stride=2))))
        ['0']
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return {
        name: layer
        for name, layer in layers.items()
        if layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels // layer.groups < _BLOCK
    }


def memory_format(model: nn.Module, *, device: str = "cpu") -> torch.memory_format:
    """How images lie in memory where `model` convolves them fastest: channels_last, unless it `overruns` then.

    Example:
        >>> memory_format(nn.Conv2d(16, 8, 1, stride=2)), memory_format(nn.Conv2d(4, 8, 1, stride=2))
        (torch.channels_last, torch.contiguous_format)
    """
    return torch.contiguous_format if device == "cpu" and overruns(model) else torch.channels_last
