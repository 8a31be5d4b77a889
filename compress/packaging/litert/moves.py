"""Operators of a `.tflite` file that move numbers and change none of them: int8 stays on its grid."""

from __future__ import annotations

import math

import onnx

from compress.packaging.litert.elements import one_number
from compress.packaging.litert.graph import attributes
from compress.packaging.litert.layers import aligned
from compress.packaging.litert.model import Placed
from compress.packaging.litert.writer import LitertWriter


def moved(writer: LitertWriter, name: str) -> Placed:
    """Return a tensor of the network in int8 where it is levels, else in float: moving numbers changes none of them."""
    whole = writer.integers(name) if name not in writer.graph.constants else None
    return writer.value(name) if whole is None else whole


def reshape(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Reshape or Flatten."""
    placed = moved(writer, node.input[0])
    if not writer.in_sequence(placed, range(len(placed.order))):
        placed = writer.plain(placed)
    writer.give(node.output[0], writer.reshaped(placed, writer.graph.shape(node.output[0])))


def transpose(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Permute the axes: of the file's tensor, only what they mean changes."""
    placed = moved(writer, node.input[0])
    axes = attributes(node).get("perm", list(range(len(placed.order)))[::-1])
    writer.give(node.output[0], Placed(index=placed.index, shape=placed.shape, grid=placed.grid,
                                       order=tuple(axes.index(axis) for axis in placed.order)))


def concat(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Concat; between grids, each input is first rounded to the grid of the output."""
    grid, name = writer.target(node.output[0]), node.output[0]
    whole = [moved(writer, each) for each in node.input]
    if grid is None or any(each.grid is None for each in whole):
        parts = [writer.value(each) for each in node.input]
    else:
        parts = [writer.on_grid(each, grid, f"{node.name}.part") for each in whole]
    order = max(parts, key=lambda each: math.prod(each.shape)).order
    parts = [writer.reordered(each, order) for each in parts]
    place = order.index(attributes(node)["axis"] % len(order))
    shape = list(parts[0].shape)
    shape[place] = sum(each.shape[place] for each in parts)
    writer.give(name, writer.operator("CONCATENATION", node.name, parts, shape, order, parts[0].grid,
                                      writer.schema.ConcatenationOptionsT(axis=place)))


def slices(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Slice with constant bounds and positive steps."""
    placed, constants = moved(writer, node.input[0]), writer.graph.constants
    if any(name and name not in constants for name in node.input[1:]):
        raise writer.unable(node, "its bounds are not constants")
    bounds = [constants[name].reshape(-1).tolist() if name else None for name in (*node.input[1:], "", "")[:4]]
    count = len(placed.order)
    starts, stops, steps = [0] * count, list(placed.shape), [1] * count
    for index, (start, stop) in enumerate(zip(bounds[0] or [], bounds[1] or [], strict=True)):
        place = placed.order.index((bounds[2][index] if bounds[2] else index) % count)
        step = bounds[3][index] if bounds[3] else 1
        if step < 1:
            raise writer.unable(node, "backwards")
        starts[place], stops[place], steps[place] = *slice(start, stop).indices(placed.shape[place])[:2], step
    shape = [len(range(*each)) for each in zip(starts, stops, steps, strict=True)]
    bounded: tuple[list[int], ...]
    if all(step == 1 for step in steps):
        kind, bounded, chosen = "SLICE", (starts, shape), writer.schema.SliceOptionsT()
    else:
        kind, bounded, chosen = "STRIDED_SLICE", (starts, stops, steps), writer.schema.StridedSliceOptionsT()
    writer.give(node.output[0], writer.operator(
        kind, node.name, [placed, *map(writer.numbers, bounded)], shape, placed.order, placed.grid, chosen))


def pad(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Pad with a constant."""
    options, constants = attributes(node), writer.graph.constants
    if options.get("mode", b"constant") != b"constant" or node.input[1] not in constants or len(node.input) > 3:
        raise writer.unable(node, "other than with a constant")
    value = float(constants[node.input[2]].reshape(())) if len(node.input) > 2 and node.input[2] else 0.0
    placed = moved(writer, node.input[0]) if value == 0 else writer.value(node.input[0])
    widths = constants[node.input[1]].reshape(2, -1)[:, list(placed.order)].T
    if (widths < 0).any():
        raise writer.unable(node, "with a negative padding")
    shape = [size + int(both) for size, both in zip(placed.shape, widths.sum(1), strict=True)]
    inputs: list[Placed | int] = [placed, writer.numbers(widths)]
    if value == 0:
        kind, chosen = "PAD", writer.schema.PadOptionsT()
    else:
        kind, chosen = "PADV2", writer.schema.PadV2OptionsT()
        inputs.append(one_number(writer, value))
    writer.give(node.output[0], writer.operator(kind, node.name, inputs, shape, placed.order, placed.grid, chosen))


def gather(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Gather with constant indices of one axis, or one index, which removes the axis."""
    placed, constants = moved(writer, node.input[0]), writer.graph.constants
    if node.input[1] not in constants or constants[node.input[1]].ndim > 1:
        raise writer.unable(node, "its indices are not a constant list")
    axis = attributes(node).get("axis", 0) % len(placed.order)
    place = placed.order.index(axis)
    indices = constants[node.input[1]] % placed.shape[place]
    shape = list(placed.shape)
    order = list(placed.order)
    shape[place:place + 1] = list(indices.shape)
    if not indices.ndim:
        order = [other - (other > axis) for other in order if other != axis]
    writer.give(node.output[0], writer.operator(
        "GATHER", node.name, [placed, writer.numbers(indices)], shape, order, placed.grid,
        writer.schema.GatherOptionsT(axis=place)))


def expand(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write an Expand: nothing where it only names the number of images, which is one here."""
    placed, shape = moved(writer, node.input[0]), writer.graph.shape(node.output[0])
    placed = aligned(writer, placed, len(shape))
    wanted = [shape[axis] for axis in placed.order]
    if tuple(wanted) != placed.shape:
        placed = writer.operator("BROADCAST_TO", node.name, [placed, writer.numbers(wanted)], wanted, placed.order,
                                 placed.grid, writer.schema.BroadcastToOptionsT())
    writer.give(node.output[0], placed)
