"""The layer table: every type of layer that an architecture may hold, by its name in the JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TYPE_CHECKING

# A file enters all its rows when one of them is imported.
from architectures.layers.activations import ReLU  # noqa: F401
from architectures.layers.arithmetic import MatMul  # noqa: F401
from architectures.layers.base import REGISTRY, FunctionLayer, Layer, register, resolved
from architectures.layers.moves import Reshape  # noqa: F401
from architectures.layers.norms import BatchNorm2d  # noqa: F401
from architectures.layers.pools import MaxPool2d  # noqa: F401
from architectures.layers.regularization import StochasticDepth  # noqa: F401
from architectures.layers.tensors import Flatten  # noqa: F401
from architectures.layers.weighted import Conv2d  # noqa: F401

if TYPE_CHECKING:
    from torch import fx, nn

LAYER_TABLE: Mapping[str, type[Layer]] = MappingProxyType(REGISTRY)


@contextlib.contextmanager
def registered(kind: type[Layer]) -> Iterator[None]:
    """Keep a class in the layer table for the length of a `with` block.

    Raises:
        ValueError: the table has a row of that name.
    """
    register(kind)
    try:
        yield
    finally:
        del REGISTRY[kind.__name__]


def row_of_module(module: nn.Module | None) -> type[Layer] | None:
    """Return the row that a module is of; a subclass of its class is another layer."""
    kind = type(module)
    dotted = f"{kind.__module__}.{kind.__qualname__}"
    return next((row for row in LAYER_TABLE.values() if row.module_class() is kind or dotted in row.other_classes), None)


def row_of_call(target: Any, is_method: bool) -> type[Layer] | None:
    """Return the row that a function, or a method of a tensor by its name, means in a traced graph.

    A call in place means what it computes; `describe` compares what it gives where the old value is read again.
    """
    target = _plain(target)
    for row in LAYER_TABLE.values():
        if target in row.methods if is_method else any(target == resolved(name) for name in row.functions):
            return row
    return None


def _plain(target: Any) -> Any:
    """Return the function or the method's name without the underscore of those that work in place."""
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    if not name.endswith("_") or name.startswith("_"):
        return target
    if isinstance(target, str):
        return name[:-1]
    import torch
    places = (torch.nn.functional, torch)
    known = any(getattr(place, name, None) is target for place in places)
    return next((getattr(place, name[:-1]) for place in places if known and hasattr(place, name[:-1])), target)


def row_of_node(node: fx.Node, modules: Mapping[str, nn.Module]) -> type[Layer]:
    """Return the row of a node of a graph that `build` made, or `Layer`, which promises nothing, where none fits.

    Args:
        node: a node of the graph.
        modules: the graph's modules by name.
    """
    found = None
    if node.op == "call_module":
        found = row_of_module(modules.get(str(node.target)))
    elif node.op == "call_function":
        found = next((row for row in LAYER_TABLE.values() if issubclass(row, FunctionLayer)
                      and resolved(row.functions[0]) == node.target), None)
    return found or Layer
