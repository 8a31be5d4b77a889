"""Networks of torchvision and timm go all the way: described, rebuilt, counted, pruned, and the same in ONNX Runtime.

`benchmarks/coverage.py` writes the table of the same checks with int8 and the times.
"""

from __future__ import annotations

import pytest

from benchmarks.coverage import WHOLE
from benchmarks.coverage_checks import CHECKS, Examined
from benchmarks.zoo_networks import zoo_networks
from tests.helpers.marks import slow_but

QUICK = ["timm:convnext_atto", "timm:dla46x_c", "timm:lcnet_050", "timm:regnetx_002", "timm:resnest14d", "timm:resnet10t",
         "timm:resnet18", "timm:tinynet_e", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5"]


@pytest.mark.parametrize("name", QUICK)
def test_small_networks_are_described_and_rebuilt(name: str) -> None:
    """The cheap half of the contract, for one small network of a family each."""
    subject = Examined(name, zoo_networks()[name])
    for check in ("describe", "rebuild", "count"):
        CHECKS[check](subject)


@pytest.mark.parametrize("name", slow_but(zoo_networks(), ["timm:resnet10t"]))
def test_a_network_of_the_zoos_goes_all_the_way(name: str) -> None:
    subject = Examined(name, zoo_networks()[name])
    for check in WHOLE:
        CHECKS[check](subject)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_padding_of_odd_images_goes_all_the_way(name: str) -> None:
    """TensorFlow pads one side more than the other: at 97 pixels by other numbers than at 64."""
    subject = Examined(name, 97)
    for check in CHECKS.values():
        check(subject)
