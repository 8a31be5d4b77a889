"""Folding batch norms into the layers before them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from architectures.build import build
from architectures.describe import describe
from architectures.folding import fold_batch_norm
from tests.helpers.graphs import graph


def test_folding_batch_norm_changes_nothing() -> None:
    model, _ = graph(width=32, stem="small")
    folded = fold_batch_norm(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    images = torch.randn(4, 3, 32, 32)
    assert torch.allclose(folded(images), model(images), atol=1e-4)


@pytest.mark.parametrize(("layers", "folds"), [
    ([nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6)], True),
    ([nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6)], True),
    ([nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6, affine=False)], False),
    ([nn.Flatten(2), nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Flatten()], False)])  # of the planes
def test_norms_of_linear_layers_fold_where_they_are_of_its_features(layers: list[nn.Module], folds: bool) -> None:
    torch.manual_seed(5)
    network = nn.Sequential(*layers)
    for _ in range(3):
        network(torch.randn(16, 3, 8, 8) * 3 + 1)
    model = build(describe(network.eval(), (3, 8, 8)))
    model.load_state_dict(network.state_dict())
    folded = fold_batch_norm(model)
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), folded(images), atol=1e-4)
    assert any(isinstance(module, nn.BatchNorm1d) for module in folded.modules()) is not folds
