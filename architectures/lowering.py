"""A traced graph -> layers of the layer table and their weights.

A call that is one layer is told by its row. What other calls consist of is told in `architectures.calls`, by handlers that
enter themselves here: one call may be several layers, or none.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from architectures.axes import axes_of
from architectures.layers.base import AS_TEACHER, NOT_IN_TABLE, outside, place_of
from architectures.layers.table import row_of_call, row_of_module
from architectures.stand_ins import attribute_at, is_in_place
from metadata.errors import UserError

Handler = Callable[["Lowering", Any], str]
HANDLERS: dict[str, Handler] = {}
WEIGHT = re.compile(r"[._]?weight$")


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register what a call of a function or a method of one of these names is lowered by."""
    def enter(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler
    return enter


def call_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, without the underscore of in-place methods."""
    name = str(getattr(node.target, "__name__", node.target))
    return name[:-1] if name.endswith("_") and not name.startswith("_") else name


@dataclass(kw_only=True)
class Lowering:
    """The layers found so far.

    Args:
        model: the network.
        constants: tensors that the network's code made, by their nodes' targets.
        names: the layer that holds a node's tensor, by node.
        layers: the layers, as rows of the architecture's JSON.
        weights: their tensors, by layer and key.
        consumed: the names of the network's own tensors that a layer holds.
        called: the paths of the modules that the graph calls.
        exact: the graph is one that `build` made: each node is one layer, and has its name.
    """

    model: nn.Module
    constants: dict[str, Tensor]
    called: frozenset[str] = frozenset()
    exact: bool = False
    names: dict[fx.Node, str] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    consumed: set[str] = field(default_factory=set)
    _given: set[str] = field(default_factory=set)  # parameters that a call was given as its weights
    _taken: set[str] = field(default_factory=lambda: {"input"})
    _stored: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)

    def add(self, node: Any) -> None:
        """Lower one node of the graph.

        Raises:
            UserError: no layers of the table stand for the node.
        """
        if node.op == "placeholder":
            self.names[node] = "input"
        elif is_in_place(node) and not node.users and node.meta["of_images"]:
            raise outside(place_of(node), f"{node.target} as a statement, which changes a tensor in place,")
        elif node.meta["of_images"] and "parts" not in node.meta:  # others are lowered where a layer needs them
            self.names[node] = self._lowered(node)

    def _lowered(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return self._module(node)
        handler = None if self.exact else HANDLERS.get(call_name(node))
        row = row_of_call(node.target, node.op == "call_method")
        what = getattr(node.target, "__name__", node.target)
        if handler is None and row is None:
            raise UserError(f"layer {place_of(node)}: {what} ({node.op}) {NOT_IN_TABLE}; {AS_TEACHER}")
        try:
            if handler is not None:
                return handler(self, node)
            assert row is not None
            inputs, options = row.from_call(node)
            names = self.aligned(inputs, node) if row.broadcasts else [self.source(source) for source in inputs]
            return self.emit(node, row.__name__, names, **options)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"layer {place_of(node)}: this call of {what} {NOT_IN_TABLE}; {AS_TEACHER}") from error

    def _module(self, node: fx.Node) -> str:
        name, module = str(node.target), self.model.get_submodule(str(node.target))
        row = row_of_module(module)
        if row is None:
            raise UserError(f"layer {name}: {type(module).__name__} {NOT_IN_TABLE}; {AS_TEACHER}")
        inputs = [self.source(source) for source in module_inputs(node, module)]
        options = row.from_module(module, name)
        state = module.state_dict()
        turned = row.__name__ == "BatchNorm1d" and rows_are_folded(node)
        if turned:
            inputs = [self.permuted(node, inputs[0], [0, 2, 1])]
        layer = self.emit(node, row.__name__, inputs, name=self._module_name(node, bool(state)), **options)
        self.weights.update({f"{layer}.{key}": tensor for key, tensor in state.items()})
        self.consumed.update(f"{name}.{key}" for key in state)
        return self.permuted(node, layer, [0, 2, 1]) if turned else layer

    def _module_name(self, node: fx.Node, has_weights: bool) -> str:
        """Return a module's path. A module with weights keeps it, as the state dict uses it."""
        name = str(node.meta["layer"]) if self.exact else str(node.target)
        if name in self._taken and has_weights:
            if any(earlier.op == "call_module" and earlier.target == node.target for earlier in self.names):
                raise UserError(f"layer {name} is used twice; layers that share weights are not in the layer table")
            raise UserError(f"layer {name}: the graph's input or an operation has that name; rename the module")
        return name

    # --------------------------------------------------------------------------------------------------- for handlers

    def emit(self, node: fx.Node, kind: str, inputs: Sequence[str], *, name: str = "", **options: Any) -> str:
        """Add a layer and return its name: the node's unless given, with a number where that is taken."""
        base = name or (str(node.meta["layer"]) if self.exact else node.name)
        fresh, number = base, 0
        while fresh in self._taken:
            number += 1
            fresh = f"{base}_{number}"
        self._taken.add(fresh)
        self.layers.append({"name": fresh, "type": kind, "inputs": list(inputs), **options})
        return fresh

    def source(self, node: Any) -> str:
        """Return the layer that holds a node's tensor. A tensor of the network's own becomes a layer at its first use.

        Raises:
            UserError: it is no tensor.
        """
        if isinstance(node, fx.Node) and not node.meta["of_images"] and node.op != "get_attr" and node not in self.names:
            self.names[node] = self._lowered(node)
        if not isinstance(node, fx.Node) or (node not in self.names and node.op != "get_attr"):
            where = place_of(node) if isinstance(node, fx.Node) else str(node)
            raise UserError(f"layer {where}: it uses a tensor's shape or attribute as data, which {NOT_IN_TABLE}; "
                            f"{AS_TEACHER}")
        return self.store(node, axes_of(node).image_shape) if node.op == "get_attr" else self.names[node]

    def store(self, node: fx.Node, shape: tuple[int, ...]) -> str:
        """Return a Parameter or Buffer with the values of a tensor of the network's own; one size may be -1."""
        target = str(node.target)
        if (target, shape) not in self._stored:
            kind = "Parameter" if isinstance(self._attribute(target), nn.Parameter) else "Buffer"
            values = self.tensor(node).float().reshape(shape)
            name = self.emit(node, kind, ["input"], name=target.lstrip("_"), shape=list(values.shape))
            self.weights[f"{name}.value"] = values
            self._stored[target, shape] = name
        return self._stored[target, shape]

    def _attribute(self, target: str) -> Any:
        return self.constants[target] if target in self.constants else attribute_at(self.model, target)

    def tensor(self, node: fx.Node) -> Tensor:
        """Return the value of a node that is the same for all images.

        Raises:
            UserError: it depends on the images.
        """
        if node.meta.get("of_images", True):
            raise outside(place_of(node), "a layer whose weights depend on the images")
        if node.op == "get_attr":
            self.consumed.add(str(node.target))
            value: Any = self._attribute(str(node.target))
            return value.detach()  # type: ignore[no-any-return]
        mapped: Any = fx.node.map_arg((node.args, node.kwargs), self.tensor)
        args, kwargs = mapped
        with torch.no_grad():
            if node.op == "call_module":
                name = str(node.target)
                self.consumed.update(f"{name}.{key}" for key in self.model.get_submodule(name).state_dict())
                return self.model.get_submodule(name)(*args, **kwargs)  # type: ignore[no-any-return]
            if is_in_place(node):
                args = (args[0].clone(), *args[1:])  # not the network's own memory
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
            changed: Tensor = self._changed(node, value)
            return changed

    def _changed(self, node: fx.Node, value: Any) -> Any:
        """Return a computed tensor as statements such as `t.zero_()` and `t[3:].zero_()` leave it.

        Those calls are no arguments of what is computed later.
        """
        for user in node.users:
            part = user.target is operator.getitem and not isinstance(user.args[1], fx.Node)
            for change in user.users if part else (user,):
                if is_in_place(change) and not change.users and change.all_input_nodes == [user if part else node]:
                    value = value.clone()  # not the network's own memory
                    arguments: Any = change.args[1:]
                    getattr(value[user.args[1]] if part else value, str(change.target))(*arguments, **change.kwargs)
        return value

    def with_weights(self, node: fx.Node, kind: str, inputs: Sequence[str], tensors: dict[str, Any], **options: Any) -> str:
        """Add a layer whose weights are arguments of the call: nodes, or tensors. The layer is named after the first."""
        first = next((value for value in tensors.values() if isinstance(value, fx.Node)), None)
        name = node.name
        if first is not None and first.op == "get_attr" and not str(first.target).startswith("_tensor_constant"):
            name = WEIGHT.sub("", str(first.target)) or node.name
            if any(other.startswith(f"{name}.") for other in (*self._taken, *self.called)):
                name = f"{name}.{call_name(node)}"  # such as a norm that holds its activation
        layer = self.emit(node, kind, inputs, name=name, **options)
        for key, value in tensors.items():
            if isinstance(value, fx.Node) and value.op == "get_attr" and isinstance(
                    self._attribute(str(value.target)), nn.Parameter):
                if str(value.target) in self._given:
                    raise UserError(f"layer {place_of(node)}: the weights {value.target} are used twice; layers that share "
                                    f"weights are not in the layer table; {AS_TEACHER}")
                self._given.add(str(value.target))
            if value is not None:
                self.weights[f"{layer}.{key}"] = self.tensor(value) if isinstance(value, fx.Node) else value
        return layer

    def shaped(self, node: fx.Node, name: str, have: Sequence[int], want: Sequence[int]) -> str:
        """Return a layer's output, whose shape for one image is `have`, in the shape `want`."""
        return name if list(have) == list(want) else self.emit(node, "Reshape", [name], shape=list(want))

    def permuted(self, node: fx.Node, name: str, dims: list[int]) -> str:
        """Return a layer's output with its dimensions in another order. Two orders in a row become one."""
        layer = next((each for each in reversed(self.layers) if each["name"] == name), None)
        if layer is not None and layer["type"] == "Permute":
            dims, name = [layer["dims"][dim] for dim in dims], layer["inputs"][0]
        return name if dims == sorted(dims) else self.emit(node, "Permute", [name], dims=dims)

    def aligned(self, sources: Sequence[Any], node: fx.Node) -> list[str]:
        """Return the layers of tensors that torch broadcasts to a node's, each with that node's number of dimensions.

        Args:
            sources: nodes.
            node: the result.
        """
        if not node.meta.get("shapes"):
            return [self.source(source) for source in sources]
        result = axes_of(node)
        assert result.shape is not None
        rank = len(result.shape)
        found = []
        for source in sources:
            axes = axes_of(source)
            assert axes.shape is not None
            padded = (*[1] * (rank - len(axes.shape)), *axes.shape)
            if result.images is not None:
                at_images = padded[result.images]
                if axes.images is None and at_images != 1:
                    raise outside(place_of(node), "a tensor of the network's own with a value for each image")
                if axes.images is not None and (axes.images + rank - len(axes.shape) != result.images
                                                or axes.fold != result.fold):
                    raise outside(place_of(node), "a combination of tensors whose images are at different places")
            folded = axes.fold if axes.images is not None else 1
            shape = (*([folded] if result.fold > 1 else []),
                     *(padded[at] for at in range(rank) if at != result.images))
            if source.op == "get_attr":
                found.append(self.store(source, tuple(shape)))
            else:
                found.append(self.shaped(node, self.source(source), axes.image_shape, shape))
        return found

    def used(self, output: fx.Node) -> list[dict[str, Any]]:
        """Return the layers that the output needs, in order."""
        needed = {self.source(output)}
        kept = []
        for layer in reversed(self.layers):
            if layer["name"] in needed:
                needed.update(layer["inputs"])
                kept.append(layer)
        return kept[::-1]


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


def marked(graph: fx.Graph) -> None:
    """Note in each node's meta whether it depends on the images."""
    for node in graph.nodes:
        sources = node.all_input_nodes
        node.meta["of_images"] = node.op == "placeholder" or any(source.meta["of_images"] for source in sources)


def image_shape(node: Any) -> tuple[int, ...]:
    """Return a traced tensor's shape for one image."""
    return axes_of(node).image_shape


def rows_are_folded(node: Any) -> bool:
    """Return whether a tensor is (N * rows, channels), in the architecture (N, rows, channels)."""
    return bool(node.meta.get("shapes")) and axes_of(node).fold > 1 and len(image_shape(node)) == 2


def is_number(value: Any) -> bool:
    """Return whether a traced argument is a plain number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
