"""Airbench: a plain convolutional network that learns 32x32 images in few passes, for training against the clock.

Source: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", with SiLU in place of GELU, which is slower on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metadata.errors import UserError

HEAD_GAIN = 1 / 9  # the paper scales the logits by this factor; here the head's initial weights contain the factor


class Airbench(nn.Module):
    """(N, C, H, W) -> (N, num_classes), H and W at least 9.

    The network has a frozen 2x2 convolution that whitens patches, three groups of two 3x3 convolutions, a global max-pool
    and a linear head. The scale of the batch norms stays 1: the convolutions behind them can scale.
    """

    def __init__(self, num_classes: int, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        white = 2 * in_channels * 4  # each direction with both signs, because the activation drops one
        self.whiten = nn.Conv2d(in_channels, white, 2)
        self.whiten_act = nn.SiLU(inplace=True)
        groups: list[nn.Module] = []
        for before, width in zip([white, *widths], widths, strict=False):
            groups.append(nn.Sequential(
                nn.Conv2d(before, width, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(width),
                nn.SiLU(inplace=True), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                nn.SiLU(inplace=True)))
        self.groups = nn.Sequential(*groups)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(widths[-1], num_classes, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        """Start convolutions that do not narrow as identities; freeze the whitening and the norms' scales."""
        for module in self.groups.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels >= module.in_channels:
                nn.init.dirac_(module.weight.data[:module.in_channels])
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(False)
        self.whiten.requires_grad_(False)
        with torch.no_grad():
            self.fc.weight.mul_(HEAD_GAIN)

    @torch.no_grad()
    def initialize_from(self, images: Tensor) -> None:
        """Set the whitening from (N, C, H, W) normalised training images: its outputs are uncorrelated with variance 1.

        The weights are the eigenvectors of the patches' covariance, divided by the roots of the eigenvalues. Source:
        section 3.2 of the paper.
        """
        channels = images.shape[1]
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * 4)
        values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
        directions = (vectors / (values + 5e-4).sqrt()).T.flip(0).float().reshape(-1, channels, 2, 2)
        self.whiten.weight.copy_(torch.cat([directions, -directions]))
        assert self.whiten.bias is not None
        self.whiten.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.whiten_act(self.whiten(x)))  # (N, widths[-1], 3, 3) at 32 pixels
        result: Tensor = self.fc(self.flatten(self.pool(x)))
        return result


def airbench(*, num_classes: int, in_channels: int = 3, widths: Sequence[int] = (32, 128, 256)) -> Airbench:
    """Build an Airbench network; `widths` are the channels of the three groups."""
    for name, values in (("num_classes", [num_classes]), ("in_channels", [in_channels]), ("widths", widths)):
        if not isinstance(values, Sequence) or not values or not all(
                isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values):
            raise UserError(f"airbench: {name} must be positive whole numbers, got {values!r}")
    return Airbench(num_classes, in_channels, widths)


MODELS = {"airbench": airbench}
