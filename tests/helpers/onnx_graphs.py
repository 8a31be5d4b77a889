"""ONNX classifiers written node by node, as exporters write them, for the tests of reading them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from architectures.describe import lower
from architectures.layers.base import Layer
from architectures.onnx_network.reading import open_classifier, read_network
from architectures.onnx_network.runtime import TOLERANCE, difference_from_file


def drawn(*shape: int, seed: int = 0, scale: float = 0.3) -> np.ndarray:
    """Random numbers of a shape."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32) * np.float32(scale)


def written(path: Path, nodes: Sequence[onnx.NodeProto], constants: dict[str, np.ndarray], *,
            image: Sequence[Any] = ("n", 3, 8, 8), output: Sequence[Any] = ("n", 4), opset: int = 17) -> Path:
    """Write a graph from "x" to "y"."""
    graph = helper.make_graph(
        list(nodes), "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(image))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(output))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    """One node; names of inputs are divided by spaces, "-" leaves one out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, [output], name=attributes.pop("name", f"node_{output}"), **attributes)


def with_head(nodes: Sequence[onnx.NodeProto], features: str, channels: int) -> tuple[list[onnx.NodeProto],
                                                                                   dict[str, np.ndarray]]:
    """Nodes that end in (N, channels, H, W), with a pooling and a head of four classes behind."""
    head = [node("GlobalAveragePool", features, "pooled"), node("Flatten", "pooled", "flat"),
            node("Gemm", "flat head.weight head.bias", "y", transB=1)]
    return [*nodes, *head], {"head.weight": drawn(4, channels), "head.bias": drawn(4)}


STEM = node("Conv", "x stem.weight", "stem", pads=[1, 1, 1, 1])
STEM_WEIGHT = {"stem.weight": drawn(8, 3, 3, 3)}


def read_back(path: Path, **options: Any) -> list[Layer]:
    """Read a file, compare the network and the one rebuilt from its layers with ONNX Runtime, return the layers."""
    opened = open_classifier(path, **options)
    network = read_network(opened)
    assert difference_from_file(network, opened) < TOLERANCE
    lowered = lower(network, opened.input_shape)
    assert difference_from_file(lowered.build(), opened) < TOLERANCE
    return lowered.architecture.layers


def types(layers: list[Layer]) -> list[str]:
    """The types of layers, in order."""
    return [layer.type for layer in layers]
