"""nn.Module -> torch.fx graph, for `describe`: calls in one spelling, and the shapes that the tensors have.

The code that is traced is a user's. Whatever it raises becomes one line that names the layer and the line in that code.
"""

from __future__ import annotations

import copy
import inspect
import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from architectures.heads import in_evaluation
from architectures.layers.base import AS_TEACHER, NOT_IN_TABLE, Layer, place_of
from architectures.layers.table import row_of_call, row_of_module
from metadata.errors import UserError, first_line

BATCHES = (2, 3)  # a reshape that keeps images apart does so for both
# Other names that torch takes for an argument, after numpy's.
NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x1": "input", "x2": "other"}
FLAG = re.compile(r"\b(True|False)\b")
TORCH = str(Path(torch.__file__).parent / "_")[:-1]  # with the separator: torchvision's folder begins with the same name


class LineTracer(fx.Tracer):
    """Traces symbolically. Modules of the layer table and of torch stay whole; the trace goes into all others.

    A node's `meta["line"]` is the place in the network's code. Assertions are recorded instead of decided.
    """

    trace_asserts = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return row_of_module(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["line"] = _place(traceback.walk_stack(None))
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except UserError:
            raise
        except Exception as error:  # whatever the network's own code raises
            raise _cannot_trace(self.path_of_module(m), m, error) from error


def traced_graph(model: nn.Module) -> fx.Graph:
    """Return a copy of a graph module's graph, or the trace of another module, without what the output does not need.

    The trace is that of evaluation.

    Raises:
        UserError: the module cannot be traced; the layer and the line are named.
    """
    with in_evaluation(model):
        return _trace(model)


def check_one_graph(model: nn.Module, graph: fx.Graph) -> None:
    """Compare the graph of evaluation with the trace in training mode. Flags, such as dropout's, may differ.

    Raises:
        UserError: the forward pass does something else in training, which a student would lose; the line is named.
    """
    shadow = copy.deepcopy(model).train()
    try:
        in_training = _trace(shadow)
    except UserError as error:
        raise UserError(f"in training mode (self.training), unlike in evaluation: {error}") from error
    calls = [{node: FLAG.sub("", f"{node.op} {node.target} {node.args} {node.kwargs}") for node in nodes}
             for nodes in (in_training.nodes, graph.nodes)]
    for (node, call), other in zip(calls[0].items(), calls[1].values(), strict=False):
        if call != other:
            raise UserError(f"layer {place_of(node)}: the forward pass does something else in training mode "
                            f"(self.training) than in evaluation; a student has one graph for both modes, {AS_TEACHER}")


def _trace(model: nn.Module) -> fx.Graph:
    if isinstance(model, fx.GraphModule):
        graph = fx.Graph()
        graph.output(graph.graph_copy(model.graph, {}))
    else:
        try:
            graph = LineTracer().trace(model)
        except UserError:
            raise
        except Exception as error:  # whatever the network's own code raises
            raise _cannot_trace("(the whole model)", model, error) from error
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return graph


def _cannot_trace(name: str, module: nn.Module, error: Exception) -> UserError:
    why = first_line(error)
    if "'len' is not supported" in why:
        why = "len() of a tensor (x.shape[0] can be traced)"
    place = _place((frame, number) for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))))
    return UserError(f"layer {name} ({type(module).__name__}) cannot be traced{place}: {why}; a student needs a static "
                     f"graph, {AS_TEACHER}")


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Return the innermost place outside torch, such as " (network.py, line 12)", or nothing."""
    for frame, number in frames:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file == __file__ and function == "_trace":  # what lies outside called `describe`
            break
        if file != __file__ and not file.startswith(TORCH):
            return f" ({Path(file).name}, line {number})"
    return ""


def measure_shapes(model: nn.Module, graph: fx.Graph, input_shape: tuple[int, int, int]) -> None:
    """Put each node's value into its meta: "shapes" of a tensor for two numbers of images, or nothing for a number.

    A node is run only where the graph holds more than calls of the layer table: reshapes, and arithmetic with sizes.

    Raises:
        UserError: the model does not take such images.
    """
    plain = all(node.op not in ("call_function", "call_method") or (
        row_of_call(node.target, node.op == "call_method") is not None and not is_reshape(node)) for node in graph.nodes)
    if plain:
        for node in graph.nodes:
            node.meta["shapes"] = []
        return

    reached = ""

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal reached
            reached = f"layer {place_of(n)}: "
            value = super().run_node(n)
            if isinstance(value, Tensor):
                n.meta.setdefault("shapes", []).append(tuple(value.shape))
            return value

    for node in graph.nodes:
        node.meta.pop("shapes", None)
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    try:
        with in_evaluation(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for count in BATCHES:
                Recorder(model, graph=graph).run(torch.zeros(count, *input_shape, device=device))
    except Exception as error:  # whatever the network's own code raises
        raise UserError(f"the model does not take {count} images of shape {list(input_shape)}: {reached}{first_line(error)}"
                        ) from error


def is_reshape(node: fx.Node) -> bool:
    """Return whether a node gives a tensor another shape, which may mean any of several layers, or none."""
    return node.target in ("view", "reshape") or node.target is torch.reshape


def normalized_call(node: fx.Node, row: type[Layer]) -> None:
    """Spell a traced call in one way: tensors by position, numpy's names of arguments as torch's."""
    kwargs = {NUMPY_NAMES.get(name, name): value for name, value in node.kwargs.items()}
    args = list(node.args)
    for name in row.call_inputs[len(args):]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    node.args, node.kwargs = tuple(args), kwargs


def module_inputs(node: fx.Node, module: nn.Module) -> list[fx.Node]:
    """Return the tensors that a module is called with, by position or by name.

    Raises:
        UserError: an argument is no tensor.
    """
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in list(inspect.signature(module.forward).parameters)[len(args):]:
        if name in kwargs:
            args.append(kwargs.pop(name))
    if kwargs or not all(isinstance(value, fx.Node) for value in args):
        raise UserError(f"layer {place_of(node)}: a call with something other than tensors {NOT_IN_TABLE}; "
                        f"{AS_TEACHER}")
    return [value for value in args if isinstance(value, fx.Node)]
