"""Names of layers and tensors, from what exporters note in a file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from architectures.onnx_network.graph import OnnxNode

# Functions that operators call, after which a trace names its calls, and the name of the images.
CALLED = re.compile(
    r"abs|adaptive_(avg|max)_pool2d|add|amax|amin|avg_pool2d|cat|ceil|celu|clamp|cos|einsum|elu|erf|exp|expand|flatten|floor|gelu|"
    r"getitem|hardsigmoid|hardswish|images|index_select|input|leaky_relu|local_response_norm|log|log_softmax|matmul|max_pool2d|"
    r"mean|mish|mul|normalize|pad|permute|pow|reciprocal|relu6?|reshape|round|select|selu|sigmoid|silu|sin|softmax|softplus|"
    r"softsign|split|sqrt|sub|sum|tanh|truediv|vector_norm")
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*([./][A-Za-z0-9_]+)*")
# Names that exporters make up, some after torch's functions.
ANONYMOUS = re.compile(
    r"onnx::|\d+$|val_\d|const|Constant|_v_\d|p2o\.|[a-z]+(_[a-z]+)*_\d+$|(add|addmm|arange|cat|clamp|clone|copy|div|eq|exp|"
    r"expand|full|index|linear|masked_fill|mm|mul|ne|permute|relu|reshape|select|sigmoid|slice|slice_scatter|sub|transpose|"
    r"unsqueeze|view|where)$")
WEIGHTS = re.compile(r"(.+)[./](weight|w_0|kernel|gamma|bias|b_0)")
WRAPPERS = {"StatefulPartitionedCall", "PartitionedCall", "functional", "model", "sequential"}  # of Keras' names


def layer_name(node: OnnxNode, weights: Sequence[str]) -> str:
    """Return a name for a layer: its module's where torch says it, its weights' without the last part, or the node's."""
    for weight in weights:
        found = WEIGHTS.fullmatch(weight)  # equal tensors are stored once, by the name of the first
        if found and PLAIN.match(weight) and not ANONYMOUS.match(weight) and found[1].startswith(node.scope):
            return dotted_path(found[1])
    if node.scope:
        return dotted_path(node.scope)
    parts = [part for part in node.name.split("/")[:-1] if part and part not in WRAPPERS]
    return dotted_path(".".join(parts)) if parts else node.op.lower()


def dotted_path(name: str) -> str:
    """Return a name as the dotted name of a module or tensor."""
    parts = [re.sub(r"[^A-Za-z0-9_]", "_", part).strip("_") for part in re.split(r"[./:]+", name)]
    return ".".join(part for part in parts if part)[:150].strip(".") or "layer"
