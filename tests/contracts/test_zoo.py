"""Networks of torchvision and timm go all the way: described, rebuilt, counted, pruned, and the same in ONNX Runtime.

`benchmarks/coverage.py` writes the table of the same checks with int8 and the times.
"""

from __future__ import annotations

import pytest

from benchmarks.coverage import WHOLE
from benchmarks.coverage_checks import CHECKS, Examined
from benchmarks.zoo_networks import zoo_networks
from tests.helpers.marks import slow_but

# Small ones; the others are slow.
QUICK = ["timm:resnet10t"]


@pytest.mark.parametrize("name", slow_but(zoo_networks(), QUICK))
def test_a_network_of_the_zoos_goes_all_the_way(name: str) -> None:
    subject = Examined(name, zoo_networks()[name])
    for check in WHOLE:
        CHECKS[check](subject)
