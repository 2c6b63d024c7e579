"""Networks that nobody here wrote, built from their configs: timm, torchvision, transformers. No weights are downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Network:
    """One network and an input for it."""

    name: str
    family: str
    source: str  # "timm", "torchvision" or "transformers"
    size: int = 64  # pixels of an image, or tokens of a text
    options: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        """The network, randomly initialised, with 10 classes."""
        return _BUILD[self.source](self)

    def example(self, batch: int) -> Any:
        """A batch of inputs: images (N, 3, H, W), or keyword inputs for transformers."""
        if self.source != "transformers":
            return torch.randn(batch, 3, self.size, self.size)
        if self.name in TEXT:
            return {"input_ids": torch.randint(3, 90, (batch, self.size))}
        return {"pixel_values": torch.randn(batch, 3, self.size, self.size)}


def without_torchvisions_operators() -> None:
    """Let `import torchvision` work beside the CPU build of torch, where the wheel's own operators do not load."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # the definitions live as long as this object


def _timm(network: Network) -> nn.Module:
    import timm

    return timm.create_model(network.name, pretrained=False, num_classes=10, **dict(network.options))


def _torchvision(network: Network) -> nn.Module:
    from torchvision import models

    return getattr(models, network.name)(weights=None, num_classes=10, **dict(network.options))


def _transformers(network: Network) -> nn.Module:
    import transformers

    kind = getattr(transformers, network.name)
    return kind(kind.config_class(num_labels=10, **dict(network.options)))


_BUILD: dict[str, Callable[[Network], nn.Module]] = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}

_IMAGES = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_WORDS = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
_DISTIL = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}


def _hf(name: str, family: str, size: int, options: dict[str, Any]) -> Network:
    return Network(name, family, "transformers", size, tuple(options.items()))


def _sized(name: str, family: str, size: int = 64) -> Network:
    return Network(name, family, "timm", size, (("img_size", size),))


NETWORKS = (
    Network("resnet10t", "ResNet", "timm"),
    Network("resnet18", "ResNet", "torchvision"),
    Network("resnetv2_50", "ResNet, pre-activation", "timm"),
    Network("resnext50_32x4d", "ResNeXt", "timm"),
    Network("legacy_seresnet18", "SE-ResNet", "timm"),
    Network("skresnet18", "SK-ResNet", "timm"),
    Network("resnest14d", "ResNeSt", "timm"),
    Network("res2net50_26w_4s", "Res2Net", "timm"),
    Network("nf_resnet50", "ResNet without norms", "timm"),
    Network("cspresnet50", "CSPNet", "timm"),
    Network("densenet121", "DenseNet", "timm"),
    Network("alexnet", "AlexNet", "torchvision"),
    Network("vgg11", "VGG", "torchvision"),
    Network("repvgg_a0", "RepVGG", "timm"),
    Network("squeezenet1_1", "SqueezeNet", "torchvision"),
    Network("googlenet", "Inception", "torchvision", options=(("aux_logits", False), ("init_weights", False))),
    Network("inception_v3", "Inception", "timm", 96),
    Network("inception_v4", "Inception", "timm", 96),
    Network("xception41", "Xception", "timm", 96),
    Network("shufflenet_v2_x0_5", "ShuffleNet", "torchvision"),
    Network("mobilenetv1_100", "MobileNet v1", "timm"),
    Network("mobilenetv2_050", "MobileNet v2", "timm"),
    Network("mobilenetv3_small_050", "MobileNet v3", "timm"),
    Network("mnasnet_050", "MnasNet", "timm"),
    Network("efficientnet_b0", "EfficientNet", "timm"),
    Network("lcnet_050", "LCNet", "timm"),
    Network("ghostnet_050", "GhostNet", "timm"),
    Network("rexnet_100", "ReXNet", "timm"),
    Network("regnetx_002", "RegNet", "timm"),
    Network("regnety_002", "RegNet", "timm"),
    Network("hrnet_w18_small", "HRNet", "timm"),
    Network("dla34", "DLA", "timm"),
    Network("dpn68", "DPN", "timm"),
    Network("vovnet39a", "VoVNet", "timm"),
    Network("convnext_atto", "ConvNeXt", "timm"),
    Network("convnextv2_atto", "ConvNeXt", "timm"),
    Network("poolformer_s12", "PoolFormer", "timm"),
    Network("mobilevit_xxs", "MobileViT", "timm"),
    Network("edgenext_xx_small", "EdgeNeXt", "timm"),
    Network("levit_128s", "LeViT", "timm", 224),
    _sized("mixer_s32_224", "MLP-Mixer"),
    _sized("resmlp_12_224", "ResMLP"),
    _sized("gmlp_ti16_224", "gMLP"),
    _sized("vit_tiny_patch16_224", "ViT"),
    _sized("deit_tiny_distilled_patch16_224", "DeiT"),
    _sized("cait_xxs24_224", "CaiT"),
    _sized("swin_tiny_patch4_window7_224", "Swin", 56),
    _hf("ViTForImageClassification", "ViT", 32, _IMAGES),
    _hf("SwinForImageClassification", "Swin", 32, _SWIN),
    _hf("ConvNextForImageClassification", "ConvNeXt", 32, {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
    _hf("ResNetForImageClassification", "ResNet", 32, {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
    _hf("BertForSequenceClassification", "BERT", 16, _WORDS),
    _hf("RobertaForSequenceClassification", "RoBERTa", 16, _WORDS),
    _hf("DistilBertForSequenceClassification", "DistilBERT", 16, _DISTIL),
    _hf("AlbertForSequenceClassification", "ALBERT", 16, {**_WORDS, "embedding_size": 16}),
    _hf("GPT2ForSequenceClassification", "GPT-2", 16, _GPT),
)
TEXT = {n.name for n in NETWORKS if n.source == "transformers" and "Image" not in n.name}
# One of each kind of surgery, small enough for CI: plain, pre-activation, in-place and shared ReLUs, functional ReLUs, hard swish,
# channels-last, tokens, shared layers, (in, out) weights.
CI = (
    "resnet10t", "mobilenetv3_small_050", "shufflenet_v2_x0_5", "squeezenet1_1", "lcnet_050", "regnetx_002",
    "ViTForImageClassification", "SwinForImageClassification", "ConvNextForImageClassification", "ResNetForImageClassification",
    "BertForSequenceClassification", "AlbertForSequenceClassification", "GPT2ForSequenceClassification",
)  # fmt: skip
