"""An ONNX network of the toolkit, read for a runtime that knows no ONNX: shapes for one image, constants, int8 grids."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from compress.packaging.litert.model import Grid
from metadata.errors import UserError

MOST_FOLDED = 2**24  # numbers of a constant that is computed from others
IDENTITIES = ("Identity", "Dropout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLevels:
    """Integers that a DequantizeLinear restores to constants: one scale, or one for each index of `axis`."""

    levels: NDArray[Any]
    scales: NDArray[np.float32]
    zero_points: NDArray[Any]
    axis: int

    def restored(self) -> NDArray[np.float32]:
        """Return the numbers that the integers stand for."""
        shape = [1] * self.levels.ndim
        if self.scales.size > 1:
            shape[self.axis] = -1
        levels = self.levels.astype(np.int32) - self.zero_points.astype(np.int32).reshape(shape)
        return (levels * self.scales.reshape(shape)).astype(np.float32)


class NetworkGraph:
    """The network's nodes with what is known of their tensors.

    Attributes:
        nodes: without those that compute constants; identities are passed over.
        constants: values by the tensor's name, weights in int8 restored to floats.
        stored: int8 constants by the name of the tensor that they are restored to.
        shapes: of all tensors, for one image.
        levels_of: for a restored tensor, the name of its levels.
        grids: of levels, by name.
        input, output: names.

    Raises:
        UserError: a shape is not known before running.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        fixed = onnx.ModelProto()
        fixed.CopyFrom(model)
        image = fixed.graph.input[0]
        image.type.tensor_type.shape.dim[0].dim_value = 1
        output = fixed.graph.output[0]
        for dim in output.type.tensor_type.shape.dim[:1]:
            dim.dim_value = 1
        del fixed.graph.value_info[:]
        inferred = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
        self.constants: dict[str, NDArray[Any]] = {tensor.name: numpy_helper.to_array(tensor)
                                                   for tensor in inferred.initializer}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                if all(dim.HasField("dim_value") for dim in dims):
                    self.shapes[value.name] = tuple(dim.dim_value for dim in dims)
        self.input, self.output = image.name, output.name
        self.stored: dict[str, StoredLevels] = {}
        self.levels_of: dict[str, str] = {}
        self.grids: dict[str, Grid] = {}
        self.nodes: list[onnx.NodeProto] = []
        same: dict[str, str] = {}  # what an identity gives is what it takes
        for node in inferred.node:
            inputs = [same.get(name, name) for name in node.input]
            del node.input[:]
            node.input.extend(inputs)
            if node.op_type in IDENTITIES:
                same[node.output[0]] = inputs[0]
            elif not self._folded(node):
                self.nodes.append(node)
        self.output = same.get(self.output, self.output)
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.consumers[name].append(node)

    def _folded(self, node: onnx.NodeProto) -> bool:
        """Take down what a node's output is where that is known before running; tell whether the node is done with."""
        known = self.constants
        if node.op_type == "QuantizeLinear" and node.input[0] not in known:
            self.grids[node.output[0]] = self._grid(node)
        if node.op_type == "DequantizeLinear":
            if node.input[0] not in known:
                self.levels_of[node.output[0]] = node.input[0]
                return False
            scales = np.atleast_1d(known[node.input[1]]).astype(np.float32)
            zeros = known[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(1, np.int8)
            stored = StoredLevels(levels=known[node.input[0]], scales=scales, zero_points=np.atleast_1d(zeros),
                                  axis=attributes(node).get("axis", 1))
            self.stored[node.output[0]], known[node.output[0]] = stored, stored.restored()
            return True
        if node.op_type == "Shape" and node.input[0] in self.shapes:
            options, shape = attributes(node), self.shapes[node.input[0]]
            known[node.output[0]] = np.array(shape[options.get("start", 0):options.get("end")], np.int64)
            return True
        shape = self.shapes.get(node.output[0], ())
        if all(name in known or not name for name in node.input) and np.prod(shape, dtype=np.int64) <= MOST_FOLDED:
            results = ReferenceEvaluator(helper.make_model(helper.make_graph(
                [node], "one", [], [onnx.ValueInfoProto(name=name) for name in node.output],
                [numpy_helper.from_array(known[name], name) for name in dict.fromkeys(node.input) if name]),
                opset_imports=[helper.make_opsetid("", 17)])).run(None, {})
            known.update(zip(node.output, map(np.asarray, results), strict=True))
            return True
        return False

    def _grid(self, node: onnx.NodeProto) -> Grid:
        """Return the grid of a QuantizeLinear, for signed levels: those of unsigned ones less 128."""
        scale, zero = self.constants[node.input[1]], self.constants[node.input[2]]
        if scale.size != 1 or zero.dtype not in (np.uint8, np.int8):
            raise UserError(f"export.format litert: node {node.name}: activations are quantized to {zero.dtype} with "
                            f"{scale.size} scales; expected 8 bits with one")
        return Grid(float(scale.reshape(())), int(zero.reshape(())) - 128 * (zero.dtype == np.uint8))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor for one image. Raise UserError where it is not known before running."""
        if name in self.constants:
            return self.constants[name].shape
        if name not in self.shapes:
            raise UserError(f"export.format litert: the shape of tensor {name} is not known before running; a .tflite file "
                            "needs all shapes")
        return self.shapes[name]

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """Return the node that reads a tensor, where that is one alone and the tensor is not the network's output."""
        readers = self.consumers[name]
        return readers[0] if len(readers) == 1 and name != self.output else None


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as plain values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
