"""Small networks of every kind that pruning must know: their layers, with weights that are not the initial ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

from architectures.describe import Lowered, lower

SIZE = 32
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convnext": lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=5),
    "densenet": lambda: DenseNet(8, (2, 2), 16, num_classes=5),
    "efficientnet": lambda: EfficientNet([MBConvConfig(1, 3, 1, 16, 16, 1, 1, 1), MBConvConfig(4, 3, 2, 16, 24, 2, 1, 1)],
                                         0.2, num_classes=5),
    "maxvit": lambda: MaxVit((SIZE, SIZE), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=5),
    "regnet": lambda: RegNet(BlockParams([1, 1], [32, 64], [16, 16], [1.0, 1.0], [2, 2], 0.5), num_classes=5),
    "shufflenet": lambda: ShuffleNetV2([2, 2, 1], [16, 16, 32, 64, 64], num_classes=5),
    "swin": lambda: SwinTransformer([2, 2], 24, [2, 1], [3, 6], [4, 4], num_classes=5),
    "swin_v2": lambda: SwinTransformer([2, 2], 24, [2, 1], [3, 6], [4, 4], num_classes=5, block=SwinTransformerBlockV2,
                                       downsample_layer=PatchMergingV2),
    "vit": lambda: VisionTransformer(SIZE, 8, 2, 4, 32, 64, num_classes=5),
}


def lowered(name: str) -> Lowered:
    """Return a network's layers with its weights, all of which are random."""
    torch.manual_seed(0)
    found = lower(NETWORKS[name]().eval(), (3, SIZE, SIZE))
    for key, tensor in found.weights.items():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.05 if tensor.dim() > 1 else 0.3)
            if key.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return found
