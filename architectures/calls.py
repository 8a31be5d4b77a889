"""What calls that move numbers, compute with numbers, or bring their weights along are lowered to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from architectures.axes import axes_of
from architectures.layers.base import outside, place_of, traced_argument
from architectures.layers.tensors import joined
from architectures.lowering import Lowering, call_name, handles, image_shape, is_number
from metadata.errors import UserError


# ------------------------------------------------------------------------------------------------------ other shapes


@handles("contiguous", "clone", "to", "float", "type_as", "detach", "alias", "requires_grad", "positive")
def nothing(lowering: Lowering, node: Any) -> str:
    """A call that changes no number."""
    return lowering.source(node.args[0])


@handles("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as", "ravel",
         "expand", "expand_as", "broadcast_to", "repeat", "tile")
def reshape(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    if not node.meta.get("shapes"):  # torch.flatten: its arguments say it all
        return lowering.emit(node, "Flatten", [lowering.source(source)],
                             start_dim=traced_argument(node, 1, "start_dim", 0),
                             end_dim=traced_argument(node, 2, "end_dim", -1))
    before, after = axes_of(source), axes_of(node)
    have, want = before.image_shape, after.image_shape
    if math.prod(have) != math.prod(want):
        raise outside(place_of(node), f"{call_name(node)} that repeats numbers, {list(have)} to {list(want)} for an image,")
    if not (before.in_front and after.in_front):
        assert before.shape is not None and after.shape is not None
        lead = before.images
        if before.images != after.images or before.shape[:lead] != after.shape[:lead] or before.fold != after.fold:
            raise outside(place_of(node), "a reshape across the images")
    if have == want:
        return lowering.source(source)
    if source.op == "get_attr" and len(source.users) == 1:
        return lowering._store(source, want)
    name = lowering.source(source)
    span = joined((0, *have), (0, *want))
    if span is not None and before.fold == after.fold == 1:
        start, end = span
        return lowering.emit(node, "Flatten", [name], start_dim=start, end_dim=-1 if end == len(have) else end)
    return lowering.emit(node, "Reshape", [name], shape=list(want))


@handles("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t")
def permute(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    before = axes_of(source)
    assert before.shape is not None
    rank = len(before.shape)
    if call_name(node) == "permute":
        dims = traced_argument(node, 1, "dims", None)
        dims = list(dims) if isinstance(dims, (tuple, list)) else list(node.args[1:])
        virtual = [int(dim) % rank for dim in dims]
    else:  # let torch move the numbers of the dimensions
        names = torch.empty([*range(1, rank + 1)], device="meta")
        function = getattr(torch, "transpose" if call_name(node) == "t" else call_name(node))
        arguments = (0, 1) if call_name(node) == "t" else node.args[1:]
        virtual = [size - 1 for size in function(names, *arguments, **node.kwargs).shape]
    target = axes_of(node)
    dims = [0, *([1] if before.fold > 1 else []), *(before.dim(dim) for at, dim in enumerate(virtual) if at != target.images)]
    return permuted(lowering, node, lowering.source(source), dims)


def permuted(lowering: Lowering, node: Any, name: str, dims: list[int]) -> str:
    """Return a layer's output with its dimensions in another order. Two orders in a row become one."""
    layer = next((each for each in reversed(lowering.layers) if each["name"] == name), None)
    if layer is not None and layer["type"] == "Permute":
        dims, name = [layer["dims"][dim] for dim in dims], layer["inputs"][0]
    return name if dims == sorted(dims) else lowering.emit(node, "Permute", [name], dims=dims)


# ------------------------------------------------------------------------------------------------------------ parts


@handles("getitem")
def indexed(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    if "parts" in source.meta:
        return part(lowering, node, source)
    axes = axes_of(source)
    assert axes.shape is not None
    index: Any = node.args[1]
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    consuming = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if Ellipsis not in [entry for entry in entries if not isinstance(entry, fx.Node)]:
        entries.append(Ellipsis)
    at = next(position for position, entry in enumerate(entries) if entry is Ellipsis)
    entries[at:at + 1] = [slice(None)] * (len(axes.shape) - consuming)
    name, shape, dim = lowering.source(source), list(axes.image_shape), 0
    for entry in entries:
        if entry is None:
            continue
        size = axes.shape[dim]
        if isinstance(entry, (fx.Node, list)):
            values = lowering.tensor(entry) if isinstance(entry, fx.Node) else torch.tensor(list(entry))
            if values.dtype not in (torch.int64, torch.int32):
                raise outside(place_of(node), "an index by a mask")
            name = gathered(lowering, node, name, axes.dim(dim), values, size)
            shape[axes.dim(dim) - 1] = values.numel()
        elif not (isinstance(entry, slice) and entry.indices(size) == (0, size, 1)):
            place = axes.dim(dim)
            start, stop, step = entry.indices(size) if isinstance(entry, slice) else (entry % size, entry % size + 1, 1)
            name = lowering.emit(node, "Slice", [name], dim=place, start=start, stop=stop, step=step)
            shape[place - 1] = len(range(start, stop, step))
        dim += 1
    return lowering.shaped(node, name, shape, image_shape(node))


@handles("index_select")
def index_select(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    axes = axes_of(source)
    assert axes.shape is not None
    dim, index = int(traced_argument(node, 1, "dim", None)), traced_argument(node, 2, "index", None)
    return gathered(lowering, node, lowering.source(source), axes.dim(dim), lowering.tensor(index), axes.shape[dim])


def gathered(lowering: Lowering, node: Any, name: str, dim: int, index: Tensor, size: int) -> str:
    """Return the positions of a constant index along a dimension: a slice where they are one."""
    flat = index.flatten().to(torch.int64) % size
    steps = flat.diff().unique()
    if len(steps) <= 1 and (len(flat) == 1 or int(steps) > 0):
        step = int(steps) if len(steps) else 1
        start, stop = int(flat[0]), int(flat[-1]) + 1
        if (start, stop, step) == (0, size, 1):
            return name
        return lowering.emit(node, "Slice", [name], dim=dim, start=start, stop=stop, step=step)
    return lowering.with_weights(node, "Gather", [name], {"index": flat}, dim=dim, count=len(flat))


def part(lowering: Lowering, node: Any, source: Any) -> str:
    """One of the tensors that chunk, split or unbind gives."""
    whole: Any = source.args[0]
    axes = axes_of(whole)
    position, parts = int(node.args[1]), source.meta["parts"]  # type: ignore[arg-type]
    default = 0
    at = 1 if call_name(source) == "unbind" else 2
    dim = int(traced_argument(source, at, "dim", default))
    sizes = [1 if call_name(source) == "unbind" else shape[dim] for shape in parts]
    place, start = axes.dim(dim), sum(sizes[:position])
    name = lowering.source(whole)
    shape = list(axes.image_shape)
    if len(sizes) > 1:
        name = lowering.emit(node, "Slice", [name], dim=place, start=start, stop=start + sizes[position], step=1)
        shape[place - 1] = sizes[position]
    return lowering.shaped(node, name, shape, image_shape(node))


@handles("narrow", "select")
def narrow(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    axes = axes_of(source)
    dim, start = int(traced_argument(node, 1, "dim", None)), traced_argument(
        node, 2, "start" if call_name(node) == "narrow" else "index", None)
    length = traced_argument(node, 3, "length", 1) if call_name(node) == "narrow" else 1
    assert axes.shape is not None
    place, start = axes.dim(dim), int(start) % axes.shape[dim]
    name = lowering.emit(node, "Slice", [lowering.source(source)], dim=place, start=start, stop=start + length, step=1)
    shape = list(axes.image_shape)
    shape[place - 1] = length
    return lowering.shaped(node, name, shape, image_shape(node))


@handles("roll")
def roll(lowering: Lowering, node: Any) -> str:
    """The end, then the beginning, of each dimension."""
    source: Any = node.args[0]
    axes, name = axes_of(source), lowering.source(source)
    shifts, dims = traced_argument(node, 1, "shifts", None), traced_argument(node, 2, "dims", None)
    pairs = zip(*([value] if isinstance(value, int) else value for value in (shifts, dims)), strict=True)
    for shift, dim in pairs:
        assert axes.shape is not None
        size = axes.shape[dim]
        if not shift % size:
            continue
        place, cut = axes.dim(dim), size - shift % size
        halves = [lowering.emit(node, "Slice", [name], dim=place, start=start, stop=stop, step=1)
                  for start, stop in ((cut, size), (0, cut))]
        name = lowering.emit(node, "Concat", halves, dim=place)
    return name


@handles("pad")
def pad(lowering: Lowering, node: Any) -> str:
    amounts, mode = list(traced_argument(node, 1, "pad", None)), traced_argument(node, 2, "mode", "constant")
    value = traced_argument(node, 3, "value", None) or 0.0
    if mode != "constant" or any(amount < 0 for amount in amounts):
        raise outside(place_of(node), f"padding of mode {mode!r} or by negative amounts")
    while len(amounts) > 2 and not any(amounts[-2:]):
        amounts = amounts[:-2]
    name = lowering.source(node.args[0])
    return lowering.emit(node, "Pad", [name], pad=amounts, value=float(value)) if any(amounts) else name


@handles("stack")
def stack(lowering: Lowering, node: Any) -> str:
    sources: Any = list(node.args[0])  # type: ignore[arg-type]
    place = axes_of(node).dim(int(traced_argument(node, 1, "dim", 0)))
    shape = list(image_shape(node))
    shape[place - 1] = 1
    names = [lowering.shaped(node, lowering.source(source), image_shape(source), shape) for source in sources]
    return lowering.emit(node, "Concat", names, dim=place)


@handles("cat", "concat", "concatenate")
def concat(lowering: Lowering, node: Any) -> str:
    sources: Any = traced_argument(node, 0, "tensors", None)
    dim = int(traced_argument(node, 1, "dim", 0))
    return lowering.emit(node, "Concat", [lowering.source(source) for source in sources], dim=axes_of(sources[0]).dim(dim))


# ------------------------------------------------------------------------------------------------------- with numbers


ARITHMETIC = {"add": "Add", "iadd": "Add", "sub": "Subtract", "isub": "Subtract", "subtract": "Subtract",
              "mul": "Multiply", "imul": "Multiply", "multiply": "Multiply", "truediv": "Divide", "itruediv": "Divide",
              "div": "Divide", "true_divide": "Divide", "divide": "Divide"}


@handles(*ARITHMETIC)
def arithmetic(lowering: Lowering, node: Any) -> str:
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
def powers(lowering: Lowering, node: Any) -> str:
    name, kind = lowering.source(node.args[0]), call_name(node)
    if kind == "neg":
        return scaled(lowering, node, name, -1.0, 0.0)
    if kind == "rsub":
        return scaled(lowering, node, name, -1.0, float(node.args[1]))  # type: ignore[arg-type]
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
def clamp(lowering: Lowering, node: Any) -> str:
    name, kind = lowering.source(node.args[0]), call_name(node)
    if kind == "hardtanh":
        low, high = traced_argument(node, 1, "min_val", -1.0), traced_argument(node, 2, "max_val", 1.0)
        return lowering.emit(node, "Clamp", [name], min=low, max=high)
    key = kind.removeprefix("clamp_")
    return lowering.emit(node, "Clamp", [name], **{key: float(traced_argument(node, 1, key, None))})


@handles("addcmul")
def addcmul(lowering: Lowering, node: Any) -> str:
    total, one, other = node.args[:3]
    if traced_argument(node, 3, "value", 1) != 1:
        raise outside(place_of(node), "addcmul with a value")
    product = lowering.emit(node, "Multiply", lowering.aligned([one, other], node))
    return lowering.emit(node, "Add", [*lowering.aligned([total], node), product])


@handles("norm")
def norm(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    dim = traced_argument(node, 2, "dim", None)
    if traced_argument(node, 1, "p", 2) not in (2, 2.0) or dim is None:
        raise outside(place_of(node), "a norm other than the Euclidean along named dimensions")
    dims = [axes_of(source).dim(each) for each in ([dim] if isinstance(dim, int) else dim)]
    return lowering.emit(node, "Norm", [lowering.source(source)], dim=dims,
                         keepdim=bool(traced_argument(node, 3, "keepdim", False)))


@handles("normalize")
def normalize(lowering: Lowering, node: Any) -> str:
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
def matmul(lowering: Lowering, node: Any) -> str:
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
def attention(lowering: Lowering, node: Any) -> str:
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


# ------------------------------------------------------------------------------------------------ weights as arguments


@handles("linear")
def linear(lowering: Lowering, node: Any) -> str:
    weight, bias = traced_argument(node, 1, "weight", None), traced_argument(node, 2, "bias", None)
    outputs, inputs = weight.meta["shapes"][0]
    return lowering.with_weights(node, "Linear", [lowering.source(node.args[0])], {"weight": weight, "bias": bias},
                                 in_features=inputs, out_features=outputs, bias=bias is not None)


@handles("conv2d")
def conv2d(lowering: Lowering, node: Any) -> str:
    weight, bias = traced_argument(node, 1, "weight", None), traced_argument(node, 2, "bias", None)
    stride, padding, dilation = (pair(traced_argument(node, at, key, default)) for at, key, default in
                                 ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)))
    groups = int(traced_argument(node, 6, "groups", 1))
    outputs, inputs, *kernel = weight.meta["shapes"][0]
    if isinstance(padding, str):
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        if padding == "same" and any(amount % 2 for amount in total):
            raise outside(place_of(node), "padding 'same' with an even kernel pads unevenly and")
        padding = tuple(amount // 2 for amount in total) if padding == "same" else (0, 0)
    return lowering.with_weights(
        node, "Conv2d", [lowering.source(node.args[0])], {"weight": weight, "bias": bias}, in_channels=inputs * groups,
        out_channels=outputs, kernel_size=tuple(kernel), stride=stride, padding=padding, dilation=dilation, groups=groups,
        bias=bias is not None)


def pair(value: Any) -> Any:
    """Return two numbers for one, and what else is given as it is."""
    if isinstance(value, (list, tuple)):
        return tuple(value) * (2 if len(value) == 1 else 1)
    return (value, value) if isinstance(value, int) else value


@handles("batch_norm")
def batch_norm(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    mean, variance, weight, bias = (traced_argument(node, at, key, None) for at, key in
                                    ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias")))
    if mean is None or traced_argument(node, 5, "training", False) or (weight is None) != (bias is None):
        raise outside(place_of(node), "a batch norm without stored statistics")
    shape, name = image_shape(source), lowering.source(source)
    channels = mean.meta["shapes"][0][0]
    turned = axes_of(source).fold > 1 and len(shape) == 2  # rows folded into the images: (N, rows, channels)
    if turned:
        name = permuted(lowering, node, name, [0, 2, 1])
    tensors = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
    name = lowering.with_weights(
        node, "BatchNorm2d" if len(shape) == 3 else "BatchNorm1d", [name], tensors, num_features=channels,
        affine=weight is not None, momentum=traced_argument(node, 6, "momentum", 0.1) or 0.1,
        eps=float(traced_argument(node, 7, "eps", 1e-5)))
    lowering.weights[f"{name}.num_batches_tracked"] = torch.tensor(0)
    return permuted(lowering, node, name, [0, 2, 1]) if turned else name


@handles("layer_norm")
def layer_norm(lowering: Lowering, node: Any) -> str:
    shape = list(traced_argument(node, 1, "normalized_shape", None))
    weight, bias = traced_argument(node, 2, "weight", None), traced_argument(node, 3, "bias", None)
    if weight is None and bias is not None:
        raise outside(place_of(node), "a layer norm with a bias alone")
    return lowering.with_weights(
        node, "LayerNorm", [lowering.source(node.args[0])], {"weight": weight, "bias": bias}, normalized_shape=shape,
        eps=float(traced_argument(node, 4, "eps", 1e-5)), elementwise_affine=weight is not None,
        bias=bias is not None or weight is None)


@handles("group_norm")
def group_norm(lowering: Lowering, node: Any) -> str:
    groups, weight, bias = (traced_argument(node, at, key, None) for at, key in
                            ((1, "num_groups"), (2, "weight"), (3, "bias")))
    if (weight is None) != (bias is None):
        raise outside(place_of(node), "a group norm with a weight or a bias alone")
    return lowering.with_weights(
        node, "GroupNorm", [lowering.source(node.args[0])], {"weight": weight, "bias": bias}, num_groups=int(groups),
        num_channels=image_shape(node)[0], affine=weight is not None, eps=float(traced_argument(node, 4, "eps", 1e-5)))


@handles("prelu")
def prelu(lowering: Lowering, node: Any) -> str:
    weight = traced_argument(node, 1, "weight", None)
    return lowering.with_weights(node, "PReLU", [lowering.source(node.args[0])], {"weight": weight},
                                 num_parameters=math.prod(weight.meta["shapes"][0]))


@handles("einsum")
def einsum(lowering: Lowering, node: Any) -> str:
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
    names = [permuted(lowering, node, name, [term.index(letter) for letter in shared + ends])
             for name, term, ends in zip(found, letters, (rows + inner, inner + columns), strict=True)]
    product = lowering.emit(node, "MatMul", names)
    return permuted(lowering, node, product, [(shared + rows + columns).index(letter) for letter in want])
