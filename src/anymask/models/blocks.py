"""The blocks that every model is made of: a row of convolutions with batch norm, and a sum with a shortcut.

Each activation is a module of its own (a technique can replace it, a hook can read its input), none works in place.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Block = Callable[[int, int, int], nn.Module]  # (channels in, channels out, stride) -> module


@dataclass(frozen=True)
class Conv:
    """One convolution of a stack: channels out, kernel size, stride and groups; padded to keep the size at stride 1."""

    outputs: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1


def stack(inputs: int, convs: Sequence[Conv], *, act: type[nn.Module] = nn.ReLU, last: bool = True) -> nn.Sequential:
    """Convolution, batch norm and activation for each of `convs`; `last=False` leaves the last activation out.

    Example:
        >>> [name for name, _ in stack(3, [Conv(8), Conv(8)], last=False).named_children()]
        ['conv1', 'bn1', 'relu1', 'conv2', 'bn2']
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, conv in enumerate(convs, start=1):
        layers[f"conv{i}"] = nn.Conv2d(
            inputs, conv.outputs, conv.kernel, stride=conv.stride, padding=conv.kernel // 2, groups=conv.groups, bias=False
        )
        layers[f"bn{i}"] = nn.BatchNorm2d(conv.outputs)
        layers[f"relu{i}"] = act()
        inputs = conv.outputs
    if not last:
        layers.popitem()
    return nn.Sequential(layers)


class Residual(nn.Module):
    """`act(body(x) + shortcut(x))`, with x of shape (N, C, H, W)."""

    anymask_sum = True  # what forward does is what the line above says: sparse layers may do it in one go

    def __init__(self, body: nn.Module, shortcut: nn.Module, *, act: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


# -- shortcuts where the shape changes -----------------------------------------------------------------------------
def project(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Option B of He et al. 2015: a 1x1 convolution and batch norm."""
    return stack(inputs, [Conv(outputs, kernel=1, stride=stride)], last=False)


def pad(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Option A of He et al. 2015, no parameters: every `stride`-th pixel, and zeros for the channels that are new, half on each side."""
    before = (outputs - inputs) // 2
    # A pool over one pixel is plain subsampling; the "depth" that ZeroPad3d pads is the channels of (N, C, H, W).
    return nn.Sequential(nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, before, outputs - inputs - before)))


def _shortcut(inputs: int, outputs: int, stride: int, *, change: Block) -> nn.Module:
    return nn.Identity() if stride == 1 and inputs == outputs else change(inputs, outputs, stride)


# -- blocks --------------------------------------------------------------------------------------------------------
def plain(inputs: int, outputs: int, stride: int) -> nn.Module:
    """VGG: one 3x3 convolution, after a max-pool where the stride is not 1 (arXiv 1409.1556)."""
    layer = stack(inputs, [Conv(outputs)])
    # ceil_mode changes nothing at 32 or 64 pixels; at 28 it keeps the edge of a 7x7 map, as a convolution of stride 2 does
    return layer if stride == 1 else nn.Sequential(nn.MaxPool2d(stride, ceil_mode=True), layer)


def basic(inputs: int, outputs: int, stride: int, *, change: Block = project) -> nn.Module:
    """ResNet's block of two 3x3 convolutions (arXiv 1512.03385); `change` is the shortcut where the shape changes."""
    body = stack(inputs, [Conv(outputs, stride=stride), Conv(outputs)], last=False)
    return Residual(body, _shortcut(inputs, outputs, stride, change=change), act=nn.ReLU())


def bottleneck(inputs: int, outputs: int, stride: int) -> nn.Module:
    """ResNet's 1x1, 3x3, 1x1 block, a quarter as wide inside. Differs from the paper: the stride is on the 3x3, as in torchvision."""
    inner = max(1, outputs // 4)
    body = stack(inputs, [Conv(inner, kernel=1), Conv(inner, stride=stride), Conv(outputs, kernel=1)], last=False)
    return Residual(body, _shortcut(inputs, outputs, stride, change=project), act=nn.ReLU())


def separable(inputs: int, outputs: int, stride: int) -> nn.Module:
    """MobileNet's block: a 3x3 convolution of each channel alone, then a 1x1 (arXiv 1704.04861)."""
    return stack(inputs, [Conv(inputs, stride=stride, groups=inputs), Conv(outputs, kernel=1)])


def inverted(inputs: int, outputs: int, stride: int, *, expansion: int = 6) -> nn.Module:
    """MobileNetV2's block, `expansion` times as wide inside, linear at its end, no shortcut at stride 2 (arXiv 1801.04381).

    Differs from the paper: at stride 1 a change of width has a 1x1 shortcut, as in kuangliu/pytorch-cifar.
    """
    inner = inputs * expansion
    convs = [Conv(inner, kernel=1), Conv(inner, stride=stride, groups=inner), Conv(outputs, kernel=1)]
    body = stack(inputs, convs, act=nn.ReLU6, last=False)
    return body if stride != 1 else Residual(body, _shortcut(inputs, outputs, stride, change=project), act=nn.Identity())
