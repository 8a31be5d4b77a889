"""Convolutions, matrix products and pools of a network in a `.tflite` file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from compress.packaging.litert.graph import StoredLevels, attributes
from compress.packaging.litert.model import Grid, Placed
from compress.packaging.litert.writer import IMAGES, LitertWriter

LOWEST = float(np.finfo(np.float32).min)


def convolution(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Conv, depthwise and grouped ones too, with the activation behind it."""
    options, graph, schema = attributes(node), writer.graph, writer.schema
    if node.input[1] not in graph.constants:
        raise writer.unable(node, "its weights are not constants")
    filters = graph.constants[node.input[1]]
    if filters.ndim != 4:
        raise writer.unable(node, f"a convolution over {filters.ndim - 2} axes; expected height and width")
    outputs, groups = len(filters), options.get("group", 1)
    strides, dilations = (options.get(name, [1, 1]) for name in ("strides", "dilations"))
    kernel = [(size - 1) * step + 1 for size, step in zip(filters.shape[2:], dilations, strict=True)]
    name, activation = writer.activated(node.output[0])
    given, grid, stored = _factors(writer, node, name)
    given, padding = padded(writer, node, writer.images(given, node), kernel, strides)
    depthwise = filters.shape[1] == 1 and groups == graph.shape(node.input[0])[1] and groups > 1
    order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)  # (1, H, W, out) or (out, H, W, in / groups)
    weight, bias = _parameters(writer, node, stored, given.grid, order, 3 if depthwise else 0, outputs)
    shared: dict[str, Any] = dict(padding=padding, strideH=strides[0], strideW=strides[1], dilationHFactor=dilations[0],
                                  dilationWFactor=dilations[1], fusedActivationFunction=activation)
    if depthwise:
        kind, chosen = "DEPTHWISE_CONV_2D", schema.DepthwiseConv2DOptionsT(depthMultiplier=outputs // groups, **shared)
    else:
        kind, chosen = "CONV_2D", schema.Conv2DOptionsT(**shared)
    writer.give(name, writer.operator(
        kind, node.name, [given, weight, bias], writer.image_shape(name), IMAGES, grid, chosen))


def matrix_product(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Gemm, or a MatMul with constant weights, with the bias and the activation behind it."""
    options, graph = attributes(node), writer.graph
    if node.input[1] not in graph.constants or graph.constants[node.input[1]].ndim != 2:
        batch_product(writer, node)
        return
    if options.get("transA") or options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
        raise writer.unable(node, "with transA, alpha or beta")
    transposed = bool(options.get("transB")) if node.op_type == "Gemm" else False
    outputs = graph.constants[node.input[1]].shape[0 if transposed else 1]
    name, bias_name = node.output[0], node.input[2] if len(node.input) > 2 else ""
    adding = graph.only_consumer(name)
    if node.op_type == "MatMul" and adding is not None and adding.op_type == "Add":
        other = next((each for each in adding.input if each != name), "")
        if other in graph.constants and other not in graph.stored and graph.constants[other].shape == (outputs,):
            bias_name, name = other, adding.output[0]
            writer.done.add(name)
    name, activation = writer.activated(name)
    given, grid, stored = _factors(writer, node, name)
    last = len(given.order) - 1
    if given.order[-1] != last:  # rows of features, in any order of rows
        given = writer.reordered(given, [*(axis for axis in given.order if axis != last), last])
    weight, bias = _parameters(writer, node, stored, given.grid, (0, 1) if transposed else (1, 0), 0, outputs, bias_name)
    writer.give(name, writer.operator(
        "FULLY_CONNECTED", node.name, [given, weight, bias], (*given.shape[:-1], outputs), given.order, grid,
        writer.schema.FullyConnectedOptionsT(fusedActivationFunction=activation, keepNumDims=last > 1)))


def batch_product(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a MatMul of two tensors, in float."""
    if node.op_type == "Gemm":
        raise writer.unable(node, "its weights are not a constant matrix")
    shapes = [writer.graph.shape(name) for name in node.input]
    axes = max(map(len, shapes))
    first, second = (aligned(writer, writer.value(name), axes) for name in node.input)
    plain, swapped = tuple(range(axes)), (*range(axes - 2), axes - 1, axes - 2)
    first, second = (each if each.order in (plain, swapped) else writer.plain(each) for each in (first, second))
    rows, columns = shapes[0][-2], shapes[1][-1]
    batch = np.broadcast_shapes(*(shape[:-2] for shape in shapes))
    writer.give(node.output[0], writer.operator(
        "BATCH_MATMUL", node.name, [first, second], (*batch, rows, columns), plain, None,
        writer.schema.BatchMatMulOptionsT(adjX=first.order != plain, adjY=second.order != plain)))


def aligned(writer: LitertWriter, placed: Placed, axes: int) -> Placed:
    """Return a tensor with axes of one element before its own, as NumPy broadcasts it."""
    more = axes - len(placed.order)
    if not more:
        return placed
    order = (*range(more), *(axis + more for axis in placed.order))
    return writer.reshaped(placed, (*[1] * more, *placed.shape), order)


def _factors(writer: LitertWriter, node: onnx.NodeProto, name: str) -> tuple[Placed, Grid | None, StoredLevels | None]:
    """Return a layer's input, the grid of its output and its stored weights; float32, None, None where it stays float."""
    whole, grid, stored = writer.integers(node.input[0]), writer.target(name), writer.graph.stored.get(node.input[1])
    if whole is None or grid is None or stored is None or stored.levels.dtype != np.int8 or stored.zero_points.any():
        return writer.value(node.input[0]), None, None
    return whole, grid, stored


def _parameters(writer: LitertWriter, node: onnx.NodeProto, stored: StoredLevels | None, grid: Grid | None,
                order: Sequence[int], axis: int, outputs: int, bias_name: str | None = None) -> tuple[int, int]:
    """Add a layer's weights and bias. Return the numbers of their tensors.

    Args:
        writer, node: the file and the layer.
        stored: the weights of an integer layer.
        grid: of the input of an integer layer.
        order: of the axes of the weights in the file.
        axis: that of the output channels, there.
        outputs: output channels.
        bias_name: of the bias; the layer's third input unless given.
    """
    if bias_name is None:
        bias_name = node.input[2] if len(node.input) > 2 else ""
    floats = writer.graph.constants
    bias: NDArray[Any] = floats[bias_name].reshape(-1) if bias_name else np.zeros(outputs, np.float32)
    if bias.shape != (outputs,):
        bias = np.broadcast_to(bias, outputs)
    if stored is None or grid is None:
        weight = writer.file.constant(floats[node.input[1]].transpose(order).astype(np.float32))
        return weight, writer.file.constant(bias.astype(np.float32))
    scales = np.broadcast_to(stored.scales, outputs)
    weight = writer.file.constant(stored.levels.transpose(order), scales=scales, axis=axis)
    # As ONNX Runtime rounds a bias. The file states no scale for it: it follows from the others, and would be larger.
    levels = np.rint(bias.astype(np.float32) / (np.float32(grid.scale) * scales))
    limits = np.iinfo(np.int32)
    return weight, writer.file.constant(levels.clip(limits.min, limits.max).astype(np.int32),
                                        scales=np.float32(grid.scale) * scales)


def padded(writer: LitertWriter, node: onnx.NodeProto, given: Placed, kernel: Sequence[int], strides: Sequence[int],
           value: float = 0.0) -> tuple[Placed, int]:
    """Return a layer's input, padded where the runtime's own paddings do not fit, and the padding that the layer states.

    Args:
        writer, node: the file and the layer.
        given: (N, H, W, C).
        kernel: height and width, dilated.
        strides: of both.
        value: that the padding stands for.
    """
    pads, schema = attributes(node).get("pads", [0, 0, 0, 0]), writer.schema
    pads = [0, pads[0], 0, pads[1]] if len(pads) == 2 else pads
    if attributes(node).get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise writer.unable(node, "with auto_pad")
    sizes = given.shape[1:3]
    written = writer.image_shape(node.output[0])[1:3]
    before = pads[:2]  # behind the image, only what the last windows reach for counts
    behind = [max((count - 1) * step + reach - size - first, 0) for count, step, reach, size, first in zip(
        written, strides, kernel, sizes, before, strict=True)]
    if not any((*before, *behind)):
        return given, schema.Padding.VALID
    totals = [max((count - 1) * step + reach - size, 0) for count, step, reach, size in zip(
        written, strides, kernel, sizes, strict=True)]  # TensorFlow's SAME, which puts the odd one behind
    same = [-(-size // step) for size, step in zip(sizes, strides, strict=True)] == list(written)
    if same and list(before) == [total // 2 for total in totals] and behind == [total - total // 2 for total in totals]:
        return given, schema.Padding.SAME
    widths = writer.numbers(np.array([[0, 0], [before[0], behind[0]], [before[1], behind[1]], [0, 0]]))
    shape = (given.shape[0], *(first + size + last for first, size, last in zip(before, sizes, behind, strict=True)),
             given.shape[3])
    if value == 0:  # of levels, that is their zero point
        return writer.operator("PAD", f"{node.name}.padded", [given, widths], shape, IMAGES, given.grid,
                               schema.PadOptionsT()), schema.Padding.VALID
    filling = (writer.file.constant(np.array(-128, np.int8), given.grid) if given.grid else
               writer.file.constant(np.array(value, np.float32)))
    return writer.operator("PADV2", f"{node.name}.padded", [given, widths, filling], shape, IMAGES, given.grid,
                           schema.PadV2OptionsT()), schema.Padding.VALID


def pool(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a MaxPool or an AveragePool."""
    options, schema = attributes(node), writer.schema
    kernel, strides = options["kernel_shape"], options.get("strides", [1, 1])
    if len(kernel) != 2 or any(step != 1 for step in options.get("dilations", [1, 1])):
        raise writer.unable(node, "with dilation, or over other axes than height and width")
    largest = node.op_type == "MaxPool"
    given = writer.integers(node.input[0])
    alike = given is not None and given.grid == writer.target(node.output[0]) and not any(options.get("pads", []))
    if given is None or not (largest or alike):
        given = writer.value(node.input[0])  # an average is rounded once, on the grid of the output
    given = writer.images(given, node)
    shape = writer.image_shape(node.output[0])
    inside, padding = padded(writer, node, given, kernel, strides, LOWEST if largest else 0.0)
    pooled = writer.operator(
        "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D", node.name, [inside], shape, IMAGES, given.grid,
        schema.Pool2DOptionsT(padding=padding, strideH=strides[0], strideW=strides[1], filterHeight=kernel[0],
                              filterWidth=kernel[1]))
    if not largest and inside is not given and not options.get("count_include_pad"):
        shares = np.outer(*(_counted(*axis) for axis in zip(
            given.shape[1:3], shape[1:3], kernel, strides, options["pads"][:2], strict=True)))
        factor = writer.file.constant((np.prod(kernel) / shares).astype(np.float32)[..., None])
        pooled = writer.operator("MUL", f"{node.name}.inside", [pooled, factor], shape, IMAGES,
                                 options=schema.MulOptionsT())
    elif not largest and padding == schema.Padding.SAME and options.get("count_include_pad"):
        raise writer.unable(node, "counting the padding")
    writer.give(node.output[0], pooled)


def _counted(size: int, count: int, kernel: int, step: int, before: int) -> NDArray[Any]:
    """Return how many of a window's rows, or columns, lie inside the image, for each window."""
    starts = np.arange(count) * step - before
    return np.minimum(starts + kernel, size) - np.maximum(starts, 0)


def resize(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Resize as the layer table writes it: to the nearest pixel of a whole multiple, or linear between centres."""
    options, schema = attributes(node), writer.schema
    kind = options.get("mode", b"nearest"), options.get("coordinate_transformation_mode", b"half_pixel")
    whole = writer.integers(node.input[0])
    shape = writer.image_shape(node.output[0])
    size = writer.numbers(shape[1:3])
    if kind == (b"nearest", b"asymmetric") and options.get("nearest_mode") == b"floor":
        given = writer.images(writer.value(node.input[0]) if whole is None else whole, node)
        writer.give(node.output[0], writer.operator("RESIZE_NEAREST_NEIGHBOR", node.name, [given, size], shape, IMAGES,
                                                    given.grid, schema.ResizeNearestNeighborOptionsT()))
    elif kind == (b"linear", b"half_pixel"):
        given = writer.images(writer.value(node.input[0]), node)
        writer.give(node.output[0], writer.operator("RESIZE_BILINEAR", node.name, [given, size], shape, IMAGES,
                                                    options=schema.ResizeBilinearOptionsT(halfPixelCenters=True)))
    else:
        raise writer.unable(node, f"{kind[0].decode()} with {kind[1].decode()} coordinates")


def global_pool(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a GlobalAveragePool or a GlobalMaxPool."""
    name, schema = node.output[0], writer.schema
    whole, grid = writer.integers(node.input[0]), writer.target(name)
    largest = node.op_type == "GlobalMaxPool"
    if largest:
        given = writer.images(writer.value(node.input[0]) if whole is None else whole, node)
        writer.give(name, writer.operator(
            "MAX_POOL_2D", node.name, [given], writer.image_shape(name), IMAGES, given.grid,
            schema.Pool2DOptionsT(padding=schema.Padding.VALID, strideH=1, strideW=1, filterHeight=given.shape[1],
                                  filterWidth=given.shape[2])))
        return
    given = writer.images(writer.value(node.input[0]) if whole is None or grid is None else whole, node)
    writer.give(name, writer.operator("MEAN", node.name, [given, writer.numbers([1, 2])], writer.image_shape(name), IMAGES,
                                      grid if given.grid else None, schema.ReducerOptionsT(keepDims=True)))
