"""CompactNet: a classifier of small images with 20,000 to 150,000 parameters, of residual or inverted residual blocks.

Three stages, each at half the height and width of the one before. Width in the late stages is cheap in time and dear in
bytes; depth in the first is the other way round. Sources: He et al. 2016, "Deep Residual Learning for Image Recognition"
(residual blocks, three stages for 32x32 images); Sandler et al. 2018, "MobileNetV2" (inverted residuals with linear ends);
Tan and Le 2019, "MixConv" (depthwise kernels of 3x3 to 7x7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from metadata.errors import UserError

STAGES = 3


def _conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps height and width but for its stride, and its norm."""
    return [nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels)]


class Inverted(nn.Module):
    """1x1 to more channels, a depthwise kernel, 1x1 back: (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.body = nn.Sequential(
            *_conv_norm(in_channels, inner, 1), nn.ReLU(inplace=True),
            *_conv_norm(inner, inner, kernel, stride, groups=inner), nn.ReLU(inplace=True),
            *_conv_norm(inner, out_channels, 1))
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return x + found if self.adds else found


class Residual(nn.Module):
    """Two convolutions and a shortcut: (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        inner = out_channels * expansion
        self.body = nn.Sequential(*_conv_norm(in_channels, inner, kernel, stride), nn.ReLU(inplace=True),
                                  *_conv_norm(inner, out_channels, kernel))
        alike = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if alike else nn.Sequential(*_conv_norm(in_channels, out_channels, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))  # type: ignore[no-any-return]


BLOCKS = {"inverted": Inverted, "residual": Residual}


class CompactNet(nn.Module):
    """A 3x3 stem, three stages, the mean over the last one's pixels, and a linear layer."""

    def __init__(self, num_classes: int, blocks: Sequence[str], widths: Sequence[int], depths: Sequence[int],
                 kernels: Sequence[int], expansions: Sequence[int], in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_norm(in_channels, widths[0], 3), nn.ReLU(inplace=True))
        stages, channels = [], widths[0]
        for stage, width in enumerate(widths):
            block, layers = BLOCKS[blocks[stage]], []
            for index in range(depths[stage]):
                stride = 2 if stage and not index else 1
                layers.append(block(channels, width, stride, kernels[stage], expansions[stage]))
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))  # (N, widths[2], H/4, W/4)
        return self.fc(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


def compact_net(*, num_classes: int, block: str | Sequence[str] = "inverted", widths: Sequence[int] = (24, 48, 96),
                depths: Sequence[int] = (3, 4, 2), kernels: Sequence[int] = (3, 5, 5), expansion: int | Sequence[int] = 2,
                in_channels: int = 3) -> CompactNet:
    """Build a CompactNet.

    Args:
        num_classes: width of the head.
        block: "inverted" (depthwise) or "residual" (full convolutions), for all stages or for each of the three.
        widths: channels of the three stages; multiples of 8 are fast.
        depths: blocks of the three stages.
        kernels: height and width of the stages' kernels: 3, 5 or 7.
        expansion: channels within a block, relative to those of its input (inverted) or output (residual), for all stages
            or for each.
        in_channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: an option is out of its range.
    """
    blocks = [block] * STAGES if isinstance(block, str) else block
    expansions = [expansion] * STAGES if isinstance(expansion, int) else expansion
    if not isinstance(blocks, (list, tuple)) or len(blocks) != STAGES or any(kind not in list(BLOCKS) for kind in blocks):
        raise UserError(f"compact_net: block is 'inverted' or 'residual', or three of these, got {block!r}")
    for name, values in (("widths", widths), ("depths", depths), ("kernels", kernels), ("expansion", expansions)):
        allowed: Any = (3, 5, 7) if name == "kernels" else range(1, 4097)
        if not isinstance(values, (list, tuple)) or len(values) != STAGES or any(
                type(value) is not int or value not in allowed for value in values):
            what = "three whole numbers, 3, 5 or 7" if name == "kernels" else "three whole numbers, from 1 on"
            what = "a whole number from 1 on, or three" if name == "expansion" else what
            example = "[2, 2, 3]" if name == "expansion" else "[3, 5, 5]"
            raise UserError(f"compact_net: {name}: expected {what}, such as {example}; got "
                            f"{expansion if name == 'expansion' else values!r}")
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if type(value) is not int or value < 1:
            raise UserError(f"compact_net: {name} must be a positive whole number, got {value!r}")
    return CompactNet(num_classes, blocks, widths, depths, kernels, expansions, in_channels)


MODELS = {"compact_net": compact_net}
