"""A softmax at the end of an ONNX classifier is left out: the toolkit works with logits."""

from __future__ import annotations

import math
from typing import Any

SOFTMAX = {"Softmax", "LogSoftmax"}
SHAPES_ALONE = {"Identity", "Dropout", "Flatten", "Reshape", "Squeeze", "Unsqueeze"}  # the same numbers, in the same order


def without_softmax(model: Any) -> str:
    """Remove a softmax over the classes at the end of a model's graph, also before nodes that change the shape alone.

    Returns:
        the line that says so, "" where there is none.
    """
    graph = model.graph
    writers = {name: node for node in graph.node for name in node.output}
    last = writers.get(graph.output[0].name)
    while last is not None and last.op_type in SHAPES_ALONE | SOFTMAX:
        if not _read_once(graph, last):
            return ""
        if last.op_type in SOFTMAX and last.input[0] in writers:
            break
        last = writers.get(last.input[0])
    if last is None or last.op_type not in SOFTMAX or not _over_classes(model, last):
        return ""
    gone, name = last.output[0], last.input[0]
    kept = [node for node in graph.node if node is not last]
    for node in kept:
        for at, read in enumerate(node.input):
            if read == gone:
                node.input[at] = name
    del graph.node[:]
    graph.node.extend(kept)
    if graph.output[0].name == gone:
        graph.output[0].name = name
    without_softmax(model)  # a file may hold two: the softmax of a softmax has the logits' order, too
    return f"the {last.op_type} at the end is left out: the network gives logits; the classes and their order stay"


def _read_once(graph: Any, node: Any) -> bool:
    """Return whether a node's only result is read once, by the way to the output or as the output. Sizes do not count."""
    name = node.output[0]
    readers = [other for other in graph.node if name in other.input and other.op_type != "Shape"]
    return len(node.output) == 1 and len(readers) + (graph.output[0].name == name) == 1


def _over_classes(model: Any, node: Any) -> bool:
    """Return whether a softmax goes over all numbers of an image. Before opset 13 it goes over all axes from one on."""
    import onnx
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
              for value in (*inferred.value_info, *inferred.output)}
    sizes = shapes.get(node.output[0]) or shapes.get(node.input[0]) or []
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), -1 if opset >= 13 else 1)
    if len(sizes) < 2 or not -len(sizes) <= axis < len(sizes) or axis % len(sizes) == 0 or 0 in sizes[1:]:
        return False
    axis %= len(sizes)
    return bool(math.prod(sizes[axis:] if opset < 13 else sizes[axis:axis + 1]) == math.prod(sizes[1:]))
