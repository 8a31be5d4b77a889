"""Architecture -> torch.fx.GraphModule, and the shapes that the layers give, computed without allocating any tensor."""

from __future__ import annotations

import keyword
import math
from typing import TYPE_CHECKING

from architectures.architecture import Architecture
from architectures.layers.base import FunctionLayer, Shape
from architectures.program import int8_graph
from metadata.errors import VerificationError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_ACTIVATION_ELEMENTS = 2**28  # one layer's output for one image; more than this is an attack or a mistake
MAX_TOTAL_ELEMENTS = 2**31  # all layers' outputs for one image
MAX_WEIGHT_ELEMENTS = 2**31


def build(architecture: Architecture) -> torch.fx.GraphModule:
    """Build the module that an architecture describes, with the original layer names and fresh weights.

    The result trains, prunes, exports and takes `load_state_dict(strict=True)` like the module it was described from.

    Raises:
        VerificationError: a layer's name cannot be an attribute path of a module.
    """
    from torch import fx, nn

    kind = int8_graph() if architecture.is_int8 else fx.GraphModule
    graph = fx.Graph()
    nodes = {"input": graph.placeholder("input")}
    modules: dict[str, nn.Module] = {}
    for layer in architecture.layers:
        for part in layer.name.split("."):
            taken = part in ("training", "self") or hasattr(kind, part) or hasattr(nn.ModuleDict, part)
            if taken or keyword.iskeyword(part):
                raise VerificationError(f"layer {layer.name}: {part!r} is a name that torch modules keep to themselves")
        sources = [nodes[name] for name in layer.inputs]
        if isinstance(layer, FunctionLayer):
            node = graph.create_node("call_function", *layer.call(sources), name=layer.name)
        else:
            modules[layer.name] = layer.module()
            node = graph.create_node("call_module", layer.name, tuple(sources))
        node.meta["layer"] = layer.name
        nodes[layer.name] = node
    graph.output(node)
    return kind(modules, graph, class_name=architecture.model_type)


def check_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return each layer's output shape for one image. Nothing is allocated or computed.

    Raises:
        VerificationError: a layer cannot take what its inputs give (named), mixes the images of a batch, or is
            absurdly large; or the last layer's shape is not the declared one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    count = total = 0
    if (pixels := math.prod(architecture.input_shape)) > MAX_ACTIVATION_ELEMENTS:
        raise VerificationError(f"input_shape {list(architecture.input_shape)}: {pixels:,} elements are over the limit of "
                                f"{MAX_ACTIVATION_ELEMENTS:,}")
    with_batch: dict[str, Shape] = {"input": (2, *architecture.input_shape)}
    for layer in architecture.layers:
        try:
            count += layer.parameters()
            output = layer.output_shape([with_batch[name] for name in layer.inputs])
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise VerificationError(f"layer {layer.name} does not fit its inputs: {first_line(error)}") from error
        if len(output) < 2 or output[0] != 2:
            raise VerificationError(f"layer {layer.name}: it mixes the images of a batch")
        if (elements := math.prod(output[1:])) > MAX_ACTIVATION_ELEMENTS:
            raise VerificationError(f"layer {layer.name}: an output of {elements:,} elements is over the limit of "
                                    f"{MAX_ACTIVATION_ELEMENTS:,}")
        total += elements
        if total > MAX_TOTAL_ELEMENTS:
            raise VerificationError(f"layer {layer.name}: {total:,} elements of output up to here are over the limit of "
                                    f"{MAX_TOTAL_ELEMENTS:,}")
        if count > MAX_WEIGHT_ELEMENTS:
            raise VerificationError(f"layer {layer.name}: {count:,} weights up to here are over the limit of "
                                    f"{MAX_WEIGHT_ELEMENTS:,}")
        with_batch[layer.name] = output
        shapes[layer.name] = output[1:]
    final = shapes[architecture.layers[-1].name]
    if final != architecture.output_shape:
        raise VerificationError(f"layer {architecture.layers[-1].name}: the output's shape is {list(final)}, declared "
                                f"is {list(architecture.output_shape)}")
    return shapes
