"""Write a described network as one ONNX file, straight from the layer table.

No exporter is needed: the architecture JSON is a graph, and the row of each layer type writes an ONNX operator or a few. So
the nodes have the layers' names, BatchNorm is folded first, and nothing depends on how a version of torch traces.

Opset 17 is the lowest that has what the table needs in a form that runtimes fuse (per-channel scales in QuantizeLinear
since 13, HardSwish since 14), so that older runtimes read the file too. GELU, an operator since opset 20, and GroupNorm
(21) are written as the operators that they consist of, which runtimes recognise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from architectures.agreement import largest_difference
from architectures.architecture import Architecture
from architectures.build import check_shapes
from architectures.describe import carry_over, describe
from architectures.folding import fold_batch_norm
from architectures.layers.base import Layer
from architectures.layers.moves import Stored
from metadata.errors import UserError, VerificationError

OPSET = 17
INPUT = "input"


class GraphWriter:
    """The graph under construction: nodes, initializers, and the tensor that holds each layer's output."""

    def __init__(self, architecture: Architecture, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.shapes: dict[str, tuple[int, ...]] = {INPUT: architecture.input_shape} | check_shapes(architecture)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.once: dict[str, tuple[int, ...]] = {}  # tensors that are the same for all images, with their shapes
        self.tensors = {INPUT: INPUT}  # a layer's output by its name; a layer that does nothing shares its input's

    def constant(self, name: str, values: Any, dtype: type[np.generic] = np.float32) -> str:
        """Add an initializer and return its name."""
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, layer: Layer, key: str) -> NDArray[np.float32]:
        """Return a weight of the layer as an array."""
        values: NDArray[np.float32] = self.weights[f"{layer.name}.{key}"].detach().float().cpu().numpy()
        return values

    def parameter(self, layer: Layer, key: str) -> str:
        """Add a weight of the layer as an initializer and return its name."""
        return self.constant(f"{layer.name}.{key}", self.weight(layer, key))

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node and return its name, which is also the name of its output."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a layer's output for one image, or of the graph's input."""
        return self.shapes[name]

    def for_each_image(self, inputs: Sequence[str], name: str) -> list[str]:
        """Return tensors to join: those that are stored once are repeated for each image. `name` begins nodes' names."""
        each = next((tensor for tensor in inputs if tensor not in self.once), None)
        if each is None or not self.once.keys() & set(inputs):
            return list(inputs)
        count = self.node("Shape", f"{name}.count", [each], start=0, end=1)
        found = []
        for index, tensor in enumerate(inputs):
            if tensor in self.once:
                sizes = self.constant(f"{name}.sizes_{index}", self.once[tensor], np.int64)
                whole = self.node("Concat", f"{name}.shape_{index}", [count, sizes], axis=0)
                tensor = self.node("Expand", f"{name}.each_{index}", [tensor, whole])
            found.append(tensor)
        return found

    def add(self, layer: Layer) -> None:
        """Write the nodes of a layer whose inputs are written."""
        inputs = [self.tensors[source] for source in layer.inputs]
        output = layer.to_onnx(self, inputs, self.shapes[layer.inputs[0]])
        self.tensors[layer.name] = output
        if isinstance(layer, Stored) or all(tensor in self.once for tensor in inputs):
            self.once[output] = self.shapes[layer.name]


def export(model: fx.GraphModule, architecture: Architecture) -> tuple[onnx.ModelProto, Architecture]:
    """Return the network as ONNX, and the architecture that the file follows: the same with BatchNorm folded.

    The file maps "input", (N, C, H, W) float32 with any N, to (N, classes) logits. Nodes have the layers' names.

    Args:
        model: a float network from `architectures.build.build`, on the CPU; the network stays as it is.
        architecture: the network's architecture, with its history.

    Raises:
        UserError: a layer has no ONNX form, or is int8 already.
    """
    folded = fold_batch_norm(model)
    described = carry_over(describe(folded, architecture.input_shape), architecture)
    if described.is_int8:
        raise UserError("export: the model is int8 already (quantize_dynamic); export the float one")
    writer = GraphWriter(described, folded.state_dict())
    for layer in described.layers:
        writer.add(layer)
    output = writer.tensors[described.layers[-1].name]
    graph = helper.make_graph(
        writer.nodes, described.model_type,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", *described.input_shape])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", *described.output_shape])], writer.initializers)
    exported = helper.make_model(graph, producer_name="compress", opset_imports=[helper.make_opsetid("", OPSET)],
                                 ir_version=8)  # of the time of opset 17: older runtimes refuse a newer one
    onnx.checker.check_model(exported, full_check=True)
    return exported, described


def check_same(expected: Tensor, got: Tensor, tolerance: float = 1e-3, title: str = "ONNX") -> dict[str, float]:
    """Compare the logits of the exported file, whose format has a `title`, with those of the network: (N, classes) each.

    The largest difference may be `tolerance` times the largest logit; float32 sums in another order stay far below that.
    The first class of every image must be the same, except for a tie within that difference.

    Raises:
        VerificationError: the logits differ by more; the message has the numbers.
    """
    difference, scale = largest_difference(expected, got)
    scale = max(scale, 1e-6)
    first, other = expected.argmax(1), got.argmax(1)
    rows = torch.arange(len(expected))
    margin = expected[rows, first] - expected[rows, other]
    changed = int((margin > tolerance * scale).sum())
    if not math.isfinite(difference) or difference > tolerance * scale or changed:
        raise VerificationError(f"export: the {title} file is not the network: logits differ by up to {difference:.3g} "
                                f"(largest logit {scale:.3g}), {changed} of {len(expected)} images get another class")
    return {"images": len(expected), "largest_difference": difference, "largest_logit": scale,
            "other_first_class": int((first != other).sum())}


def check_labels(expected: Tensor, got: Tensor, share: float, title: str) -> dict[str, float]:
    """Compare the answers of an int8 file with those of exact integers: (N, classes) logits each.

    Args:
        expected: of the ONNX file with exact integer sums.
        got: of the file.
        share: of the images that must get the same class.
        title: of the file's format.

    Raises:
        VerificationError: fewer images do, or a logit is not finite; the message has the numbers.
    """
    same = int((expected.argmax(1) == got.argmax(1)).sum())
    if same < share * len(expected) or not bool(torch.isfinite(got).all()):
        raise VerificationError(f"export: the {title} file gives {same} of {len(expected)} images the class that exact "
                                f"integers give, expected {share:.1%}: its runtime rounds or saturates otherwise, and "
                                "classes of this network lie that close together; train longer, take weights that cannot "
                                "saturate (quantize_static.weights=pair), or another format")
    difference, largest = largest_difference(expected, got)
    return {"images": len(expected), "same_class": same, "largest_difference": difference, "largest_logit": largest}
