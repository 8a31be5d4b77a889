"""The network's tensors in a `.tflite` file under construction: where each lies, in which order of axes, on which grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from compress.packaging.litert.graph import NetworkGraph, attributes
from compress.packaging.litert.model import Grid, ModelBuilder, Placed
from metadata.errors import UserError

IMAGES = (0, 2, 3, 1)  # the order of the axes of images in the file
MAX_AXES = 6  # of a tensor that an operator of the runtime moves

Handler = Callable[["LitertWriter", onnx.NodeProto], None]


class LitertWriter:
    """The file under construction, and what is known of the network's tensors in it.

    Args:
        model: the network.
        handlers: what writes a node, by its operator.

    Attributes:
        graph: the network.
        file: the file.
        floats: float32 tensors of the file by the name of the network's tensor.
        levels: int8 tensors of the file by the name of the network's levels.
        results: int8 tensors that stand for float tensors of the network: results of integer operators.
        done: names of nodes that were written together with another one.
    """

    def __init__(self, model: onnx.ModelProto, handlers: Mapping[str, Handler]) -> None:
        self.handlers = handlers
        self.graph, self.file = NetworkGraph(model), ModelBuilder()
        self.schema = self.file.schema
        self.floats: dict[str, Placed] = {}
        self.levels: dict[str, Placed] = {}
        self.results: dict[str, Placed] = {}
        self.done: set[str] = set()

    def write(self) -> tuple[int, int]:
        """Write all nodes. Return the numbers of the input and of the output."""
        _, channels, height, width = self.graph.shape(self.graph.input)
        shape = (1, height, width, channels)
        images = self.file.tensor("images", shape)
        self.floats[self.graph.input] = Placed(index=images, shape=shape, order=IMAGES)
        for node in self.graph.nodes:
            if node.output[0] in self.done:
                continue
            if node.op_type == "QuantizeLinear":
                self.levels[node.output[0]] = self._quantized(node)
            elif node.op_type != "DequantizeLinear":  # which is written where somebody needs its floats
                if node.op_type not in self.handlers:
                    raise self.unable(node, "no operator of a .tflite file does that")
                self.handlers[node.op_type](self, node)
        return images, self.plain(self.value(self.graph.output)).index

    # ------------------------------------------------------------------------------------------------- reading tensors

    def value(self, name: str) -> Placed:
        """Return a tensor of the network in float32."""
        if name in self.floats:
            return self.floats[name]
        if name in self.graph.constants:
            return self.constant(self.graph.constants[name])
        whole = self.integers(name)
        assert whole is not None, name
        self.floats[name] = self.operator("DEQUANTIZE", name, [whole], whole.shape, whole.order, int8=True)
        return self.floats[name]

    def integers(self, name: str) -> Placed | None:
        """Return a tensor of the network in int8, if the network restores it from levels."""
        if name in self.results:
            return self.results[name]
        if name in self.graph.levels_of:
            return self.levels[self.graph.levels_of[name]]
        stored = self.graph.stored.get(name)
        if stored is None or stored.scales.size > 1:
            return None
        unsigned = stored.levels.dtype == np.uint8
        grid = Grid(float(stored.scales[0]), int(stored.zero_points[0]) - 128 * unsigned)
        levels = (stored.levels.astype(np.int16) - 128 * unsigned).astype(np.int8)
        index = self.file.constant(levels, grid)
        return Placed(index=index, shape=levels.shape, order=tuple(range(levels.ndim)), grid=grid)

    def constant(self, values: NDArray[Any]) -> Placed:
        """Add float32 or int32 values to the file."""
        kind = np.float32 if values.dtype.kind == "f" else np.int32
        values = np.asarray(values).astype(kind)
        return Placed(index=self.file.constant(values), shape=values.shape, order=tuple(range(values.ndim)))

    def numbers(self, values: Sequence[int] | NDArray[Any]) -> int:
        """Return the number of a tensor of whole numbers, such as a shape."""
        return self.file.constant(np.asarray(values, np.int32))

    # ------------------------------------------------------------------------------------------------- writing tensors

    def operator(self, kind: str, name: str, inputs: Sequence[Placed | int], shape: Sequence[int], order: Sequence[int],
                 grid: Grid | None = None, options: Any = None, int8: bool | None = None) -> Placed:
        """Add an operator and return its output. See `ModelBuilder.operator`; int8: as the grid says unless given."""
        output = self.file.tensor(name, shape, "int8" if grid else "float32", grid=grid)
        self.file.operator(kind, [each.index if isinstance(each, Placed) else each for each in inputs], output, options,
                           int8=grid is not None if int8 is None else int8)
        return Placed(index=output, shape=tuple(shape), order=tuple(order), grid=grid)

    def give(self, name: str, placed: Placed) -> None:
        """Take down the tensor of the file that stands for one of the network's."""
        (self.floats if placed.grid is None else self.results)[name] = placed

    def unary(self, node: onnx.NodeProto, kind: str, options: Any = None) -> None:
        """Write an operator that changes neither shape nor order, in float."""
        given = self.value(node.input[0])
        self.give(node.output[0], self.operator(kind, node.name, [given], given.shape, given.order, options=options))

    def on_grid(self, placed: Placed, grid: Grid, name: str) -> Placed:
        """Return a tensor in int8 on a grid: floats are rounded, levels of another grid rounded again."""
        if placed.grid == grid:
            return placed
        return self.operator("QUANTIZE", name, [placed], placed.shape, placed.order, grid)

    def _quantized(self, node: onnx.NodeProto) -> Placed:
        grid, name = self.graph.grids[node.output[0]], node.input[0]
        whole = self.integers(name) if name not in self.floats else None
        return self.on_grid(self.value(name) if whole is None else whole, grid, f"{node.name}.levels")

    def target(self, name: str) -> Grid | None:
        """Return the grid that a tensor of the network is rounded to at once; None where somebody reads its floats."""
        reader = self.graph.only_consumer(name)
        return self.graph.grids[reader.output[0]] if reader is not None and reader.op_type == "QuantizeLinear" else None

    def activated(self, name: str) -> tuple[str, int]:
        """Return the tensor behind an activation that a layer can compute itself, and the activation's number.

        The activation counts as written then. Without one, the tensor itself and 0.
        """
        reader = self.graph.only_consumer(name)
        kinds = self.schema.ActivationFunctionType
        if reader is None or reader.op_type not in ("Relu", "Clip") or reader.input[0] != name:
            return name, kinds.NONE
        if reader.op_type == "Clip" and self.limits(reader) != (0.0, 6.0):
            return name, kinds.NONE
        self.done.add(reader.output[0])
        return reader.output[0], kinds.RELU6 if reader.op_type == "Clip" else kinds.RELU

    def limits(self, node: onnx.NodeProto) -> tuple[float | None, float | None]:
        """Return the two limits of a Clip."""
        found: list[float | None] = []
        for place, key in ((1, "min"), (2, "max")):
            name = node.input[place] if len(node.input) > place else ""
            if name and name not in self.graph.constants:
                raise self.unable(node, "its limits are not constants")
            found.append(float(self.graph.constants[name].reshape(())) if name else attributes(node).get(key))
        return found[0], found[1]

    # ------------------------------------------------------------------------------------------------- order of axes

    def reordered(self, placed: Placed, order: Sequence[int]) -> Placed:
        """Return a tensor with its axes in another order. Where only axes of one element move, nothing is moved."""
        order = tuple(order)
        if placed.order == order:
            return placed
        moves = [placed.order.index(axis) for axis in order]
        shape = tuple(placed.shape[place] for place in moves)
        if self.in_sequence(placed, order):
            return self.reshaped(placed, shape, order)
        groups, sizes = _joined_axes(moves, placed.shape)
        if len(groups) > MAX_AXES:
            raise UserError(f"export.format litert: a tensor of shape {list(placed.shape)} is permuted in {len(groups)} "
                            f"parts; the runtime moves {MAX_AXES} axes at most")
        joined = self.reshaped(placed, sizes, range(len(sizes)))
        moved_shape = [sizes[place] for place in groups]
        moved = self.operator("TRANSPOSE", "transposed", [joined, self.numbers(groups)], moved_shape, groups, placed.grid,
                              self.schema.TransposeOptionsT())
        return self.reshaped(moved, shape, order)

    def in_sequence(self, placed: Placed, order: Sequence[int]) -> bool:
        """Tell whether a tensor's numbers lie as they would with its axes in another order."""
        long = [place for place in (placed.order.index(axis) for axis in order) if placed.shape[place] > 1]
        return long == sorted(long)

    def reshaped(self, placed: Placed, shape: Sequence[int], order: Sequence[int] | None = None) -> Placed:
        """Return a tensor with another shape in the file, and the order of its axes; the network's own unless given."""
        shape, order = tuple(shape), tuple(range(len(shape)) if order is None else order)
        if placed.shape == shape:
            return Placed(index=placed.index, shape=shape, order=order, grid=placed.grid)
        return self.operator("RESHAPE", "reshaped", [placed, self.numbers(shape)], shape, order, placed.grid,
                             self.schema.ReshapeOptionsT(newShape=np.array(shape, np.int32)), int8=False)

    def plain(self, placed: Placed) -> Placed:
        """Return a tensor in the network's own order of axes."""
        return self.reordered(placed, range(len(placed.order)))

    def images(self, placed: Placed, node: onnx.NodeProto) -> Placed:
        """Return (N, C, H, W) of the network as (N, H, W, C)."""
        if len(placed.order) != 4:
            raise self.unable(node, f"its input has {len(placed.order)} axes; expected images (N, C, H, W)")
        return self.reordered(placed, IMAGES)

    def image_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of images (N, C, H, W) in the file."""
        shape = self.graph.shape(name)
        return tuple(shape[axis] for axis in IMAGES)

    def unable(self, node: onnx.NodeProto, why: str) -> UserError:
        """Return the error of an operator that has no form in a `.tflite` file."""
        return UserError(f"export.format litert: node {node.name}: {node.op_type}: {why}; keep export.format onnx")


def _joined_axes(moves: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return a permutation without axes of one element, where axes that move together are one, and the sizes before it."""
    runs: list[list[int]] = []
    for place in (place for place in moves if shape[place] > 1):
        between = range(runs[-1][-1] + 1, place) if runs else range(0)
        if runs and place > runs[-1][-1] and all(shape[other] == 1 for other in between):
            runs[-1].append(place)
        else:
            runs.append([place])
    before = sorted(runs)
    sizes = [int(np.prod([shape[place] for place in run])) for run in before]
    return [before.index(run) for run in runs], sizes
