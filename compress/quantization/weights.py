"""Round weights to int8: to all 8 bits, to 7, or to 8 bits limited by pairs, so that no x86 CPU's 16-bit sums saturate."""

from __future__ import annotations

from typing import get_args, Literal

import torch
from torch import Tensor

from architectures.pairs import PAIR_LIMIT
from metadata.errors import UserError

WeightForm = Literal["pair", "8-bit", "7-bit"]
WEIGHT_FORMS: tuple[WeightForm, ...] = get_args(WeightForm)
LARGEST: dict[WeightForm, int] = {"pair": 127, "8-bit": 127, "7-bit": 64}  # level; 7-bit: two products of 255 * 64 fit
DEFAULT_FORM: WeightForm = "pair"
SMALLEST_SCALE = 1e-12  # of a channel of zeros


def quantize_weight(weight: Tensor, form: WeightForm, depthwise: bool = False, name: str = "") -> tuple[Tensor, Tensor]:
    """Round weights to symmetric integers with per-channel scales: (out, ...) float -> (out, ...) int8, (out,) float.

    CPUs without VNNI add two adjacent products in 16 bits. 7-bit weights make every such sum fit. "pair" makes every sum
    fit with 8-bit weights: a channel's scale is so large that the levels of one sign of a pair add up to at most 128.

    Args:
        weight: of a Conv2d or Linear, (out, in of a group, *kernel).
        form: which integers are allowed.
        depthwise: one input channel a group and one output channel a group: kernels multiply one by one, without pairs.
        name: of the layer, for the error.

    Raises:
        UserError: the weights are not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"layer {name}: its weights hold NaN or infinite values and cannot be quantized")
    levels, scale = rounded(weight, form, depthwise)
    return levels.to(torch.int8).contiguous(), scale


@torch.no_grad()
def rounded(weight: Tensor, form: WeightForm, depthwise: bool = False) -> tuple[Tensor, Tensor]:
    """Do the same for finite weights, without leaving float: (out, ...) levels in the weights' type, (out,) scales."""
    rows = weight.reshape(len(weight), weight.shape[1], -1).transpose(1, 2)  # (out, kernel positions, in), as kernels read
    scale = (rows.abs().amax((1, 2)) / LARGEST[form]).clamp(min=SMALLEST_SCALE)
    if form == "pair" and not depthwise:
        levels, scale = _limited(rows, scale)
    else:
        levels = (rows / scale.view(-1, 1, 1)).round_().clamp_(-LARGEST[form], LARGEST[form])
    return levels.transpose(1, 2).reshape(weight.shape), scale


def _limited(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pair-limited levels (out, positions, in) and scales (out,) of rows of weights, from their 8-bit scales."""
    for view in _pairings(rows):
        for sign in (1, -1):
            scale = scale.maximum((sign * _in_pairs(view)).clamp(min=0).sum(2).amax(1) / PAIR_LIMIT)
    exact = rows / scale.view(-1, 1, 1)
    levels = exact.round().clamp_(-127, 127)
    for view in _pairings(levels):  # rounding up twice may exceed the limit by one
        pairs = _in_pairs(view)
        above = (pairs.clamp(min=0).sum(2) > PAIR_LIMIT) | (pairs.clamp(max=0).sum(2) < -PAIR_LIMIT)
        added = (pairs - _in_pairs(exact.reshape(view.shape))) * pairs.sign()
        first = added[..., 0] >= added[..., 1]
        less = pairs - pairs.sign() * torch.stack([above & first, above & ~first], 2)
        levels = less.reshape(*view.shape[:2], -1)[..., :view.shape[2]].reshape(levels.shape)
    return levels, scale


def _in_pairs(rows: Tensor) -> Tensor:
    """Return adjacent weights as pairs: (out, positions, in) -> (out, pairs, 2), see `architectures.pairs.weight_pairs`."""
    return torch.nn.functional.pad(rows, (0, rows.shape[2] % 2)).reshape(len(rows), -1, 2)


def _pairings(rows: Tensor) -> list[Tensor]:
    """Return the rows as the kernels pair them: oneDNN at each position, ONNX Runtime along the whole row of im2col.

    The two differ for an odd number of channels at several positions.
    """
    return [rows, rows.reshape(len(rows), 1, -1)] if rows.shape[2] % 2 and rows.shape[1] > 1 else [rows]
