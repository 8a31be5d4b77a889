"""Networks of torchvision and timm go all the way: described, rebuilt, counted, pruned, and the same in ONNX Runtime.

`benchmarks/coverage.py` writes the table of the same checks with int8 and the times.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.coverage import WHOLE
from benchmarks.coverage_checks import CHECKS, Examined
from benchmarks.zoo_networks import zoo_networks

# One small network of a family each; the attention of one of them is a transformer's.
QUICK = ["timm:convnext_atto", "timm:deit_tiny_patch16_224", "timm:lcnet_050", "timm:resnet10t",
         "timm:tf_mobilenetv3_small_minimal_100", "timm:tinynet_e", "torchvision:mobilenet_v3_small",
         "torchvision:mnasnet0_5", "torchvision:shufflenet_v2_x0_5", "torchvision:squeezenet1_1"]
FAILING = {  # networks that fail a check, and why
    "timm:eca_nfnet_l0": "count: 0.14 % of its parameters are gains of standardized weights, which the layers hold as one",
}


def cases() -> list[Any]:
    """Return the networks as parameters: slow but for the quick ones, and failing where that is known."""
    assert FAILING.keys() <= zoo_networks().keys() - set(QUICK)
    return [pytest.param(name, marks=[*([] if name in QUICK else [pytest.mark.slow]),
                                      *([pytest.mark.xfail(strict=True, reason=FAILING[name])] if name in FAILING else [])])
            for name in zoo_networks()]


@pytest.mark.parametrize("name", cases())
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
