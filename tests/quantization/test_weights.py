"""Weights rounded to int8: the scales, the errors, and that no pair of pair-limited weights can saturate."""

from __future__ import annotations

import pytest
import torch

from architectures.pairs import saturating_pairs
from compress.quantization.weights import WeightForm, quantize_weight
from metadata.errors import UserError

SHAPES = [(16, 8, 3, 3), (16, 3, 7, 7), (8, 5, 3, 3), (16, 1, 3, 3), (32, 7, 1, 1), (10, 64), (10, 7), (5, 2, 2, 3)]


def drawn(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """Return random weights: bell-shaped ones, or the hardest ones, of which many are as large as the largest."""
    generator = torch.Generator().manual_seed(len(shape) * shape[0] + shape[1])
    weight = torch.randn(shape, generator=generator)
    return weight if kind == "normal" else weight.sign() * torch.rand(shape, generator=generator).gt(0.3)


def test_scales_are_per_channel_and_symmetric() -> None:
    weight = torch.tensor([[1.27, -0.5], [0.0, 0.0], [-254.0, 127.0]])
    levels, scale = quantize_weight(weight, "8-bit")
    assert levels.tolist() == [[127, -50], [0, 0], [-127, 64]]
    assert scale[0] == pytest.approx(0.01) and scale[2] == pytest.approx(2.0)
    with pytest.raises(UserError, match="layer fc: its weights hold NaN"):
        quantize_weight(torch.tensor([[float("nan")]]), "8-bit", name="fc")


def test_a_pair_of_one_sign_shares_128_levels() -> None:
    weight = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-0.9, -0.3], [1.0, 0.004]])
    levels, scale = quantize_weight(weight, "pair")
    assert levels.tolist() == [[64, 64], [127, -127], [-96, -32], [127, 1]]  # only pairs of one sign are limited
    assert scale.tolist() == pytest.approx([2 / 128, 1 / 127, 1.2 / 128, 1 / 127])


def test_an_odd_step_is_taken_where_rounding_added_more() -> None:
    levels, _ = quantize_weight(torch.tensor([[64.6, 63.4, 0, 0], [63.5, 64.5, 0, 0], [0.0, 0, 128, 0]]) / 128, "pair")
    assert levels.sum(1).tolist()[:2] == [128, 128] and levels[0].tolist() == [65, 63, 0, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "hardest"])
def test_no_pair_of_limited_weights_can_saturate(shape: tuple[int, ...], kind: str) -> None:
    weight = drawn(shape, kind)
    levels, scale = quantize_weight(weight, "pair")
    assert saturating_pairs(levels.numpy()) == 0 == saturating_pairs(levels.numpy(), kernels="onnxruntime")
    wide = scale.view(-1, *[1] * (len(shape) - 1))
    assert bool(((levels * wide - weight).abs() <= 1.5001 * wide).all())  # half a step, and one that is taken off


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (128, 96, 1, 1)], ids=str)
def test_pair_limited_weights_lie_nearer_to_8_bits_than_to_7(shape: tuple[int, ...]) -> None:
    weight = drawn(shape, "normal")

    def error(form: WeightForm) -> float:
        levels, scale = quantize_weight(weight, form)
        return float((levels * scale.view(-1, 1, 1, 1) - weight).square().mean().sqrt())

    assert 1 < error("pair") / error("8-bit") < 1.5 < error("7-bit") / error("8-bit")
    assert [saturating_pairs(quantize_weight(weight, form)[0].numpy()) > 0 for form in ("8-bit", "7-bit")] == [True, False]


def test_depthwise_weights_keep_all_levels() -> None:
    weight = drawn((16, 1, 3, 3), "hardest")
    assert torch.equal(quantize_weight(weight, "pair", depthwise=True)[0], quantize_weight(weight, "8-bit")[0])
