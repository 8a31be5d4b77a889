"""Operators that exporters spell out in several nodes, joined again: pruning and int8 know the layer, not its parts.

Joined are a layer normalization, GELU, hard swish and hard sigmoid, SiLU, and a division by the length of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from architectures.onnx_network.constants import limits, listed
from architectures.onnx_network.graph import OnnxGraph, OnnxNode

Finder = Callable[["Patterns", OnnxNode], OnnxNode | None]


class Patterns:
    """A graph whose patterns are joined one after another.

    Args:
        graph: after folding; it is changed.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._look()

    def join(self) -> None:
        """Replace every pattern by one node."""
        finders = {"Div": (_layer_norm, _unit_length), "Erf": (_gelu,), "Clip": (_hard,), "Sigmoid": (_silu,),
                   "HardSigmoid": (_silu,)}
        for node in list(self.graph.nodes):
            for finder in finders.get(node.op, ()):
                found = finder(self, node)
                if found is not None:
                    last = self.writers[found.outputs[0]]
                    self.graph.nodes[self.graph.nodes.index(last)] = found
                    self.graph.keep_needed()
                    self._look()
                    break

    def _look(self) -> None:
        self.writers, self.readers = self.graph.writers(), self.graph.readers()

    def writer(self, name: str, *ops: str) -> OnnxNode | None:
        """Return the node that writes a tensor, if it is one of the operators."""
        node = self.writers.get(name)
        return node if node is not None and node.op in ops else None

    def reader(self, node: OnnxNode, *ops: str) -> OnnxNode | None:
        """Return the only node that reads the result of another, if it is one of the operators."""
        readers = self.readers.get(node.outputs[0], [])
        alone = len(readers) == 1 and node.outputs[0] != self.graph.result
        return readers[0] if alone and readers[0].op in ops else None

    def number(self, name: str) -> float | None:
        """Return a constant that is one number."""
        array = self.graph.constants.get(name)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.dtype.kind in "fiu" else None

    def given(self, node: OnnxNode) -> list[np.ndarray | None]:
        """Return the constants among a node's inputs."""
        return [self.graph.constants.get(name) for name in node.inputs]

    def other(self, node: OnnxNode, name: str) -> str | None:
        """Return the second input of a node of two inputs of which one is `name`."""
        rest = [entry for entry in node.inputs if entry != name]
        return rest[0] if len(node.inputs) == 2 and len(rest) == 1 else None

    def over_last(self, node: OnnxNode) -> bool:
        """Return whether a reduction goes over the last axis alone, and keeps it."""
        return listed(node, self.given(node), "axes", 1) == [-1] and bool(node.number("keepdims", 1))


def _node(like: OnnxNode, op: str, inputs: list[str], output: str, **attributes: object) -> OnnxNode:
    return OnnxNode(op=op, name=like.name, inputs=inputs, outputs=[output], attributes=attributes, opset=like.opset,
                    scope=like.scope)


def _layer_norm(seen: Patterns, node: OnnxNode) -> OnnxNode | None:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps), with a scale and a shift behind it."""
    centred, root = seen.writer(node.inputs[0], "Sub"), seen.writer(node.inputs[1], "Sqrt")
    plus = seen.writer(root.inputs[0], "Add") if root else None
    if centred is None or plus is None:
        return None
    mean, eps = seen.writer(centred.inputs[1], "ReduceMean"), next(
        (value for name in plus.inputs if (value := seen.number(name)) is not None), None)
    variance = next((found for name in plus.inputs if (found := seen.writer(name, "ReduceMean"))), None)
    square = seen.writer(variance.inputs[0], "Pow", "Mul") if variance else None
    if mean is None or eps is None or variance is None or square is None or mean.inputs[0] != centred.inputs[0]:
        return None
    squared = [seen.writer(name, "Sub") for name in square.inputs[:1 if square.op == "Pow" else 2]]
    same = all(found is not None and found.inputs == centred.inputs for found in squared)
    if not same or (square.op == "Pow" and seen.number(square.inputs[1]) != 2):
        return None
    if not (seen.over_last(mean) and seen.over_last(variance)):
        return None
    inputs, last = [centred.inputs[0]], node
    for op in ("Mul", "Add"):
        reader = seen.reader(last, op)
        name = seen.other(reader, last.outputs[0]) if reader else None
        array = seen.graph.constants.get(name) if name else None
        if reader is None or name is None or array is None or array.ndim != 1 or array.size < 2:
            break
        inputs, last = [*inputs, name], reader
    return _node(node, "LayerNormalization", inputs, last.outputs[0], axis=-1, epsilon=eps)


def _unit_length(seen: Patterns, node: OnnxNode) -> OnnxNode | None:
    """x / max(|x|, eps), where the length may be expanded before."""
    below = seen.writer(node.inputs[1], "Expand", "Clip", "Max")
    if below is not None and below.op == "Expand":
        below = seen.writer(below.inputs[0], "Clip", "Max")
    length = next((found for name in below.inputs if (found := seen.writer(name, "ReduceL2"))), None) if below else None
    if below is None or length is None or length.inputs[0] != node.inputs[0] or not seen.over_last(length):
        return None
    if below.op == "Clip":
        low, high = limits(below, seen.given(below))
    else:
        low, high = next((value for name in below.inputs if (value := seen.number(name)) is not None), None), None
    if low is None or high is not None:
        return None
    return _node(node, "Normalize", [node.inputs[0]], node.outputs[0], axis=-1, epsilon=low)


def _gelu(seen: Patterns, node: OnnxNode) -> OnnxNode | None:
    """x / 2 * (1 + erf(x / sqrt(2))), in any order of its factors."""
    inner, plus = seen.writer(node.inputs[0], "Div", "Mul"), seen.reader(node, "Add")
    if inner is None or plus is None or seen.number(seen.other(plus, node.outputs[0]) or "") != 1:
        return None
    wanted = math.sqrt(2) if inner.op == "Div" else math.sqrt(0.5)
    source = next((name for name in inner.inputs if seen.number(name) is None), "")
    scale = next((value for name in inner.inputs if (value := seen.number(name)) is not None), 0.0)
    if abs(scale - wanted) > 1e-4 or (inner.op == "Div" and inner.inputs[0] != source):
        return None
    last = _product(seen, plus, source, 0.5)
    return _node(node, "Gelu", [source], last.outputs[0]) if last else None


def _hard(seen: Patterns, node: OnnxNode) -> OnnxNode | None:
    """clip(x + 3, 0, 6) / 6, which is a hard sigmoid, times x a hard swish."""
    plus = seen.writer(node.inputs[0], "Add")
    if plus is None or limits(node, seen.given(node)) != (0, 6):
        return None
    source = next((name for name in plus.inputs if seen.number(name) is None), "")
    if seen.number(seen.other(plus, source) or "") != 3:
        return None
    if last := _product(seen, node, source, 1 / 6):
        return _node(node, "HardSwish", [source], last.outputs[0])
    last = _product(seen, node, None, 1 / 6)
    return _node(node, "HardSigmoid", [source], last.outputs[0], alpha=1 / 6, beta=0.5) if last else None


def _silu(seen: Patterns, node: OnnxNode) -> OnnxNode | None:
    """x * sigmoid(x), or with a hard sigmoid of torch's slope."""
    if node.op == "HardSigmoid" and (abs(node.number("alpha", 0.2) - 1 / 6) > 1e-4 or node.number("beta", 0.5) != 0.5):
        return None
    last = seen.reader(node, "Mul")
    if last is None or seen.other(last, node.outputs[0]) != node.inputs[0]:
        return None
    return _node(node, "Silu" if node.op == "Sigmoid" else "HardSwish", [node.inputs[0]], last.outputs[0])


def _product(seen: Patterns, node: OnnxNode, source: str | None, factor: float) -> OnnxNode | None:
    """Return the node that gives `node` times `source` times `factor`, whatever the order; without a source None."""
    needs_source, needs_factor, last = source is not None, True, node
    while needs_source or needs_factor:
        reader = seen.reader(last, "Mul", "Div")
        name = seen.other(reader, last.outputs[0]) if reader else None
        if reader is None or name is None or (reader.op == "Div" and reader.inputs[0] != last.outputs[0]):
            return None
        value = seen.number(name)
        value = 1 / value if value and reader.op == "Div" else value
        half = seen.writer(name, "Mul")
        if needs_factor and value is not None and abs(value - factor) < 1e-4:
            needs_factor = False
        elif needs_source and name == source and reader.op == "Mul":
            needs_source = False
        elif (needs_source and needs_factor and half is not None and source in half.inputs and reader.op == "Mul"
              and abs((seen.number(seen.other(half, source) or "") or 0) - factor) < 1e-4):
            needs_source = needs_factor = False
        else:
            return None
        last = reader
    return last
