"""nn.Module -> Architecture: the inverse of `architectures.build.build`.

`describe(build(describe(model))) == describe(model)` holds for every model that can be described.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import fx, nn

from architectures.build import build
from architectures.int8 import int8_layers
from architectures.layers import Architecture, LAYER_TABLE, Layer
from metadata.errors import UserError, describe_validation_error, first_line
from metadata.schemas import PruningInfo

Lowered = tuple[str, list[fx.Node], dict[str, Any]]  # layer type, its inputs, its options


def describe(model: nn.Module, input_shape: tuple[int, int, int], model_type: str | None = None) -> Architecture:
    """Lowers a module to the closed layer table.

    Args:
        model: maps (N, *input_shape) float32 to (N, classes); it is left as it is.
        input_shape: (C, H, W).
        model_type: the architecture's name; the module's class name unless given.

    Raises:
        UserError: the model cannot be traced, or uses something outside the table; the layer is named.
    """
    traced = not isinstance(model, fx.GraphModule)
    graph: fx.Graph = copy.deepcopy(model.graph if isinstance(model, fx.GraphModule) else _trace(model))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    names: dict[fx.Node, str] = {}
    layers: list[dict[str, Any]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if names:
                raise UserError(f"input {node.name}: a student takes one tensor, this model takes more")
            names[node] = "input"
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise UserError("the model's output must be one tensor of logits, got a structure")
        elif not _is_size_arithmetic(node):
            kind, inputs, options = _lower(node, model)
            if any(source not in names for source in inputs):
                raise UserError(f"layer {node.name}: it uses a tensor's shape or attribute as data, which is not in the "
                                "layer table; as a teacher the model works")
            names[node] = _unique_name(node, model, names)
            layers.append({"name": names[node], "type": kind, "inputs": [names[source] for source in inputs], **options})
    try:
        classes = _output_width(model, input_shape)
        architecture = Architecture.model_validate({
            "schema": 1, "model_type": model_type or type(model).__name__, "num_classes": classes,
            "input_shape": input_shape, "output_shape": [classes], "layers": layers})
    except ValidationError as error:
        raise UserError(f"the model cannot be described: {describe_validation_error(error)}") from error
    if traced:
        _check_same(model, architecture)
    return architecture


def _check_same(model: nn.Module, architecture: Architecture) -> None:
    """Holds what was described to the model itself, on three random images: lowering must not lose an argument."""
    original = copy.deepcopy(model).cpu().eval()
    rebuilt = build(architecture).eval()
    try:
        rebuilt.load_state_dict(original.state_dict(), strict=True)
    except RuntimeError as error:
        raise UserError("the model cannot be described: it has weights that its forward pass does not use "
                        f"({' '.join(str(error).split())[:200]})") from error
    images = torch.randn(3, *architecture.input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected, got = original(images), rebuilt(images)
    except RuntimeError as error:
        raise UserError(f"the model cannot be described: it does not take a batch of three: {first_line(error)}") from error
    scale = 1e-4 * float(expected.abs().max())
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-3, atol=scale, equal_nan=True):
        raise UserError("the model cannot be described: rebuilt from its layers it computes something else (a reshape, an "
                        "in-place operation or an argument that the layer table does not hold); as a teacher it works")


def carry_over(architecture: Architecture, previous: Architecture, **changes: Any) -> Architecture:
    """The architecture with the history of the one that it came from: steps, training details, pruned channels."""
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


def _trace(model: nn.Module) -> fx.Graph:
    """Traces symbolically; modules of the table stay whole, everything else is traced into."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return _is_int8(m) or super().is_leaf_module(m, module_qualified_name)

        def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...],
                        kwargs: dict[str, Any]) -> Any:
            try:
                return super().call_module(m, forward, args, kwargs)
            except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise _cannot_trace(self.path_of_module(m), m, error) from error

    try:
        return Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _cannot_trace("(the whole model)", model, error) from error


def _cannot_trace(name: str, module: nn.Module, error: Exception) -> UserError:
    return UserError(f"layer {name} ({type(module).__name__}) cannot be traced: {first_line(error)}; a student needs a "
                     "static graph, as a teacher the model works")


def _is_int8(module: nn.Module) -> bool:
    return isinstance(module, (int8_layers().Int8Conv2d, int8_layers().Int8Linear))


def _output_width(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    shadow = copy.deepcopy(model).to("meta").eval()
    try:
        with torch.no_grad():
            output = shadow(torch.empty(1, *input_shape, device="meta"))
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise UserError(f"the model does not take images of shape {list(input_shape)}: {first_line(error)}") from error
    if output.dim() != 2:
        raise UserError(f"the model's output must be logits (N, classes), got shape {list(output.shape)}")
    return int(output.shape[1])


def _unique_name(node: fx.Node, model: nn.Module, names: dict[fx.Node, str]) -> str:
    """A layer's name among the earlier nodes'; a module with weights keeps its path, which the state dict uses."""
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


def _lower(node: fx.Node, model: nn.Module) -> Lowered:
    if node.op == "call_module":
        return _lower_module(node, model.get_submodule(str(node.target)))
    if node.op == "call_function" and node.target in FUNCTIONS:
        return FUNCTIONS[node.target](node)
    if node.op == "call_method" and node.target in METHODS:
        return METHODS[str(node.target)](node)
    what = getattr(node.target, "__name__", node.target)
    raise UserError(f"layer {node.name}: {what} ({node.op}) is not in the layer table; as a "
                    "teacher the model works")


def _lower_module(node: fx.Node, module: nn.Module) -> Lowered:
    name, kind = node.target, type(module).__name__
    if kind not in LAYER_TABLE or not (type(module).__module__.startswith("torch.nn") or _is_int8(module)):
        raise UserError(f"layer {name}: {kind} is not in the layer table; as a teacher the model works")
    if getattr(module, "padding_mode", "zeros") != "zeros" or getattr(module, "divisor_override", None):
        raise UserError(f"layer {name}: {kind} with padding_mode or divisor_override is not in the layer table")
    options = {key: getattr(module, key) for key in LAYER_TABLE[kind].model_fields if key not in Layer.model_fields}
    if "bias" in options:
        options["bias"] = options["bias"] is not None
    if isinstance(options.get("padding"), str):
        options["padding"] = _explicit_padding(module, str(name))
    return kind, _tensors(node), options


def _explicit_padding(module: nn.Module, name: str) -> tuple[int, ...]:
    assert isinstance(module, nn.Conv2d)
    if module.padding == "valid":
        return 0, 0
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(amount % 2 for amount in total):
        raise UserError(f"layer {name}: padding 'same' with an even kernel pads unevenly and is not in the layer table")
    return tuple(amount // 2 for amount in total)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def _plain(kind: str) -> Callable[[fx.Node], Lowered]:
    return lambda node: (kind, [node.args[0]], {})  # type: ignore[list-item]


def _binary(kind: str) -> Callable[[fx.Node], Lowered]:
    def lower(node: fx.Node) -> Lowered:
        if len(node.args) != 2 or len(_tensors(node)) != 2 or node.kwargs:
            raise UserError(f"layer {node.name}: {kind} takes two tensors here; constants are not in the layer table")
        return kind, _tensors(node), {}
    return lower


def _flatten(node: fx.Node) -> Lowered:
    return "Flatten", [node.args[0]], {"start_dim": _argument(node, 1, "start_dim", 0),  # type: ignore[list-item]
                                       "end_dim": _argument(node, 2, "end_dim", -1)}


def _reshape(node: fx.Node) -> Lowered:
    """`x.view(x.size(0), -1)` and its like, the old way to write flatten."""
    shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    if len(shape) != 2 or shape[1] != -1:
        raise UserError(f"layer {node.name}: a reshape other than flattening, x.view(x.size(0), -1), is not in the "
                        "layer table")
    return "Flatten", [node.args[0]], {}  # type: ignore[list-item]


def _is_size_arithmetic(node: fx.Node) -> bool:
    """x.size(0) and x.shape[0], which only feed the reshape above and have no layer of their own."""
    size = node.op == "call_method" and node.target == "size"
    shape = bool(node.target is getattr and node.args[1] == "shape")
    return size or shape or (node.target is operator.getitem and isinstance(node.args[0], fx.Node)
                           and _is_size_arithmetic(node.args[0]))


def _mean(node: fx.Node) -> Lowered:
    dim = _argument(node, 1, "dim", None)
    if dim is None:
        raise UserError(f"layer {node.name}: a mean over the batch is not in the layer table; name the dimensions")
    return "Mean", [node.args[0]], {"dim": [dim] if isinstance(dim, int) else list(dim),  # type: ignore[list-item]
                                    "keepdim": _argument(node, 2, "keepdim", False)}


def _concat(node: fx.Node) -> Lowered:
    return "Concat", list(node.args[0]), {"dim": _argument(node, 1, "dim", 0)}  # type: ignore[arg-type]


def _pool(kind: str) -> Callable[[fx.Node], Lowered]:
    def lower(node: fx.Node) -> Lowered:
        options = {name: _argument(node, position, name, default) for position, (name, default) in enumerate(
            POOL_ARGUMENTS[kind].items(), start=1)}
        if options.pop("divisor_override", None) is not None or options.pop("return_indices", False):
            raise UserError(f"layer {node.name}: {kind} with divisor_override or return_indices is not in the layer table")
        options["stride"] = options["stride"] or options["kernel_size"]
        return kind, _tensors(node)[:1], options
    return lower


POOL_ARGUMENTS: dict[str, dict[str, Any]] = {  # in the order of torch.nn.functional
    "MaxPool2d": {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False,
                  "return_indices": False},
    "AvgPool2d": {"kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True,
                  "divisor_override": None}}


def _adaptive_pool(node: fx.Node) -> Lowered:
    return "AdaptiveAvgPool2d", [node.args[0]], {  # type: ignore[list-item]
        "output_size": _argument(node, 1, "output_size", 1)}


def _gelu(node: fx.Node) -> Lowered:
    return "GELU", _tensors(node), dict(node.kwargs)


def _dropout(node: fx.Node) -> Lowered:
    return "Dropout", [node.args[0]], {"p": _argument(node, 1, "p", 0.5)}  # type: ignore[list-item]


FUNCTIONS: dict[Any, Callable[[fx.Node], Lowered]] = {
    F.relu: _plain("ReLU"), torch.relu: _plain("ReLU"), F.relu6: _plain("ReLU6"), F.silu: _plain("SiLU"),
    F.gelu: _gelu, F.hardswish: _plain("Hardswish"),
    F.hardsigmoid: _plain("Hardsigmoid"), torch.sigmoid: _plain("Sigmoid"), F.sigmoid: _plain("Sigmoid"),
    torch.tanh: _plain("Tanh"), F.tanh: _plain("Tanh"), F.dropout: _dropout, F.max_pool2d: _pool("MaxPool2d"),
    F.avg_pool2d: _pool("AvgPool2d"), F.adaptive_avg_pool2d: _adaptive_pool, torch.flatten: _flatten,
    torch.mean: _mean, torch.cat: _concat, operator.add: _binary("Add"), operator.iadd: _binary("Add"),
    torch.add: _binary("Add"), operator.mul: _binary("Multiply"), operator.imul: _binary("Multiply"),
    torch.mul: _binary("Multiply")}
METHODS: dict[str, Callable[[fx.Node], Lowered]] = {
    "relu": _plain("ReLU"), "sigmoid": _plain("Sigmoid"), "tanh": _plain("Tanh"), "flatten": _flatten,
    "view": _reshape, "reshape": _reshape, "mean": _mean, "add": _binary("Add"), "mul": _binary("Multiply"),
    "contiguous": _plain("Identity")}
