"""The registry of the operators' functions: each reads a node's inputs and writes its calls."""

from __future__ import annotations

from collections.abc import Callable

from architectures.onnx_network.builder import NetworkBuilder, Traced
from architectures.onnx_network.graph import OnnxNode

Operator = Callable[[OnnxNode, NetworkBuilder], "Traced | list[Traced]"]
OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Enter a function into the registry under the names of the operators that it stands for."""
    def enter(function: Operator) -> Operator:
        for name in names:
            if name in OPERATORS:
                raise ValueError(f"two functions for the operator {name}")
            OPERATORS[name] = function
        return function
    return enter
