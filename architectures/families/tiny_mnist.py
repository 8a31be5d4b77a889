"""Networks of a few thousand parameters for 28x28 grey digits: three published networks, to the parameter, and two of ours.

Source: the published models of the "MNIST, 99.4 %, 15 epochs" challenge. They use unpadded 3x3 convolutions without biases,
each followed by batch norm (affine), ReLU and, where stated, dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from metadata.errors import UserError


def conv(in_channels: int, out_channels: int, kernel_size: int = 3, dropout: float = 0.0) -> list[nn.Module]:
    """Return convolution, batch norm, ReLU and, if asked, dropout: (N, in, H, W) -> (N, out, H - k + 1, W - k + 1)."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel_size, bias=False), nn.BatchNorm2d(out_channels),
                               nn.ReLU(inplace=True)]
    return [*layers, nn.Dropout(dropout)] if dropout else layers


class TinyMNIST(nn.Sequential):
    """A plain chain of layers: (N, 1, 28, 28) -> (N, num_classes)."""


class MNISTModelLL(TinyMNIST):
    """9,412 parameters at ten classes: six 3x3 convolutions, 1x1, global average pool, two linear layers without bias."""


class MNISTModelGAP(TinyMNIST):
    """6,992 parameters at ten classes. Its logits pass a ReLU, as published, so that no logit is below 0."""


class MNISTModelFinal(TinyMNIST):
    """6,972 parameters at ten classes: MNISTModelGAP without dropout, and a plain 1x1 convolution at the end."""


def mnist_model_ll(*, num_classes: int, in_channels: int = 1, dropout: float = 0.05) -> MNISTModelLL:
    """Build MNISTModelLL."""
    _check(num_classes, in_channels)
    return MNISTModelLL(*conv(in_channels, 8, 3, dropout), *conv(8, 8, 3, dropout), nn.MaxPool2d(2),
                        *conv(8, 16, 3, dropout), *conv(16, 16, 3, dropout), nn.MaxPool2d(2), *conv(16, 32, 3, dropout),
                        *conv(32, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(1),
                        nn.Linear(num_classes, num_classes, bias=False), nn.ReLU(inplace=True),
                        nn.Linear(num_classes, num_classes, bias=False))


def mnist_model_gap(*, num_classes: int, in_channels: int = 1, dropout: float = 0.05) -> MNISTModelGAP:
    """Build MNISTModelGAP."""
    _check(num_classes, in_channels)
    return MNISTModelGAP(*_trunk(in_channels, dropout), *conv(24, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def mnist_model_final(*, num_classes: int, in_channels: int = 1) -> MNISTModelFinal:
    """Build MNISTModelFinal."""
    _check(num_classes, in_channels)
    return MNISTModelFinal(*_trunk(in_channels, 0.0), nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, num_classes, 1, bias=False),
                           nn.Flatten(1))


class MNISTUnder8k(TinyMNIST):
    """7,604 parameters at ten classes."""


class MNISTUnder4k(TinyMNIST):
    """3,903 parameters at ten classes."""


def mnist_under_8k(*, num_classes: int, in_channels: int = 1) -> MNISTUnder8k:
    """Build MNISTUnder8k."""
    _check(num_classes, in_channels)
    return MNISTUnder8k(*_narrow(in_channels, (8, 12, 12, 12, 14, 14), num_classes))


def mnist_under_4k(*, num_classes: int, in_channels: int = 1) -> MNISTUnder4k:
    """Build MNISTUnder4k."""
    _check(num_classes, in_channels)
    return MNISTUnder4k(*_narrow(in_channels, (8, 8, 8, 8, 10, 9), num_classes))


def _narrow(in_channels: int, widths: Sequence[int], num_classes: int) -> list[nn.Module]:
    """Return six convolutions of these widths and a head.

    The first convolution is 5x5 on the whole image. Three 3x3 convolutions work at half the resolution, two at a quarter.
    Pooling comes before batch norm, which makes norm and ReLU four times cheaper. Before the head, a depthwise convolution
    has a weight for each of the 5x5 positions that are left; global average pooling would lose the position.
    """
    one, two, three, four, five, six = widths
    return [*_block(in_channels, one, 5, pool=True), *_block(one, two), *_block(two, three),
            *_block(three, four, pool=True), *_block(four, five), *_block(five, six, padding=0),
            nn.Conv2d(six, six, 5, groups=six, bias=False), nn.BatchNorm2d(six), nn.Flatten(1), nn.Linear(six, num_classes)]


def _block(in_channels: int, out_channels: int, kernel_size: int = 3, padding: int | None = None,
           pool: bool = False) -> list[nn.Module]:
    """Return convolution (padded to keep the size by default), max-pool if asked, batch norm, ReLU."""
    padding = kernel_size // 2 if padding is None else padding
    return [nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False),
            *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _trunk(in_channels: int, dropout: float) -> Sequence[nn.Module]:
    return [*conv(in_channels, 12, 3, dropout), *conv(12, 12, 3, dropout), nn.MaxPool2d(2), *conv(12, 12, 3, dropout),
            *conv(12, 12, 3, dropout), nn.MaxPool2d(2), *conv(12, 24, 3, dropout)]


def _check(num_classes: int, in_channels: int) -> None:
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"tiny_mnist: {name} must be a positive whole number, got {value!r}")


MODELS = {"mnist_model_ll": mnist_model_ll, "mnist_model_gap": mnist_model_gap, "mnist_model_final": mnist_model_final,
          "mnist_under_8k": mnist_under_8k, "mnist_under_4k": mnist_under_4k}
