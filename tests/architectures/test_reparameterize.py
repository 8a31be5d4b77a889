"""Networks whose branches are joined for evaluation on request."""

from __future__ import annotations

import pytest
import torch

from architectures.describe import describe
from architectures.zoo import make
from metadata.errors import UserError


def test_branches_are_joined_on_request() -> None:
    torch.manual_seed(0)
    branched = make("timm:repvgg_a0", num_classes=5).eval()
    torch.manual_seed(0)
    joined = make("timm:repvgg_a0", num_classes=5, reparameterize=True).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = branched(images)
        assert expected.std() > 1e-3
        assert torch.allclose(joined(images), expected, atol=1e-4 * float(expected.abs().max()))
    assert len(describe(joined, (3, 32, 32)).layers) < 0.4 * len(describe(branched, (3, 32, 32)).layers)


def test_a_network_without_branches_says_so() -> None:
    with pytest.raises(UserError, match="has no branches to join"):
        make("timm:resnet10t", num_classes=5, reparameterize=True)
