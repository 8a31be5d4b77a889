"""A plain CNN that grows in width and depth, for studies of how loss scales with size.

The network has three stages of convolution blocks with width, 2 width and 4 width channels, max-pools between the stages,
and a global average pool.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from metadata.errors import UserError


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, ReLU: (N, in, H, W) -> (N, out, H, W). No bias: batch norm would cancel it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.norm(self.conv(x)))
        return out


class ScalingCNN(nn.Sequential):
    """(N, in_channels, H, W) -> (N, num_classes), H and W at least 4."""


def scaling_cnn(*, num_classes: int, width: int = 32, depth: int = 2, in_channels: int = 3) -> ScalingCNN:
    """Build a ScalingCNN.

    Args:
        num_classes: width of the head.
        width: channels of the first stage; the other stages have 2 width and 4 width.
        depth: convolution blocks a stage.
        in_channels: channels of the images.

    Raises:
        UserError: a size is not a positive whole number.
    """
    for name, value in (("num_classes", num_classes), ("width", width), ("depth", depth), ("in_channels", in_channels)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"scaling_cnn: {name} must be a positive whole number, got {value!r}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for stage in (1, 2, 3):
        out = width * 2 ** (stage - 1)
        layers[f"stage{stage}"] = nn.Sequential(*(ConvBlock(out if block else channels, out) for block in range(depth)))
        if stage < 3:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        channels = out
    return ScalingCNN(layers | OrderedDict(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1),
                                           head=nn.Linear(channels, num_classes)))


MODELS = {"scaling_cnn": scaling_cnn}
