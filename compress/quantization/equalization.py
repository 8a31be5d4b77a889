"""Cross-layer equalisation: rescale the channels between two consecutive layers so that both layers use similar ranges.

The network's function stays the same, because the operators between the layers commute with positive factors. The
equalised network loses less when it is quantized.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from architectures.layers.table import LAYER_TABLE

LARGEST_FACTOR = 1e4  # bounds the factor of channels that are almost zero
ROUNDS = 20
WEIGHTED = ("Conv", "Gemm")

Array = NDArray[np.float32]


def equalize(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """Return an equalised copy, and the pairs of layers, by node name, that were rescaled.

    Args:
        model: float, as `compress.packaging.export.export` writes it.
    """
    equalized = onnx.ModelProto()
    equalized.CopyFrom(model)
    pairs = _pairs(equalized.graph)
    tensors = {tensor.name: tensor for tensor in equalized.graph.initializer}
    weights = {name: numpy_helper.to_array(tensors[name]).astype(np.float32, copy=True)
               for pair in pairs for node in pair for name in node.input[1:]}
    for _ in range(ROUNDS):  # a layer can be the second of one pair and the first of the next
        for first, second in pairs:
            _scale(first, second, weights)
    for name, values in weights.items():
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    return equalized, [(first.name, second.name) for first, second in pairs]


def _pairs(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Return the pairs of layers of which the second alone reads the first, through operators that pass factors on."""
    pass_factors_on = {name for row in LAYER_TABLE.values() for name, operator in row.operators.items()
                       if operator.passes_factors_on}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    pairs = []
    for first in graph.node:
        if first.op_type not in WEIGHTED:
            continue
        node = first
        while len(reading := readers.get(node.output[0], [])) == 1 and node.output[0] not in outputs:
            node = reading[0]
            if node.op_type not in pass_factors_on:
                break
        if node is not first and node.op_type == first.op_type:  # Flatten between Conv and Gemm mixes channels
            pairs.append((first, node))
    return pairs


def _groups(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def _scale(first: onnx.NodeProto, second: onnx.NodeProto, weights: dict[str, Array]) -> None:
    """Divide the first layer's output channels by sqrt(r1 / r2), and multiply the second layer's input channels by it."""
    before, after = weights[first.input[1]], weights[second.input[1]]
    groups = _groups(second)
    # (groups, outputs of a group, inputs of a group, kernel): the second layer's inputs are the first layer's outputs
    grouped = after.reshape(groups, after.shape[0] // groups, after.shape[1], -1)
    reach_before = np.abs(before).reshape(len(before), -1).max(axis=1)
    reach_after = np.abs(grouped).max(axis=(1, 3)).reshape(-1)
    usable = (reach_before > 0) & (reach_after > 0)
    factor = np.ones(len(before), np.float32)
    factor[usable] = np.sqrt(reach_before[usable] / reach_after[usable]).clip(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    weights[first.input[1]] = before / factor.reshape(-1, *[1] * (before.ndim - 1))
    if len(first.input) > 2:
        weights[first.input[2]] = weights[first.input[2]] / factor
    weights[second.input[1]] = (grouped * factor.reshape(groups, 1, -1, 1)).reshape(after.shape).astype(np.float32)
