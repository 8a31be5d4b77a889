"""Architecture -> model.py: readable PyTorch source of the network, for whoever receives a package (torch only)."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

from architectures.int8 import int8_layers
from architectures.layers import Architecture, FunctionLayer, LAYER_TABLE, Layer

Tree = dict[str, Any]  # module name -> Layer or a subtree


def source(architecture: Architecture, weights_file: str) -> str:
    """Writes a module whose class takes the package's weights with `load_state_dict(strict=True)`.

    Args:
        architecture: what to write.
        weights_file: the state dict's name, for the usage line.
    """
    kind = architecture.model_type
    types = {layer.type for layer in architecture.layers}
    int8 = types & {"Int8Conv2d", "Int8Linear"}
    parts = [f'''"""{kind}, compressed: {", ".join(architecture.compression_steps) or "as trained"}. Needs torch only.

    model = {kind}()
    model.load_state_dict(torch.load("{weights_file}", weights_only=True))
    model.eval()  # {list(architecture.input_shape)} images, preprocessed as model_metadata.json says
"""

import torch
''' + ("import torch.nn.functional as F\n" if int8 else "") + "from torch import Tensor, nn\n"]
    if int8:
        parts.append(_source_of(int8_layers().quantize_activations))
    if "Int8Conv2d" in int8:
        parts.append(_source_of(int8_layers().Int8Conv2d))
    if "Int8Linear" in int8:
        parts.append(_source_of(int8_layers().Int8Linear))
    parts.append(f'''class {kind}(nn.Module):
    """(N, {", ".join(map(str, architecture.input_shape))}) -> (N, {architecture.num_classes}) logits."""

    def __init__(self, num_classes: int = {architecture.num_classes}) -> None:
        super().__init__()
{_constructor(architecture)}

    def forward(self, input: Tensor) -> Tensor:
{_forward(architecture)}
''')
    return "\n\n".join(parts)


def _source_of(thing: Any) -> str:
    return textwrap.dedent(inspect.getsource(thing))


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
        return _module(child, is_head=child.name == head)
    indent = "    " * (depth + 1)
    rows = "".join(f'{indent}"{name}": {_expression(grandchild, head, depth + 1)},\n'
                   for name, grandchild in child.items())
    return "nn.ModuleDict({\n" + rows + "    " * depth + "})"


def _module(layer: Layer, is_head: bool) -> str:
    """The constructor call: required arguments by position, the rest by name and only where they differ."""
    fields = LAYER_TABLE[layer.type].model_fields
    positional, named = [], []
    for key, value in layer.options().items():
        if isinstance(value, tuple) and len(set(value)) == 1 and not layer.type.startswith("Int8"):
            shown: Any = value[0]
        else:
            shown = value
        if is_head and key in ("out_features",):
            shown = "num_classes"
        if fields[key].is_required():
            positional.append(str(shown))
        elif value != fields[key].default:
            named.append(f"{key}={shown!r}")
    prefix = "" if layer.type.startswith("Int8") else "nn."
    return f"{prefix}{layer.type}({', '.join(positional + named)})"


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
        # A value that only the next line needs is called x; one that is needed later keeps a name of its own.
        short_lived = uses.get(layer.name, [index + 1]) == [index + 1]
        variables[layer.name] = "x" if short_lived else _variable(layer.name, taken)
        lines.append(f"        {variables[layer.name]} = {_call(layer, [variables[name] for name in layer.inputs])}")
    lines.append(f"        return {variables[architecture.layers[-1].name]}")
    return "\n".join(lines)


def _variable(name: str, taken: set[str]) -> str:
    """A fresh name that no keyword, import or other layer's output has."""
    base = "out_" + re.sub(r"\W", "_", name)
    variable = base
    while variable in taken:
        variable += "_"
    taken.add(variable)
    return variable


def _call(layer: Layer, inputs: list[str]) -> str:
    if layer.type == "Add":
        return " + ".join(inputs)
    if layer.type == "Multiply":
        return " * ".join(inputs)
    options = layer.options()
    if layer.type == "Concat":
        return f"torch.cat([{', '.join(inputs)}], dim={options['dim']})"
    if layer.type == "Mean":
        return f"{inputs[0]}.mean({options['dim']}, keepdim={options['keepdim']})"
    first, *rest = layer.name.split(".")
    return _attribute(first) + "".join(f'["{part}"]' for part in rest) + f"({inputs[0]})"
