"""Calls that compute with tensors and numbers: sums, powers, norms, products, attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from architectures.axes import axes_of
from architectures.layers.base import outside, place_of, traced_argument
from architectures.lowering import Lowering, call_name, handles, is_number
from metadata.errors import UserError


# ------------------------------------------------------------------------------------------------------- with numbers


ARITHMETIC = {"add": "Add", "iadd": "Add", "sub": "Subtract", "isub": "Subtract", "subtract": "Subtract",
              "mul": "Multiply", "imul": "Multiply", "multiply": "Multiply", "truediv": "Divide", "itruediv": "Divide",
              "div": "Divide", "true_divide": "Divide", "divide": "Divide"}


@handles(*ARITHMETIC)
def lower_arithmetic(lowering: Lowering, node: Any) -> str:
    """A sum, difference, product or quotient of two tensors, or of a tensor and a number."""
    kind = ARITHMETIC[call_name(node)]
    if node.kwargs:
        more = ", ".join(f"{key}={value}" for key, value in node.kwargs.items())
        raise UserError(f"layer {place_of(node)}: {kind} has no option {more} in the layer table")
    one, other = node.args
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        return lowering.emit(node, kind, lowering.aligned([one, other], node))
    tensor, number = (one, other) if isinstance(one, fx.Node) else (other, one)
    if not is_number(number):
        raise outside(place_of(node), f"{kind} of a tensor and {number!r}")
    first = tensor is one
    if kind == "Divide" and not first:
        return scaled(lowering, node, lowering.emit(node, "Reciprocal", [lowering.source(tensor)]), float(number), 0.0)
    scale, shift = {"Add": (1.0, number), "Subtract": (1.0, -number) if first else (-1.0, number),
                    "Multiply": (number, 0.0), "Divide": (1.0 / number if number else math.nan, 0.0)}[kind]
    return scaled(lowering, node, lowering.source(tensor), float(scale), float(shift))


def scaled(lowering: Lowering, node: Any, name: str, scale: float, shift: float) -> str:
    """Return a layer's output times a number plus a number."""
    return name if (scale, shift) == (1.0, 0.0) else lowering.emit(node, "ScaleShift", [name], scale=scale, shift=shift)


@handles("rsub", "neg", "square", "pow", "rsqrt")
def lower_powers(lowering: Lowering, node: Any) -> str:
    name, kind = lowering.source(node.args[0]), call_name(node)
    if kind == "neg":
        return scaled(lowering, node, name, -1.0, 0.0)
    if kind == "rsub":
        return scaled(lowering, node, name, -1.0, float(node.args[1]))
    exponent = {"square": 2, "rsqrt": -0.5}.get(kind, node.args[1] if len(node.args) > 1 else None)
    if exponent in (0.5, -0.5):
        name = lowering.emit(node, "Sqrt", [name])
    elif exponent in (2, 3):
        power = name
        for _ in range(int(exponent) - 1):
            power = lowering.emit(node, "Multiply", [power, name])
        name = power
    elif exponent != -1:
        raise outside(place_of(node), f"the power {exponent}")
    return lowering.emit(node, "Reciprocal", [name]) if exponent in (-0.5, -1) else name


@handles("clamp_min", "clamp_max", "hardtanh")
def lower_clamp(lowering: Lowering, node: Any) -> str:
    name, kind = lowering.source(node.args[0]), call_name(node)
    if kind == "hardtanh":
        low, high = traced_argument(node, 1, "min_val", -1.0), traced_argument(node, 2, "max_val", 1.0)
        return lowering.emit(node, "Clamp", [name], min=low, max=high)
    key = kind.removeprefix("clamp_")
    limits: dict[str, Any] = {key: float(traced_argument(node, 1, key, None))}
    return lowering.emit(node, "Clamp", [name], **limits)


@handles("addcmul")
def lower_addcmul(lowering: Lowering, node: Any) -> str:
    total, one, other = node.args[:3]
    if traced_argument(node, 3, "value", 1) != 1:
        raise outside(place_of(node), "addcmul with a value")
    product = lowering.emit(node, "Multiply", lowering.aligned([one, other], node))
    return lowering.emit(node, "Add", [*lowering.aligned([total], node), product])


@handles("norm")
def lower_norm(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    dim = traced_argument(node, 2, "dim", None)
    if traced_argument(node, 1, "p", 2) not in (2, 2.0) or dim is None:
        raise outside(place_of(node), "a norm other than the Euclidean along named dimensions")
    dims = [axes_of(source).dim(each) for each in ([dim] if isinstance(dim, int) else dim)]
    return lowering.emit(node, "Norm", [lowering.source(source)], dim=dims,
                         keepdim=bool(traced_argument(node, 3, "keepdim", False)))


@handles("normalize")
def lower_normalize(lowering: Lowering, node: Any) -> str:
    """x / max(norm, eps), as `torch.nn.functional.normalize`."""
    source: Any = node.args[0]
    if traced_argument(node, 1, "p", 2.0) != 2.0:
        raise outside(place_of(node), "a norm other than the Euclidean")
    dim, name = int(traced_argument(node, 2, "dim", 1)), lowering.source(source)
    length = lowering.emit(node, "Norm", [name], dim=[axes_of(source).dim(dim)], keepdim=True)
    length = lowering.emit(node, "Clamp", [length], min=float(traced_argument(node, 3, "eps", 1e-12)))
    return lowering.emit(node, "Divide", [name, length])


# ----------------------------------------------------------------------------------------------- products, attention


@handles("matmul", "bmm")
def lower_matmul(lowering: Lowering, node: Any) -> str:
    one, other = node.args[0], traced_argument(node, 1, "other", node.kwargs.get("mat2"))
    assert isinstance(one, fx.Node) and isinstance(other, fx.Node)
    if not other.meta["of_images"] and len(other.meta["shapes"][0]) == 2:  # a linear layer
        weight = lowering.tensor(other).T.contiguous()
        tensors = {"weight": other} if other.op == "get_attr" else {}
        name = lowering.with_weights(node, "Linear", [lowering.source(one)], tensors, in_features=weight.shape[1],
                                     out_features=weight.shape[0], bias=False)
        lowering.weights[f"{name}.weight"] = weight
        return name
    return lowering.emit(node, "MatMul", lowering.aligned([one, other], node))


@handles("scaled_dot_product_attention")
def lower_attention(lowering: Lowering, node: Any) -> str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("is_causal") or given.get("enable_gqa"):
        raise outside(place_of(node), "causal or grouped attention")
    queries, keys, values, mask = (given.get(name) for name in names[:4])
    width = queries.meta["shapes"][0][-1]
    tensors = lowering.aligned([queries, keys, values], node)
    if mask is not None:
        if mask.op == "get_attr" and lowering.tensor(mask).dtype == torch.bool:
            raise outside(place_of(node), "attention with a mask of truth values")
        tensors += lowering.aligned([mask], node)
    return lowering.emit(node, "ScaledDotProduct", tensors, scale=float(given.get("scale") or width ** -0.5))


@handles("einsum")
def lower_einsum(lowering: Lowering, node: Any) -> str:
    """A product of two tensors over one index, such as "bhid,bhjd->bhij", as a matrix product."""
    equation = str(node.args[0]).replace(" ", "")
    sources: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    left, _, output = equation.partition("->")
    terms = left.split(",")
    if len(sources) != 2 or len(terms) != 2 or not output or "." in equation:
        raise outside(place_of(node), f"the product {equation!r}")
    target = axes_of(node)
    if target.images is None:
        raise outside(place_of(node), f"the product {equation!r} of stored tensors")
    images = output[target.images]
    found, letters = [], []
    for term, source in zip(terms, sources, strict=True):
        axes = axes_of(source)
        if axes.images is None or term[axes.images] != images or axes.fold != target.fold or len(set(term)) < len(term):
            raise outside(place_of(node), f"the product {equation!r}")
        found.append(lowering.source(source))
        letters.append([images, *(["*"] if axes.fold > 1 else []), *term.replace(images, "")])
    want = [images, *(["*"] if target.fold > 1 else []), *output.replace(images, "")]
    shared = [letter for letter in want if letter in letters[0] and letter in letters[1]]
    inner = [letter for letter in letters[0] if letter in letters[1] and letter not in want]
    rows, columns = ([letter for letter in term if letter not in shared + inner] for term in letters)
    if [len(inner), len(rows), len(columns)] != [1, 1, 1]:
        raise outside(place_of(node), f"the product {equation!r}")
    names = [lowering.permuted(node, name, [term.index(letter) for letter in shared + ends])
             for name, term, ends in zip(found, letters, (rows + inner, inner + columns), strict=True)]
    product = lowering.emit(node, "MatMul", names)
    return lowering.permuted(node, product, [(shared + rows + columns).index(letter) for letter in want])
