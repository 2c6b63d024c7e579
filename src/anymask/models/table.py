"""The table of models, each in its CIFAR form: no early downsampling, global average pool, one linear layer."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

from torch import nn

from anymask.errors import UnknownName
from anymask.models.blocks import Block, Conv, basic, bottleneck, inverted, pad, plain, separable, stack


@dataclass(frozen=True)
class Model:
    """What a model is made of.

    Args:
        about: one line for `anymask list`.
        block: makes each block.
        stages: (channels, blocks, stride of the first block) for each stage.
        stem: (channels, stride) of the 3x3 convolution before the stages; None where there is none.
        first: makes the blocks of the first stage, where they differ.
        last: channels of a 1x1 convolution after the stages; 0 for none.
        act: the activation of stem and last.
    """

    about: str
    block: Block
    stages: tuple[tuple[int, int, int], ...]
    stem: tuple[int, int] | None = None
    first: Block | None = None
    last: int = 0
    act: type[nn.Module] = nn.ReLU

    def make(self, *, channels: int, classes: int, width: float = 1.0) -> nn.Sequential:
        """The network, its number of channels times `width` everywhere, for images (N, `channels`, H, W)."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if self.stem:
            outputs = _scaled(self.stem[0], width)
            layers["stem"] = stack(channels, [Conv(outputs, stride=self.stem[1])], act=self.act)
            channels = outputs
        for i, (outputs, blocks, stride) in enumerate(self.stages, start=1):
            block = self.first if self.first and i == 1 else self.block
            layers[f"layer{i}"] = _stage(block, channels, _scaled(outputs, width), blocks=blocks, stride=stride)
            channels = _scaled(outputs, width)
        if self.last:
            layers["last"] = stack(channels, [Conv(_scaled(self.last, width), kernel=1)], act=self.act)
            channels = _scaled(self.last, width)
        layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, classes))
        return nn.Sequential(layers)


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _stage(block: Block, inputs: int, outputs: int, *, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(blocks - 1)))


def resnet(depth: int) -> Model:
    """ResNet-`depth` for CIFAR, depth = 6n + 2: three stages of n basic blocks, 16, 32 and 64 channels (arXiv 1512.03385).

    Shortcuts are the paper's option A, so that the sizes are the published ones (ResNet-20 0.27M ... ResNet-110 1.7M) and the
    convolutions and the linear layer are `depth` in number. The code of SynFlow and of ToST has 1x1 convolutions there (option B),
    and ToST's has bottleneck blocks from depth 54 on, which makes 155 layers of "104".

    Raises:
        UnknownName: where depth is not 6n + 2, n >= 1.
    """
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        near = 6 * max(1, n) + 2
        raise UnknownName(
            f"unknown model 'resnet{depth}'",
            allowed="resnet18, resnet34, resnet50, and resnetN with N = 6n + 2: 8, 14, 20, 26, 32 and so on",
            fix=f"choose resnet{near} or resnet{near + 6}",
        )
    about = "three stages of 16, 32, 64 channels, zero-padded shortcuts (He et al. 2015); any resnetN with N = 6n + 2"
    return Model(about, partial(basic, change=pad), stages=((16, n, 1), (32, n, 2), (64, n, 2)), stem=(16, 1))


def _imagenet(block: Block, width: int, blocks: tuple[int, ...]) -> Model:
    stages = tuple((width * 2**i, n, 1 if i == 0 else 2) for i, n in enumerate(blocks))
    return Model("four stages, as for ImageNet, with a 3x3 stem and no max-pool (He et al. 2015)", block, stages=stages, stem=(64, 1))


def _vgg(*blocks: int) -> Model:
    # Four max-pools and a global average in place of the fifth, as in GraSP, SynFlow and ToST: with five, 28 pixels would end as none.
    stages = tuple(zip((64, 128, 256, 512, 512), blocks, (1, 2, 2, 2, 2), strict=True))
    return Model("batch norm and one linear layer, as in GraSP and SynFlow (Simonyan and Zisserman 2014)", plain, stages=stages)


MODELS: dict[str, Model] = {
    "demonet": Model(
        "small and fast at 28 pixels: few operations, most weights in wide late stages",
        basic,
        stages=((24, 1, 2), (64, 1, 2), (192, 1, 2)),
        stem=(16, 2),
    ),
    "resnet18": _imagenet(basic, 64, (2, 2, 2, 2)),
    "resnet34": _imagenet(basic, 64, (3, 4, 6, 3)),
    "resnet50": _imagenet(bottleneck, 256, (3, 4, 6, 3)),
    "resnet20": resnet(20),
    "resnet32": resnet(32),
    "resnet44": resnet(44),
    "resnet56": resnet(56),
    "resnet104": resnet(104),
    "resnet110": resnet(110),
    "vgg11": _vgg(1, 1, 2, 2, 2),
    "vgg13": _vgg(2, 2, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg19": _vgg(2, 2, 4, 4, 4),
    "mobilenet": Model(
        "depthwise separable convolutions, downsampling 16 times (Howard et al. 2017)",
        separable,
        stages=((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2)),
        stem=(32, 1),
    ),
    "mobilenetv2": Model(
        "inverted residuals, downsampling 8 times (Sandler et al. 2018)",
        inverted,
        stages=((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)),
        stem=(32, 1),
        first=partial(inverted, expansion=1),
        last=1280,
        act=nn.ReLU6,
    ),
}
