"""SlimResNet18: ResNet18 at a chosen width, with the ImageNet stem or one for small images.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition" (basic blocks, layout of ResNet18); the 32x32
stem (3x3, stride 1, no max-pool) is that of its CIFAR networks.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from metadata.errors import UserError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                                            nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)  # type: ignore[no-any-return]


class SlimResNet18(nn.Module):
    """Four stages of two basic blocks; channels width, 2 width, 4 width, 8 width."""

    def __init__(self, num_classes: int, width: int, stem: str, in_channels: int) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
            self.maxpool: nn.Module | None = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
            self.maxpool = None
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in range(1, 5):
            stride = 1 if stage == 1 else 2
            self.add_module(f"layer{stage}", nn.Sequential(BasicBlock(widths[stage - 1], widths[stage], stride),
                                                           BasicBlock(widths[stage], widths[stage], 1)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(widths[4], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (N, width, H/2, W/2), or (N, width, H, W) with the small stem
        if self.maxpool is not None:
            x = self.maxpool(x)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)  # halves H and W from the second stage on
        return self.fc(self.flatten(self.avgpool(x)))  # type: ignore[no-any-return]


def slim_resnet18(*, num_classes: int, width: int = 32, stem: Literal["imagenet", "small"] = "imagenet",
                  in_channels: int = 3) -> SlimResNet18:
    """Build a SlimResNet18.

    Args:
        num_classes: width of the head.
        width: channels of the stem and the first stage; 64 is the ordinary ResNet18.
        stem: "imagenet" (7x7, stride 2, max-pool) or "small" (3x3, stride 1) for images of 64 pixels and less.
        in_channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: an option is out of its range.
    """
    if stem not in ("imagenet", "small"):
        raise UserError(f"slim_resnet18: stem is 'imagenet' or 'small', got {stem!r}")
    for name, value in (("num_classes", num_classes), ("width", width), ("in_channels", in_channels)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"slim_resnet18: {name} must be a positive whole number, got {value!r}")
    return SlimResNet18(num_classes, width, stem, in_channels)


MODELS = {"slim_resnet18": slim_resnet18}
