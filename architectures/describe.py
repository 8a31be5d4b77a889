"""nn.Module -> Architecture: the inverse of `architectures.build.build`.

`describe(build(describe(model))) == describe(model)` holds for every model that can be described. The rows of the layer
table say which modules, functions and methods they stand for; `architectures.calls` says what other calls consist of.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, fx, nn

import architectures.calls  # noqa: F401  (enters the handlers of calls)
from architectures.architecture import Architecture
from architectures.build import build, check_shapes
from architectures.layers.base import AS_TEACHER, Layer
from architectures.layers.table import row_of_module
from architectures.lowering import Lowering, marked
from architectures.own_code import own_error
from architectures.source import class_name
from architectures.tracing import check_one_graph, traced_graph
from metadata.errors import UserError, VerificationError, describe_validation_error, first_line, some_of
from metadata.schemas import PruningInfo


@dataclass(frozen=True)
class Lowered:
    """A network as layers of the layer table.

    Args:
        architecture: the layers.
        weights: what `build(architecture)` takes with `load_state_dict(strict=True)`. Most names are those of the model's
            own state dict. The tensors are the model's own where it has them; copy them before changing them.
    """

    architecture: Architecture
    weights: dict[str, Tensor]

    def build(self) -> fx.GraphModule:
        """Return the rebuilt network with the model's weights, in eval mode."""
        rebuilt = build(self.architecture)
        rebuilt.load_state_dict(self.weights)
        return rebuilt.eval()


def describe(model: nn.Module, input_shape: tuple[int, int, int], model_type: str | None = None) -> Architecture:
    """Lower a module to layers of the layer table; see `lower`, which gives the weights, too."""
    return lower(model, input_shape, model_type).architecture


def lower(model: nn.Module, input_shape: tuple[int, int, int], model_type: str | None = None) -> Lowered:
    """Lower a module to layers of the layer table, with its weights.

    Args:
        model: maps (N, *input_shape) float32 to (N, classes); the model stays as it is.
        input_shape: (C, H, W).
        model_type: the architecture's name; the module's class name unless given. A word of Python gets an ending.

    Raises:
        UserError: the model cannot be traced, or uses something outside the table; the layer is named.
    """
    try:
        return _lowered(model, input_shape, model_type)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the network's own code raises, also when it is copied
        said = own_error(error) or first_line(error) or type(error).__name__
        raise UserError(f"the model cannot be described: {said}; {AS_TEACHER}") from error


def _lowered(model: nn.Module, input_shape: tuple[int, int, int], model_type: str | None) -> Lowered:
    built = isinstance(model, fx.GraphModule) and all(
        "layer" in node.meta for node in model.graph.nodes if node.op not in ("placeholder", "output"))
    if built:
        graph: fx.Graph = model.graph  # type: ignore[assignment]
        constants: dict[str, Tensor] = {}
    else:
        graph, constants = traced_graph(model, input_shape)
    if len(placeholders := [node for node in graph.nodes if node.op == "placeholder"]) > 1:
        raise UserError(f"input {placeholders[1].name}: a student takes one tensor, this model takes more")
    marked(graph)
    called = frozenset(str(node.target) for node in graph.nodes if node.op == "call_module")
    lowering = Lowering(model=model, constants=constants, called=called, exact=built)
    output = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    for node in graph.nodes:
        if node.op != "output":
            lowering.add(node)
    if not isinstance(output, fx.Node):
        raise UserError("the model's output must be one tensor of logits, got a structure")
    layers = lowering.used(output)
    images = torch.randn(1 if built else 3, *input_shape, generator=torch.Generator().manual_seed(0))
    expected = _logits(model, images)
    classes = expected.shape[1]
    try:
        architecture = Architecture.model_validate({
            "schema": 1, "model_type": class_name(model_type or type(model).__name__), "num_classes": classes,
            "input_shape": input_shape, "output_shape": [classes], "layers": layers})
        if not built:
            check_shapes(architecture)
    except (ValidationError, VerificationError) as error:
        why = describe_validation_error(error) if isinstance(error, ValidationError) else first_line(error)
        raise UserError(f"the model cannot be described: {why}; {AS_TEACHER}") from error
    named = {layer["name"] for layer in layers}
    weights = {key: tensor for key, tensor in lowering.weights.items() if key.rpartition(".")[0] in named}
    found = Lowered(architecture, weights)
    if not built:
        _check_used(model, lowering.consumed)
        _check_same(expected, found, images)
        check_one_graph(model, graph, input_shape)
    return found


def _check_used(model: nn.Module, consumed: set[str]) -> None:
    """Raise UserError if the model has weights that its forward pass does not use."""
    unused = [name for name, _ in model.named_parameters() if name not in consumed]
    saved = model.state_dict().keys()
    unused += [name for name, _ in model.named_buffers() if name not in consumed and name in saved
               and row_of_module(model.get_submodule(name.rpartition(".")[0])) is not None]
    if unused := list(dict.fromkeys(name.rpartition(".")[0] or name for name in unused)):
        raise UserError(f"the model cannot be described: {some_of(unused)} {'has' if len(unused) == 1 else 'have'} weights "
                        f"that its forward pass does not use; remove what is not used; {AS_TEACHER}")


def _check_same(expected: Tensor, found: Lowered, images: Tensor) -> None:
    """Compare the rebuilt model with the original's logits: lowering must not lose an argument.

    Raises:
        UserError: the two compute different outputs.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # building draws weights
        got = found.build()(images)
    if not _same(expected, got):
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


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return a model's logits, on the CPU.

    Raises:
        UserError: the model does not take the images, gives something else, or gives other logits in the next call.
    """
    original = copy.deepcopy(model).cpu().eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = original(images.clone())  # code may change its input in place
            again = original(images.clone()) if len(images) > 1 else logits
    except Exception as error:  # whatever the network's own code raises
        what = f"the model does not take images of shape {list(images.shape[1:])}"
        with suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=[]):
            original(images[:1].clone())
            what = "the model cannot be described: it does not take a batch of three"
        raise UserError(f"{what}: {first_line(error)}") from error
    shape = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        raise UserError(f"the model's output must be logits (N, classes), got {shape} for {len(images)} images")
    if not _same(logits, again):
        raise UserError("the model cannot be described: the next call with the same images has another answer: its code "
                        "keeps a state, or draws random numbers in evaluation")
    return logits


def _same(expected: Tensor, got: Tensor) -> bool:
    """Return whether logits are equal but for the rounding of float32."""
    scale = 1e-4 * float(expected.abs().nan_to_num(0, 0, 0).max())
    return expected.shape == got.shape and torch.allclose(expected, got, rtol=1e-3, atol=scale, equal_nan=True)
