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


def _dilates_nothing(model: nn.Module) -> bool:
    """Whether a convolution dilates a side of its kernel that is 1: some of these end the process when images come as channels_last."""
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    return any(k == 1 != d for layer in layers for k, d in zip(layer.kernel_size, layer.dilation, strict=True))


def memory_format(model: nn.Module, *, device: str = "cpu") -> torch.memory_format:
    """How images lie in memory where `model` convolves them fastest: channels_last, unless oneDNN fails then.

    Example:
        >>> memory_format(nn.Conv2d(16, 8, 1, stride=2)), memory_format(nn.Conv2d(4, 8, 1, stride=2))
        (torch.channels_last, torch.contiguous_format)
    """
    fails = device == "cpu" and (overruns(model) or _dilates_nothing(model))
    return torch.contiguous_format if fails else torch.channels_last
