"""nn.Module -> torch.fx graph, for `lower`: every tensor's shape is known while the network's code runs.

Code that looks at shapes (reshapes, windows, assertions, loops) is executed, and leaves no trace but its numbers. The
network is traced for two numbers of images, so that a number that depends on the images is told from one that does not.

The code that is traced is a user's. Whatever it raises becomes one line that names the layer and the line in that code.
"""

from __future__ import annotations

import inspect
import operator
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from architectures.axes import BATCHES, same_for_all
from architectures.layers.base import AS_TEACHER, NOT_IN_TABLE, place_of
from architectures.layers.table import row_of_call, row_of_module
from architectures.stand_ins import CPU, StandIns, is_in_place, sharing_copy, solid
from metadata.errors import UserError, first_line

# Other names that torch takes for an argument, after numpy's.
NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x1": "input", "x2": "other"}
STATED_PLACE = "place_in_file"  # a local variable of a forward pass that walks through calls: which of them this is
FLAG = re.compile(r"\b(True|False)\b")
TORCH = str(Path(torch.__file__).parent / "_")[:-1]  # with the separator: torchvision's folder begins with the same name
FACTS = {"shape", "ndim", "dtype", "requires_grad", "layout", "itemsize"}
FACT_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point",
                "is_complex", "element_size", "get_device", "type"}
FACT_FUNCTIONS = {torch.numel, torch.is_floating_point, torch.is_complex}
FRESH = {"new_zeros", "new_ones", "new_full", "new_tensor", "new_empty"}
FRESH_LIKE = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like}
SEVERAL = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes"}
# Modules of torch that are traced into, as a user's are.
TRACED_INTO = (nn.ZeroPad2d, nn.ConstantPad2d, nn.Unflatten, nn.Conv1d, nn.Upsample)


class TracedTensor(fx.Proxy):
    """A tensor in the network's code while it is traced: what can be asked about its shape and type has an answer."""

    def __getattr__(self, k: str) -> Any:
        tracer: Any = self.tracer
        if k in ("device", "is_cuda", "is_meta"):  # the network's: what its code makes there has values
            return getattr(torch.empty(0, device=tracer.stand_ins.home), k)
        if k in FACTS:
            return getattr(tracer.stand_ins.of(self.node), k)
        if k in ("T", "mT"):
            return tracer.create_proxy("call_function", torch.transpose, (self, -2, -1), {})
        return self if k == "data" else super().__getattr__(k)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])


class ImageTracer(fx.Tracer):
    """Traces symbolically. Modules of the layer table and of torch stay whole; the trace goes into all others.

    A node's `meta["line"]` is the place in the network's code. Assertions about values are recorded instead of decided.

    Args:
        model: the network.
        count: number of images.
        input_shape: (C, H, W).
    """

    trace_asserts = True

    def __init__(self, model: nn.Module, count: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.constants: dict[str, Tensor] = {}  # tensors that the network's code made, by the name of their node's target
        self.stand_ins = StandIns(model, count, input_shape, self.constants)
        self._paths = {id(tensor): (name, tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    # ------------------------------------------------------------------------------------------------- what fx asks for

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph without what the output does not need."""
        # functions that torch.fx.wrap made opaque are traced into: with shapes at hand, they can be
        table: dict[Any, Any] = _symbolic_trace._wrapped_fns_to_patch
        wrapped = dict(table)
        table.clear()
        try:
            graph = super().trace(root, concrete_args)
        finally:
            table.update(wrapped)
            for name in [name for name in vars(root) if name.startswith("_tensor_constant")]:
                self.constants[name] = vars(root).pop(name)
        _follow_changes(graph)
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or is_in_place(node))
        return graph

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool,
                             concrete_args: dict[str, Any] | tuple[Any, ...] | None = None) -> tuple[Any, list[Any]]:
        """Return the network's forward pass and its arguments: the images alone where all others have defaults."""
        _, first, *more = inspect.signature(inspect.unwrap(root_fn)).parameters.values()
        if first.kind is first.POSITIONAL_OR_KEYWORD and all(
                each.default is not each.empty or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in more):
            return root_fn, [self.root, self.create_proxy("placeholder", first.name, (), {})]
        return super().create_args_for_root(root_fn, is_module, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, TRACED_INTO):
            return False
        return row_of_module(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TracedTensor(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["line"] = _place(traceback.walk_stack(None))
        return node

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any,
                     **options: Any) -> Any:
        if kind == "call_method" and target in FACT_METHODS and (target != "type" or len(args) == 1):
            return getattr(self.stand_ins.of(args[0].node), target)(*args[1:], **kwargs)
        if kind == "call_function" and target in FACT_FUNCTIONS:
            return target(self.stand_ins.of(args[0].node))
        if (kind == "call_method" and target in FRESH) or (kind == "call_function" and target in FRESH_LIKE):
            like = solid(self.stand_ins.of(args[0].node), CPU)
            made = getattr(like, target) if kind == "call_method" else lambda *rest, **more: target(like, *rest, **more)
            return made(*args[1:], **{key: value for key, value in kwargs.items() if key != "device"})
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if getattr(target, "__name__", target) in SEVERAL and kind in ("call_function", "call_method"):
            return tuple(self.create_proxy("call_function", operator.getitem, (proxy, index), {})
                         for index in range(len(self.stand_ins.of(proxy.node))))
        return proxy

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> Any:
        if self.stand_ins.running:
            return forward(*args, **kwargs)
        try:
            if type(m) is nn.MultiheadAttention:
                return self._attention(m, *args, **kwargs)
            return super().call_module(m, forward, args, kwargs)
        except UserError:
            raise
        except Exception as error:  # whatever the network's own code raises
            raise _cannot_trace(self.path_of_module(m), m, error) from error

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return an attribute that the network's code reads; a parameter as a node, which fx would search for."""
        if self.stand_ins.running:
            return attr_val
        if not isinstance(attr_val, nn.Parameter) or id(attr_val) not in self._paths:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        path, _ = self._paths[id(attr_val)]
        if path not in parameter_proxy_cache:
            parameter_proxy_cache[path] = self.create_proxy("get_attr", path, (), {})
        return parameter_proxy_cache[path]

    def create_arg(self, a: Any) -> Any:
        """Return an argument of a call as the graph holds it; a buffer as a node, which fx would search for."""
        if isinstance(a, Tensor) and id(a) in self._paths:
            return self.create_node("get_attr", self._paths[id(a)][0], (), {})
        return super().create_arg(a)

    def _attention(self, module: nn.MultiheadAttention, query: Any, key: Any, value: Any, **options: Any) -> Any:
        """Return what the module computes, in operations of the layer table; the attention's weights are not asked for."""
        path = self.path_of_module(module)
        masks = [options.get(name) for name in ("key_padding_mask", "attn_mask") if options.get(name) is not None]
        if masks or query is not key or key is not value or module.in_proj_weight is None or module.bias_k is not None:
            raise UserError(f"layer {path}: attention with a mask, or on more than one tensor, {NOT_IN_TABLE}; "
                            f"{AS_TEACHER}")
        functional = torch.nn.functional
        weight: Any = self.create_proxy("get_attr", f"{path}.in_proj_weight", (), {})
        bias = None
        if module.in_proj_bias is not None:
            bias = self.create_proxy("get_attr", f"{path}.in_proj_bias", (), {})
        x = query if module.batch_first else query.transpose(0, 1)
        count, length, width = x.shape
        heads = functional.linear(x, weight, bias).reshape(count, length, 3, module.num_heads, module.head_dim)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if module.dropout:  # of the shares, in training
            shares = (queries * module.head_dim**-0.5 @ keys.transpose(-2, -1)).softmax(-1)
            mixed = functional.dropout(shares, module.dropout, module.training) @ values
        else:
            mixed = functional.scaled_dot_product_attention(queries, keys, values)
        mixed = mixed.transpose(1, 2).reshape(count, length, width)
        out = module.out_proj
        output = functional.linear(mixed, out.weight, out.bias)
        return (output if module.batch_first else output.transpose(0, 1)), None


def _follow_changes(graph: fx.Graph) -> None:
    """Let what reads a tensor after a call that changed it in place read that call's result. Views stay as they are."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if is_in_place(node) and isinstance(node.args[0], fx.Node):
            later = {user for user in node.args[0].users if order[user] > order[node]}
            node.args[0].replace_all_uses_with(node, delete_user_cb=later.__contains__)


def traced_graph(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Return the trace of a network in evaluation, and the tensors that its code made, by their nodes' targets.

    Where the graph holds more than calls of the layer table, each node's `meta["shapes"]` has the shapes for `BATCHES`.

    Raises:
        UserError: the network cannot be traced; the layer and the line are named.
    """
    tracer, graph = _traced(model, BATCHES[0], input_shape)
    if not tracer.stand_ins.asked and all(map(_is_plain, graph.nodes)):
        return graph, tracer.constants
    tracer.stand_ins.measure(graph)
    again, other = _traced(model, BATCHES[1], input_shape)
    again.stand_ins.measure(other)
    _check_calls(graph, other, "does something else for three images than for two", numbers_may_differ=True)
    for node, twin in zip(graph.nodes, other.nodes, strict=True):
        if "shape" in node.meta and "shape" in twin.meta:
            node.meta["shapes"] = (node.meta["shape"], twin.meta["shape"])
    for name, tensor in tracer.constants.items():
        tracer.constants[name] = same_for_all(tensor, again.constants.get(name))
    return graph, tracer.constants


def _is_plain(node: fx.Node) -> bool:
    """Return whether a node means the same layer whatever its shape is."""
    if node.op not in ("call_function", "call_method"):
        return node.op != "get_attr"
    row = row_of_call(node.target, node.op == "call_method")
    return row is not None and not row.needs_shapes(node)


def check_one_graph(model: nn.Module, graph: fx.Graph, input_shape: tuple[int, int, int]) -> None:
    """Compare the graph of evaluation with the trace in training mode. Flags, such as dropout's, may differ.

    Raises:
        UserError: the forward pass does something else in training, which a student would lose; the line is named.
    """
    try:
        _, in_training = _traced(model, BATCHES[0], input_shape, training=True)
    except UserError as error:
        raise UserError(f"in training mode (self.training), unlike in evaluation: {error}") from error
    _check_calls(in_training, graph, "does something else in training mode (self.training) than in evaluation")


def _check_calls(one: fx.Graph, other: fx.Graph, complaint: str, numbers_may_differ: bool = False) -> None:
    """Compare two graphs of a network call by call."""
    calls = []
    for graph in (one, other):
        arguments = [f"{node.args} {node.kwargs}" for node in graph.nodes]
        if numbers_may_differ:  # where shapes decide, shapes are compared later
            arguments = ["" if _name(node) in SHAPED else text for node, text in zip(graph.nodes, arguments, strict=True)]
        calls.append({node: FLAG.sub("", f"{node.op} {node.target} {text}")
                      for node, text in zip(graph.nodes, arguments, strict=True)})
    for (node, call), twin in zip(calls[0].items(), calls[1].values(), strict=False):
        if call != twin:
            raise UserError(f"layer {place_of(node)}: the forward pass {complaint}; a student has one graph for all, "
                            f"{AS_TEACHER}")


# The calls whose numbers are sizes, so that the shapes say what they do.
SHAPED = {"view", "reshape", "expand", "repeat", "broadcast_to", "unflatten", "tile", "expand_as"}


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _traced(model: nn.Module, count: int, input_shape: tuple[int, int, int],
            training: bool = False) -> tuple[ImageTracer, fx.Graph]:
    """Trace a copy that shares the parameters: code may keep what it was given, and that is no tensor here."""
    model = sharing_copy(model).train(training)
    tracer = ImageTracer(model, count, input_shape)
    try:
        graph = tracer.trace(model)
    except UserError:
        raise
    except Exception as error:  # whatever the network's own code raises
        raise _cannot_trace("(the whole model)", model, error) from error
    _normalize_calls(graph)
    return tracer, graph


def _cannot_trace(name: str, module: nn.Module, error: Exception) -> UserError:
    place = _place((frame, number) for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))))
    return UserError(f"layer {name} ({type(module).__name__}) cannot be traced{place}: {first_line(error)}; a student "
                     f"needs a static graph, {AS_TEACHER}")


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Return the innermost place outside torch, such as " (network.py, line 12)", or nothing."""
    for frame, number in frames:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file == __file__ and function == "_traced":  # what lies outside called `lower`
            break
        if file != __file__ and not file.startswith(TORCH):
            if stated := frame.f_locals.get(STATED_PLACE):
                return f" ({stated})"
            return f" ({Path(file).name}, line {number})"
    return ""


def _normalize_calls(graph: fx.Graph) -> None:
    """Spell traced calls in one way: tensors by position, numpy's names of arguments as torch's."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        row = row_of_call(node.target, node.op == "call_method")
        kwargs = {NUMPY_NAMES.get(name, name): value for name, value in node.kwargs.items()}
        args = list(node.args)
        for name in (row.call_inputs if row else ("input", "other"))[len(args):]:
            if name not in kwargs:
                break
            args.append(kwargs.pop(name))
        node.args, node.kwargs = tuple(args), kwargs
