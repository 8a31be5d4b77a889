"""Count what the nodes of an ONNX graph cost, from the shapes of their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# The input whose shape gives the multiply-adds of one output number: a weight (out, in/groups, ...), or rows of a matrix.
ONNX_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "FusedConv": 1, "QLinearConv": 3}
ONNX_PRODUCTS = {"Gemm", "FusedGemm", "MatMul", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "FusedMatMul"}
# ONNX infers no shapes for these, so that their multiply-adds are no part of a file's count; they are part of its work.
INTEGER_PRODUCTS = {"QGemm": 3, "MatMulIntegerToFloat": 1}
POOLS = {"AveragePool", "MaxPool", "QLinearAveragePool"}
UNKNOWN_OUTPUT = 2**14  # numbers of a pool whose shape is not known before running
Shapes = Mapping[str, list[int]]


def onnx_macs(nodes: Iterable[Any], shapes: Shapes) -> tuple[int | None, int]:
    """Return the multiply-adds of the convolutions and matrix products for one call, and those that are known.

    A product of elements that a ReduceSum takes is a matrix product, too. The first is None where a shape is not known
    before running, or an Einsum has three tensors or more: its multiply-adds depend on their order, the second is a bound.
    """
    nodes = list(nodes)
    summed = {node.input[0] for node in nodes if node.op_type == "ReduceSum" and node.input}
    total, complete = 0, True
    for node in nodes:
        if node.op_type == "Einsum":
            products = _einsum_macs(node, shapes)
            total += products or 0
            complete &= products is not None and len(node.input) < 3
        if node.op_type == "Mul" and node.output[0] in summed:
            total += math.prod(shapes.get(node.output[0], [0]))
            complete &= node.output[0] in shapes
        if node.op_type not in ONNX_CONVOLUTIONS and node.op_type not in ONNX_PRODUCTS:
            continue
        which = ONNX_CONVOLUTIONS.get(node.op_type, 0)
        factors = shapes.get(node.input[which]) if len(node.input) > which else None
        output = shapes.get(node.output[0])
        if not factors or output is None:
            complete = False
        elif node.op_type in ONNX_CONVOLUTIONS:
            total += math.prod(output) * math.prod(factors[1:])
        else:
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += math.prod(output) * factors[-2 if transposed and len(factors) > 1 else -1]
    return total if complete else None, total


def onnx_work(nodes: Iterable[Any], shapes: Shapes, batch: int) -> dict[str, int]:
    """Return the steps of each node for one image beside the multiply-adds of `onnx_macs`, as the layer table counts them.

    A tensor whose shape is not known before running counts as nothing, but for the output of a pool.

    Args:
        nodes: of the graph.
        shapes: of the tensors, for one call.
        batch: images in that call.
    """
    work = {}
    for index, node in enumerate(nodes):
        attributes = {attribute.name: attribute for attribute in node.attribute}
        read = sum(math.prod(shapes[name]) for name in node.input if name in shapes)
        written = sum(math.prod(shapes[name]) for name in node.output if name in shapes)
        steps = read + written
        if node.op_type in POOLS:
            window = attributes["kernel_shape"].ints if "kernel_shape" in attributes else []
            image = shapes.get(node.input[0], [])[2:]
            seen = math.prod(map(min, window, image) if len(image) == len(window) else window)
            steps += (written or UNKNOWN_OUTPUT) * seen
        elif node.op_type == "LRN":
            steps += written * (attributes["size"].i if "size" in attributes else 1)
        elif node.op_type == "Resize":  # a window of four by four, or with antialias one that grows as the image shrinks
            steps += 16 * (read + written)
        elif node.op_type in INTEGER_PRODUCTS and len(node.input) > INTEGER_PRODUCTS[node.op_type]:
            second = shapes.get(node.input[INTEGER_PRODUCTS[node.op_type]]) or [0]
            transposed = "transB" in attributes and attributes["transB"].i
            steps += math.prod(shapes.get(node.input[0], [0])) * second[-2 if transposed and len(second) > 1 else -1] // 100
        work[f"{node.name or node.op_type} ({index})"] = steps // batch  # names of nodes need not be their own
    return work


def _einsum_macs(node: Any, shapes: Shapes) -> int | None:
    """Return the multiply-adds of an Einsum: the product of the sizes of all its letters and of what its dots stand for.

    An Einsum of one tensor has none. None: a shape is not known, or does not fit its term.
    """
    if len(node.input) < 2:
        return 0
    equation = next((attribute.s.decode(errors="replace") for attribute in node.attribute), "")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    if len(terms) != len(node.input):
        return None
    for term, name in zip(terms, node.input, strict=True):
        before, dots, after = term.partition("...")
        shape = shapes.get(name)
        hidden = len(shape) - len(before) - len(after) if shape is not None else -1
        if shape is None or hidden < 0 or (hidden and not dots):
            return None
        names = [*before, *(f".{place}" for place in range(hidden, 0, -1)), *after]  # dots are counted from the last
        for letter, size in zip(names, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())
