"""Check OpenVINO's IR without running it: a graph in XML, and the numbers in a `.bin` file beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from architectures.build import MAX_ACTIVATION_ELEMENTS, MAX_TOTAL_ELEMENTS
from architectures.image_layout import takes_channels_last
from metadata.errors import VerificationError, first_line

MAX_GRAPH_BYTES = 2**25
MAX_GRAPH_TAGS = 1_000_000
MAX_GRAPH_DEPTH = 12  # elements inside one another: a graph has 6
MAX_ATTRIBUTE = 10_000  # characters
# The operators of image classifiers. Others are refused: loops, branches, states, sequences, random numbers, custom ones.
_IR_OPERATORS = """
    Abs AdaptiveAvgPool AdaptiveMaxPool Add AvgPool BatchNormInference Broadcast Ceiling Clamp Concat Const Convert
    ConvertLike Convolution Cos DepthToSpace Divide Einsum Elu Equal Erf Exp FakeQuantize Floor FloorMod Gather
    GatherND Gelu Greater GreaterEqual GroupConvolution GroupNormalization HSigmoid HSwish HardSigmoid Interpolate
    Less LessEqual LogSoftmax Log LogicalAnd LogicalNot LogicalOr LRN MVN MatMul MaxPool Maximum Minimum Mish Mod
    Multiply Negative NormalizeL2 PReLU Pad Parameter Power RMS Range ReLU ReduceL1 ReduceL2 ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum Reshape Result Round ScaledDotProductAttention Select Selu ShapeOf
    ShuffleChannels Sigmoid Sin Slice SoftMax SoftPlus SoftSign Softmax SpaceToDepth Split Sqrt SquaredDifference
    Squeeze StridedSlice Subtract Swish Tanh Tile Transpose Unsqueeze VariadicSplit"""
IR_OPERATORS = frozenset(_IR_OPERATORS.split())
ELEMENT_BITS = {"f32": 32, "f16": 16, "bf16": 16, "f64": 64, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i4": 4, "u64": 64,
                "u32": 32, "u16": 16, "u8": 8, "u4": 4, "boolean": 8}
STORED_INTEGERS = ("i8", "u8", "i4", "u4")
PASSED_ON = {"Convert", "Multiply", "Subtract", "Reshape", "Transpose", "FakeQuantize"}  # from stored weights to a layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenvinoFile:
    """What a checked IR holds.

    Args:
        graph: XML with the operators and the edges alone, written anew from what was checked.
        numbers: the content of the `.bin` file.
        parameters: the number of stored numbers.
        layers: convolutions and matrix products with stored weights, by name: whether these are integers of 8 bits or less.
        batch: the only number of images that a call may have, or None where the file takes any.
        channels_last: whether the input is (N, H, W, C).
    """

    graph: bytes
    numbers: bytes
    parameters: int
    layers: dict[str, bool]
    batch: int | None
    channels_last: bool


class _Elements(ElementTree.TreeBuilder):
    """Builds the elements of a graph, without its texts' white space. Raises ValueError for more depth than a graph has."""

    depth = 0

    def start(self, tag: Any, attrs: Any) -> ElementTree.Element:
        self.depth += 1
        if self.depth > MAX_GRAPH_DEPTH or any(len(text) > MAX_ATTRIBUTE for text in attrs.values()):
            raise ValueError("elements lie deeper inside one another, or attributes are longer, than those of a graph")
        return super().start(tag, attrs)

    def end(self, tag: Any) -> ElementTree.Element:
        self.depth -= 1
        return super().end(tag)

    def data(self, data: Any) -> None:
        if data.strip():
            super().data(data)


def _parsed(path: Path) -> ElementTree.Element:
    """Return the root of a graph. Raise VerificationError for what is not plain XML of a graph's size."""
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise VerificationError(f"{path}: {path.stat().st_size:,} bytes are over the limit of {MAX_GRAPH_BYTES:,} for a "
                                "graph in XML")
    content = path.read_bytes()
    if b"\0" in content or b"<!" in content or content.count(b"<") > MAX_GRAPH_TAGS:
        raise VerificationError(f"{path}: expected the XML of an OpenVINO IR in UTF-8: elements alone, no declarations, at "
                                f"most {MAX_GRAPH_TAGS:,}")
    parser = ElementTree.XMLParser(target=_Elements(), encoding="utf-8")
    try:
        parser.feed(content)
        root: ElementTree.Element = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise VerificationError(f"{path}: not the XML of an OpenVINO IR: {first_line(error)}") from error
    if root.tag != "net" or root.get("version") not in ("10", "11") or root.find("layers") is None:
        raise VerificationError(f"{path}: not an OpenVINO IR of version 10 or 11: the root is {root.tag[:40]!r}, version "
                                f"{str(root.get('version'))[:20]!r}")
    return root


def compact_graph(path: Path) -> bytes:
    """Return a graph without white space and without notes on how it was made: the same graph in four fifths of the bytes.

    Raises:
        VerificationError: not an IR.
    """
    return _written(_parsed(path))


def _written(root: ElementTree.Element) -> bytes:
    for child in list(root):
        if child.tag not in ("layers", "edges"):
            root.remove(child)
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written


def read_openvino(path: Path, input_shape: Sequence[int], layout: str | None = None) -> OpenvinoFile:
    """Check an IR without running it: images in, one row of logits an image out.

    Args:
        path: the `.xml` file.
        input_shape: (C, H, W) of an image, also where the file takes (N, H, W, C).
        layout: "NCHW" or "NHWC" where the metadata state it.

    Raises:
        VerificationError: not an IR, operators beyond the table above, several inputs or outputs, images of another shape,
            numbers outside of the `.bin` file, NaN or infinite weights.
    """
    root = _parsed(path)
    numbers = path.with_suffix(".bin").read_bytes()
    stored: dict[tuple[int, int], int] = {}
    nodes: dict[str, ElementTree.Element] = {}
    layers = root.find("layers")
    assert layers is not None
    for node in layers:
        key, kind, version = node.get("id", ""), node.get("type", ""), node.get("version", "")
        if node.tag != "layer" or kind not in IR_OPERATORS or not version.startswith("opset") or key in nodes:
            raise VerificationError(f"{path}: operator {kind[:60]!r} of layer {node.get('name', '')[:60]!r} "
                                    f"({version[:20]!r}) is not one of those that image classifiers are made of")
        nodes[key] = node
        if kind == "Const":
            place, count = _constant(path, node, numbers)
            stored[place] = count
    image, batch = _image(path, nodes.values())
    if sum(node.get("type") == "Result" for node in nodes.values()) != 1:
        raise VerificationError(f"{path}: expected one output")
    return OpenvinoFile(graph=_written(root), numbers=numbers, parameters=sum(stored.values()),
                        layers=_stored_layers(root, nodes), batch=batch,
                        channels_last=takes_channels_last(path, image, input_shape, layout))


def _numbers(path: Path, text: str) -> list[int]:
    """Return whole numbers that stand between commas; an open size ("?") is 0."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    plain = ["0" if part in ("?", "-1") else part for part in parts]
    if len(plain) > 8 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in plain):
        raise VerificationError(f"{path}: expected a shape of at most 8 sizes, got {text[:60]!r}")
    return [int(part) for part in plain]


def _constant(path: Path, node: ElementTree.Element, numbers: bytes) -> tuple[tuple[int, int], int]:
    """Return where the numbers of a constant lie, and how many there are.

    Raises:
        VerificationError: outside of the file, not as many as the shape says, or not finite.
    """
    data = node.find("data")
    stated = data.attrib if data is not None else {}
    name, kind, shape = node.get("name", "")[:60], stated.get("element_type", ""), _numbers(path, stated.get("shape", ""))
    place = stated.get("offset", ""), stated.get("size", "")
    if kind not in ELEMENT_BITS or not all(text.isascii() and text.isdigit() and len(text) < 12 for text in place):
        raise VerificationError(f"{path}: constant {name!r} is of the type {kind[:20]!r} at {place}, expected numbers in "
                                "the .bin file")
    offset, size = map(int, place)
    count = math.prod(shape)
    if size != (count * ELEMENT_BITS[kind] + 7) // 8 or offset + size > len(numbers):
        raise VerificationError(f"{path}: constant {name!r} has {size:,} bytes at {offset:,} of {len(numbers):,}, its "
                                f"shape {shape} of {kind} needs {(count * ELEMENT_BITS[kind] + 7) // 8:,}")
    plain = kind in ("f16", "f32", "f64")
    if plain and not np.isfinite(np.frombuffer(numbers, f"<f{ELEMENT_BITS[kind] // 8}", count, offset)).all():
        raise VerificationError(f"{path}: constant {name!r} holds NaN or infinite values")
    return (offset, size), count


def _image(path: Path, nodes: Iterable[ElementTree.Element]) -> tuple[list[int], int | None]:
    """Return the sizes of the only input, 0 where they are open, and the only number of images that it takes."""
    inputs = [node for node in nodes if node.get("type") == "Parameter"]
    if len(inputs) != 1:
        raise VerificationError(f"{path}: expected one input, got {len(inputs)}")
    data = inputs[0].find("data")
    stated = data.attrib if data is not None else {}
    dims = _numbers(path, stated.get("shape", ""))
    if stated.get("element_type") != "f32" or len(dims) != 4:
        raise VerificationError(f"{path}: expected an input of float32 (N, C, H, W) or (N, H, W, C), got "
                                f"{str(stated.get('element_type'))[:20]} with {len(dims)} dimensions")
    return dims, dims[0] or None


def _stored_layers(root: ElementTree.Element, nodes: dict[str, ElementTree.Element]) -> dict[str, bool]:
    """Return the layers with stored weights by name, and whether these are stored as integers."""
    sources: dict[tuple[str, str], str] = {}
    for edge in root.iterfind("edges/edge"):
        sources[edge.get("to-layer", ""), edge.get("to-port", "")] = edge.get("from-layer", "")
    found = {}
    for key, node in nodes.items():
        if node.get("type") not in ("Convolution", "GroupConvolution", "MatMul"):
            continue
        at: str | None = sources.get((key, "1"))
        for _ in range(len(PASSED_ON)):
            if at is None or nodes.get(at) is None or nodes[at].get("type") not in PASSED_ON:
                break
            at = sources.get((at, "0"))
        if at in nodes and nodes[at].get("type") == "Const":
            data = nodes[at].find("data")
            found[node.get("name", "").removesuffix("/WithoutBiases")] = (
                data is not None and data.get("element_type") in STORED_INTEGERS)
    return found


# ------------------------------------------------------------------------------- what the runtime makes of the graph


def ir_costs(path: Path, model: Any, batch: int) -> tuple[int, dict[str, int]]:
    """Return the multiply-adds for one image, and the other steps of each operator as the layer table counts them.

    Args:
        path: for messages.
        model: an OpenVINO model for inputs of one shape.
        batch: images of that shape.

    Raises:
        VerificationError: a shape is not known before running, or over the limits.
    """
    macs, work, total = 0, {}, 0
    for operator in model.get_ordered_ops():
        kind, name = operator.get_type_name(), operator.get_friendly_name()
        written = [_shape(path, name, operator.output(index)) for index in range(operator.get_output_size())]
        read = [_shape(path, name, operator.input_value(index)) for index in range(operator.get_input_size())]
        elements = sum(map(math.prod, written))
        total += elements
        if elements > MAX_ACTIVATION_ELEMENTS or total > MAX_TOTAL_ELEMENTS:
            raise VerificationError(f"{path}: {name!r} has {elements:,} elements, {total:,} with those before, over the "
                                    f"limits of {MAX_ACTIVATION_ELEMENTS:,} and {MAX_TOTAL_ELEMENTS:,}")
        steps = elements + sum(map(math.prod, read))
        attributes = operator.get_attributes() if kind in ("MatMul", "AvgPool", "MaxPool", "LRN") else {}
        if kind == "Convolution":
            macs += elements * math.prod(read[1][1:])
        elif kind == "GroupConvolution":
            macs += elements * math.prod(read[1][2:])
        elif kind == "MatMul":
            macs += elements * (read[0][-2 if attributes.get("transpose_a") and len(read[0]) > 1 else -1] if read[0] else 1)
        elif kind in ("Einsum", "ScaledDotProductAttention"):
            macs += elements * max(max(shape, default=1) for shape in read)
        elif kind in ("AvgPool", "MaxPool"):
            steps += elements * math.prod(min(window, size) for window, size in zip(attributes["kernel"], read[0][2:],
                                                                                    strict=False))
        elif kind == "LRN":
            steps += elements * int(attributes["size"])
        elif kind == "Interpolate":
            steps += 16 * steps
        work[name] = steps // batch
    return macs // batch, work


def _shape(path: Path, name: str, output: Any) -> list[int]:
    shape = output.get_partial_shape()
    if not shape.is_static:
        raise VerificationError(f"{path}: the shape of {name[:60]!r} is not known before running")
    return [int(size) for size in shape.to_shape()]
