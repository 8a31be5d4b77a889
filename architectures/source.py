"""Architecture -> model.py: readable PyTorch source of the network, for whoever receives a package (torch only)."""

from __future__ import annotations

import builtins
import inspect
import keyword
import re
import textwrap
from collections.abc import Callable
from typing import Any

from architectures.architecture import Architecture
from architectures.layers.base import FunctionLayer, Layer
from architectures.layers.table import LAYER_TABLE
from metadata.errors import UserError

Tree = dict[str, Any]  # module name -> Layer or a subtree
# What a class in model.py must not be called: words of Python, and names that model.py and a package's example use.
RESERVED = frozenset({
    *keyword.kwlist, *dir(builtins), "torch", "nn", "F", "Tensor", "math", "json", "sys", "main", "Path", "FOLDER",
    "Preprocessing", "PyTorchModelHubMixin", "load_model", "read_images"})


def class_name(name: str) -> str:
    """Return a name that model.py can give its class: the name itself, with "Network" behind it where it is taken."""
    return f"{name}Network" if name in RESERVED else name


def source(architecture: Architecture, weights_file: str) -> str:
    """Write a module whose class takes the package's weights with `load_state_dict(strict=True)`.

    Args:
        architecture: the network.
        weights_file: name of the state dict, for the usage line.

    Raises:
        UserError: the architecture's name cannot be that of a class.
    """
    kind = architecture.model_type
    if kind != class_name(kind):
        raise UserError(f"model_type {kind!r}: a class in model.py cannot have this name; rename it in the architecture, "
                        f"such as {class_name(kind)}")
    definitions = _definitions({layer.type for layer in architecture.layers})
    parts = [f'''"""{kind}, compressed: {", ".join(architecture.compression_steps) or "as trained"}. Needs torch only.

    model = {kind}()
    model.load_state_dict(torch.load("{weights_file}", weights_only=True))
    model.eval()  # {list(architecture.input_shape)} images, preprocessed as model_metadata.json says
"""

import torch
''' + ("import torch.nn.functional as F\n" if definitions else "") + "from torch import Tensor, nn\n"]
    parts += [textwrap.dedent(inspect.getsource(definition)) for definition in definitions]
    parts.append(f'''class {kind}(nn.Module):
    """(N, {", ".join(map(str, architecture.input_shape))}) -> (N, {architecture.num_classes}) logits."""

    def __init__(self, num_classes: int = {architecture.num_classes}) -> None:
        super().__init__()
{_constructor(architecture)}

    def forward(self, input: Tensor) -> Tensor:
{_forward(architecture)}
''')
    return "\n\n".join(parts)


def _definitions(types: set[str]) -> list[Callable[..., Any]]:
    """Return the functions and classes that the types need, each once, in the order of the layer table."""
    return list(dict.fromkeys(needed for name, row in LAYER_TABLE.items() if name in types for needed in row.definitions()))


def _constructor(architecture: Architecture) -> str:
    tree: Tree = {}
    for layer in architecture.layers:
        if isinstance(layer, FunctionLayer):
            continue
        *path, leaf = layer.name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = layer
    head = architecture.layers[-1].name
    return "\n".join(f"        {_attribute(name)} = {_expression(child, head, 2)}" for name, child in tree.items())


def _attribute(name: str) -> str:
    return f"self.{name}" if name.isidentifier() else f"self._modules[{name!r}]"


def _expression(child: Tree | Layer, head: str, depth: int) -> str:
    if isinstance(child, Layer):
        return child.constructor({"out_features": "num_classes"} if child.name == head else {})
    indent = "    " * (depth + 1)
    rows = "".join(f'{indent}"{name}": {_expression(grandchild, head, depth + 1)},\n'
                   for name, grandchild in child.items())
    return "nn.ModuleDict({\n" + rows + "    " * depth + "})"


def _forward(architecture: Architecture) -> str:
    uses: dict[str, list[int]] = {}
    for index, layer in enumerate(architecture.layers):
        for name in layer.inputs:
            uses.setdefault(name, []).append(index)
    variables = {"input": "input"}
    taken: set[str] = set()
    lines: list[str] = []
    block = ""
    for index, layer in enumerate(architecture.layers):
        if "." in layer.name and (prefix := layer.name.rsplit(".", 1)[0]) != block:
            block = prefix
            lines.append(f"        # {block}")
        # A value that only the next line needs is called x. A value that is needed later has a name of its own.
        short_lived = uses.get(layer.name, [index + 1]) == [index + 1]
        variables[layer.name] = "x" if short_lived else _variable(layer.name, taken)
        lines.append(f"        {variables[layer.name]} = {_call(layer, [variables[name] for name in layer.inputs])}")
    lines.append(f"        return {variables[architecture.layers[-1].name]}")
    return "\n".join(lines)


def _variable(name: str, taken: set[str]) -> str:
    """Return a fresh name that no keyword, import or other layer's output has."""
    base = "out_" + re.sub(r"\W", "_", name)
    variable = base
    while variable in taken:
        variable += "_"
    taken.add(variable)
    return variable


def _call(layer: Layer, inputs: list[str]) -> str:
    first, *rest = layer.name.split(".")
    return layer.expression(inputs, _attribute(first) + "".join(f'["{part}"]' for part in rest))
