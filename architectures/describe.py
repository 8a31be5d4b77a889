"""nn.Module -> Architecture: the inverse of `architectures.build.build`.

`describe(build(describe(model))) == describe(model)` holds for every model that can be described. The rows of the layer
table say which modules, functions and methods they stand for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from pydantic import ValidationError
from torch import fx, nn

from architectures.architecture import Architecture
from architectures.build import build
from architectures.layers.base import AS_TEACHER, NOT_IN_TABLE, Layer, place_of
from architectures.layers.table import row_of_call, row_of_module
from architectures.tracing import check_one_graph, measure_shapes, module_inputs, normalized_call, traced_graph
from metadata.errors import UserError, describe_validation_error, first_line, some_of
from metadata.schemas import PruningInfo

Lowered = tuple[str, list[fx.Node], dict[str, Any]]  # the layer's type, its inputs, its options


def describe(model: nn.Module, input_shape: tuple[int, int, int], model_type: str | None = None) -> Architecture:
    """Lower a module to layers of the layer table.

    Args:
        model: maps (N, *input_shape) float32 to (N, classes); the model stays as it is.
        input_shape: (C, H, W).
        model_type: the architecture's name; the module's class name unless given.

    Raises:
        UserError: the model cannot be traced, or uses something outside the table; the layer is named.
    """
    graph = traced_graph(model)
    if len(placeholders := [node for node in graph.nodes if node.op == "placeholder"]) > 1:
        raise UserError(f"input {placeholders[1].name}: a student takes one tensor, this model takes more")
    for node in graph.nodes:
        if node.op == "call_module":  # a layer outside the table is named before the model runs
            _row(node, model)
    measure_shapes(model, graph, input_shape)
    names: dict[fx.Node, str] = {}
    layers: list[dict[str, Any]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = "input"
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise UserError("the model's output must be one tensor of logits, got a structure")
        elif "shapes" in node.meta:  # others are sizes, and arithmetic with sizes
            kind, inputs, options = _lower(node, model)
            if any(source not in names for source in inputs):
                raise UserError(f"layer {place_of(node)}: it uses a tensor's shape or attribute as data, which "
                                f"{NOT_IN_TABLE}; {AS_TEACHER}")
            names[node] = _unique_name(node, model, names)
            layers.append({"name": names[node], "type": kind, "inputs": [names[source] for source in inputs], **options})
    try:
        classes = _output_width(model, input_shape)
        architecture = Architecture.model_validate({
            "schema": 1, "model_type": model_type or type(model).__name__, "num_classes": classes,
            "input_shape": input_shape, "output_shape": [classes], "layers": layers})
    except ValidationError as error:
        raise UserError(f"the model cannot be described: {describe_validation_error(error)}") from error
    if not isinstance(model, fx.GraphModule):
        _check_same(model, architecture)
        check_one_graph(model, traced_graph(model))
    return architecture


def _check_same(model: nn.Module, architecture: Architecture) -> None:
    """Compare the rebuilt model with the original on three random images: lowering must not lose an argument.

    Raises:
        UserError: the two compute different outputs, or the model has weights that its forward pass does not use.
    """
    original = copy.deepcopy(model).cpu().eval()
    rebuilt = build(architecture).eval()
    weights, used = original.state_dict(), rebuilt.state_dict()
    if unused := list(dict.fromkeys(name.rpartition(".")[0] or name for name in weights if name not in used)):
        raise UserError(f"the model cannot be described: {some_of(unused)} {'has' if len(unused) == 1 else 'have'} weights "
                        f"that its forward pass does not use; remove what is not used; {AS_TEACHER}")
    for name, tensor in used.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise UserError(f"the model cannot be described: its layers need a tensor {name} {list(tensor.shape)}, which "
                            f"its state dict does not have; {AS_TEACHER}")
    rebuilt.load_state_dict(weights)
    images = torch.randn(3, *architecture.input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected, got = original(images), rebuilt(images)
    except Exception as error:  # whatever the network's own code raises
        raise UserError(f"the model cannot be described: it does not take a batch of three: {first_line(error)}") from error
    scale = 1e-4 * float(expected.abs().max())
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-3, atol=scale, equal_nan=True):
        raise UserError("the model cannot be described: rebuilt from its layers it computes something else (a reshape, an "
                        "in-place operation or an argument that the layer table does not hold); as a teacher it works")


def carry_over(architecture: Architecture, previous: Architecture, **changes: Any) -> Architecture:
    """Return the architecture with the history of the previous one: steps, training details, pruned channels."""
    widths = {layer.name: layer for layer in previous.layers}
    pruned_before = any(layer.pruning_info for layer in previous.layers)
    pruned_now = any(layer.width != widths[layer.name].width for layer in architecture.layers if layer.name in widths)
    layers: list[Layer] = []
    for layer in architecture.layers:
        width, old = layer.width, widths.get(layer.name)
        if width and old and old.width and (pruned_before or pruned_now):
            already = old.pruning_info.num_channels_pruned if old.pruning_info else 0
            info = PruningInfo(num_channels_pruned=already + old.width - width, remaining_channels=width)
            layer = layer.model_copy(update={"pruning_info": info})
        layers.append(layer)
    history = {key: getattr(previous, key) for key in ("model_type", "pruning_rate", "compression_steps",
                                                       "training_details")}
    return architecture.model_copy(update={"layers": layers, **history, **changes})


def _output_width(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Return the number of logits for an image of zeros. The meta device would take longer: it imports torch's compiler."""
    shadow = copy.deepcopy(model).eval()
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = shadow(torch.zeros(1, *input_shape, device=device))
    except Exception as error:  # whatever the network's own code raises
        raise UserError(f"the model does not take images of shape {list(input_shape)}: {first_line(error)}") from error
    if output.dim() != 2:
        raise UserError(f"the model's output must be logits (N, classes), got shape {list(output.shape)}")
    return int(output.shape[1])


def _unique_name(node: fx.Node, model: nn.Module, names: dict[fx.Node, str]) -> str:
    """Return a name that no earlier node has. A module with weights keeps its path, which the state dict uses."""
    name = str(node.target) if node.op == "call_module" else node.name
    taken = set(names.values())
    if name not in taken:
        return name
    if node.op == "call_module" and model.get_submodule(name).state_dict():
        if any(earlier.op == "call_module" and earlier.target == node.target for earlier in names):
            raise UserError(f"layer {name} is used twice; layers that share weights are not in the layer table")
        raise UserError(f"layer {name}: the graph's input or an operation has that name; rename the module")
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


# ------------------------------------------------------------------------------------------- lowering to the table


def _row(node: fx.Node, model: nn.Module) -> type[Layer]:
    """Return the row of a module's class, or raise UserError where there is none."""
    name, module = str(node.target), model.get_submodule(str(node.target))
    row = row_of_module(module)
    if row is None:
        raise UserError(f"layer {name}: {type(module).__name__} {NOT_IN_TABLE}; {AS_TEACHER}")
    return row


def _lower(node: fx.Node, model: nn.Module) -> Lowered:
    """Return the layer that a node of the traced graph means.

    Raises:
        UserError: no row of the layer table stands for the node.
    """
    if node.op == "call_module":
        name, module, row = str(node.target), model.get_submodule(str(node.target)), _row(node, model)
        return row.__name__, module_inputs(node, module), row.from_module(module, name)
    found = row_of_call(node.target, node.op == "call_method") if node.op in ("call_function", "call_method") else None
    if found is None:
        what = getattr(node.target, "__name__", node.target)
        raise UserError(f"layer {place_of(node)}: {what} ({node.op}) {NOT_IN_TABLE}; {AS_TEACHER}")
    normalized_call(node, found)
    try:
        return found.__name__, *found.from_call(node)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = getattr(node.target, "__name__", node.target)
        raise UserError(f"layer {place_of(node)}: this call of {what} {NOT_IN_TABLE}; {AS_TEACHER}") from error
