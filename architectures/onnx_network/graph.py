"""The nodes of an ONNX graph as plain objects, and who writes and reads which tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadata.errors import UserError

Array = NDArray[Any]
SCOPES = "pkg.torch.onnx.name_scopes"
NAMED = 60  # characters of a node's name in a message


class NotExpressibleError(UserError):
    """A file is sound, but a node of it has no form in torch's modules and functions that the layer table knows."""


@dataclass(kw_only=True)
class OnnxNode:
    """One node: its operator, the names of its tensors, and its attributes as Python values.

    Args:
        op: the operator, such as "Conv".
        name: of the node; may be empty.
        inputs: names of tensors; "" where an optional one is left out.
        outputs: names of tensors.
        attributes: numbers, texts, lists of them, and arrays.
        opset: of the file.
        scope: the dotted name of the module that the node was exported from, where torch's exporters say so.
    """

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int
    scope: str = ""

    def has(self, position: int) -> bool:
        """Return whether an input is given."""
        return len(self.inputs) > position and self.inputs[position] != ""

    def number(self, key: str, default: Any) -> Any:
        """Return an attribute, or the default."""
        return self.attributes.get(key, default)

    @property
    def place(self) -> str:
        """The operator and the name of the node, for messages."""
        return f"operator {self.op}" + (f" of node {self.name[:NAMED]!r}" if self.name else "")

    def refuse(self, why: str) -> NotExpressibleError:
        """Return the error for this node, to be raised."""
        return NotExpressibleError(f"{self.place}: {why}")


@dataclass(kw_only=True)
class OnnxGraph:
    """A graph of one input and one output.

    Args:
        nodes: in an order in which each can be computed.
        constants: arrays by the name of their tensor.
        source: name of the images' tensor.
        result: name of the output's tensor.
        origins: for a constant that was computed from one stored tensor, the stored tensor's name.
        computed: the numbers that were computed from constants so far.
    """

    nodes: list[OnnxNode]
    constants: dict[str, Array]
    source: str
    result: str
    origins: dict[str, str] = field(default_factory=dict)
    computed: int = 0

    def writers(self) -> dict[str, OnnxNode]:
        """Return the node that writes each tensor."""
        return {name: node for node in self.nodes for name in node.outputs}

    def readers(self) -> dict[str, list[OnnxNode]]:
        """Return the nodes that read each tensor, one entry an input."""
        found: dict[str, list[OnnxNode]] = defaultdict(list)
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node)
        return found

    def keep_needed(self) -> None:
        """Leave out the nodes that the output does not need."""
        needed, kept = {self.result}, []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                needed |= set(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]


def graph_of(model: Any) -> OnnxGraph:
    """Return the graph of a checked ONNX model whose external data were read.

    Raises:
        NotExpressibleError: an opset before 7, whose operators broadcast in another way.
    """
    from onnx import helper, numpy_helper

    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if opset < 7:
        raise NotExpressibleError(f"opset {opset}: expected 7 or later")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = []
    for proto in model.graph.node:
        attributes = {entry.name: _plain(helper.get_attribute_value(entry)) for entry in proto.attribute}
        op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
        nodes.append(OnnxNode(op=op, name=proto.name, inputs=list(proto.input), outputs=list(proto.output), opset=opset,
                              attributes=attributes, scope=_scope(proto)))
    source = next(value.name for value in model.graph.input if value.name not in constants)
    return OnnxGraph(nodes=_sorted(nodes, {source, *constants}), constants=constants, source=source,
                     result=model.graph.output[0].name)


def _scope(proto: Any) -> str:
    """Return the module that torch's exporters name: in the metadata, or as the node's path with the operator behind."""
    for entry in proto.metadata_props:
        if entry.key == SCOPES and len(scopes := re.findall(r"'([^']*)'", entry.value)) > 1:
            return str(scopes[-2])
    parts: list[str] = []
    for part in proto.name.split("/")[1:-1] if proto.name.startswith("/") else ():
        if parts and part.startswith(f"{parts[-1]}."):  # a Sequential's name is repeated before a number
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)


def _sorted(nodes: Iterable[OnnxNode], known: set[str]) -> list[OnnxNode]:
    """Return the nodes as they are, after a check that each comes after what it reads: the standard asks for that."""
    nodes = list(nodes)
    for node in nodes:
        if any(name and name not in known for name in node.inputs):
            raise node.refuse("it reads a tensor that no node before it writes")
        known |= set(node.outputs)
    return nodes


def _plain(value: Any) -> Any:
    from onnx import TensorProto, numpy_helper

    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, Iterable) and not isinstance(value, str | np.ndarray):
        return [_plain(entry) for entry in value]
    return value
