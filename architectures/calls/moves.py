"""Calls that move numbers: other shapes, orders and parts of a tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from architectures.axes import axes_of
from architectures.layers.base import outside, place_of, traced_argument
from architectures.layers.tensors import joined_dims
from architectures.lowering import Lowering, call_name, handles, image_shape


# ------------------------------------------------------------------------------------------------------ other shapes


@handles("contiguous", "clone", "to", "float", "type_as", "alias", "requires_grad", "positive")
def lower_nothing(lowering: Lowering, node: Any) -> str:
    """A call that changes no number."""
    return lowering.source(node.args[0])


@handles("detach")
def lower_detach(lowering: Lowering, node: Any) -> str:
    """A call that changes no number, but keeps gradients from what comes before it."""
    if node.args[0].meta["of_images"]:
        raise outside(place_of(node), "detach of a tensor that depends on the images: it would train otherwise, and")
    return lowering.source(node.args[0])


@handles("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as", "ravel",
         "expand", "expand_as", "broadcast_to", "repeat", "tile")
def lower_reshape(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    if not node.meta.get("shapes"):  # torch.flatten: its arguments say it all
        return lowering.emit(node, "Flatten", [lowering.source(source)],
                             start_dim=traced_argument(node, 1, "start_dim", 0),
                             end_dim=traced_argument(node, 2, "end_dim", -1))
    before, after = axes_of(source), axes_of(node)
    have, want = before.image_shape, after.image_shape
    if math.prod(have) != math.prod(want):
        grows = [old == 1 or old == new for old, new in zip(have[1:], want[1:], strict=False)]
        if len(have) == len(want) == 3 and have[0] == want[0] and all(grows):  # the same number along an axis of the image
            return lowering.emit(node, "Upsample", [lowering.source(source)], size=list(want[1:]), mode="nearest")
        raise outside(place_of(node), f"{call_name(node)} that repeats numbers, {list(have)} to {list(want)} for an image,")
    if not (before.in_front and after.in_front):
        assert before.shape is not None and after.shape is not None
        lead = before.images
        if before.images != after.images or before.shape[:lead] != after.shape[:lead] or before.fold != after.fold:
            raise outside(place_of(node), "a reshape across the images")
    if have == want:
        return lowering.source(source)
    if source.op == "get_attr" and len(source.users) == 1:
        return lowering.store(source, want)
    name = lowering.source(source)
    span = joined_dims((0, *have), (0, *want))
    if span is not None and before.fold == after.fold == 1:
        start, end = span
        return lowering.emit(node, "Flatten", [name], start_dim=start, end_dim=-1 if end == len(have) else end)
    return lowering.emit(node, "Reshape", [name], shape=list(want))


@handles("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t")
def lower_permute(lowering: Lowering, node: Any) -> str:
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
    dims = [0, *([1] if before.fold > 1 else [])]
    dims += [before.dim(dim) for at, dim in enumerate(virtual) if at != target.images]
    return lowering.permuted(node, lowering.source(source), dims)


# ------------------------------------------------------------------------------------------------------------ parts


@handles("getitem")
def lower_indexed(lowering: Lowering, node: Any) -> str:
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
def lower_index_select(lowering: Lowering, node: Any) -> str:
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
    position, parts = int(node.args[1]), source.meta["parts"]
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
def lower_narrow(lowering: Lowering, node: Any) -> str:
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
def lower_roll(lowering: Lowering, node: Any) -> str:
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
def lower_pad(lowering: Lowering, node: Any) -> str:
    amounts, mode = list(traced_argument(node, 1, "pad", None)), traced_argument(node, 2, "mode", "constant")
    value = traced_argument(node, 3, "value", None) or 0.0
    if mode not in ("constant", "reflect", "replicate", "circular") or any(amount < 0 for amount in amounts):
        raise outside(place_of(node), f"padding of mode {mode!r} or by negative amounts")
    if mode != "constant":
        return padded_with_images(lowering, node, amounts, mode)
    while len(amounts) > 2 and not any(amounts[-2:]):
        amounts = amounts[:-2]
    name = lowering.source(node.args[0])
    return lowering.emit(node, "Pad", [name], pad=amounts, value=float(value)) if any(amounts) else name


def padded_with_images(lowering: Lowering, node: Any, amounts: list[int], mode: str) -> str:
    """Pad with numbers of the image itself, one dimension after the other."""
    axes, name = axes_of(node.args[0]), lowering.source(node.args[0])
    assert axes.shape is not None
    for at in range(0, len(amounts), 2):
        size = axes.shape[-1 - at // 2]
        positions = torch.arange(float(size)).view(1, 1, size)
        index = torch.nn.functional.pad(positions, amounts[at:at + 2], mode=mode).flatten().long()
        name = gathered(lowering, node, name, axes.dim(-1 - at // 2), index, size)
    return name


@handles("stack")
def lower_stack(lowering: Lowering, node: Any) -> str:
    sources: Any = list(node.args[0])
    place = axes_of(node).dim(int(traced_argument(node, 1, "dim", 0)))
    shape = list(image_shape(node))
    shape[place - 1] = 1
    names = [lowering.shaped(node, lowering.source(source), image_shape(source), shape) for source in sources]
    return lowering.emit(node, "Concat", names, dim=place)


@handles("cat", "concat", "concatenate")
def lower_concat(lowering: Lowering, node: Any) -> str:
    sources: Any = traced_argument(node, 0, "tensors", None)
    dim = int(traced_argument(node, 1, "dim", 0))
    return lowering.emit(node, "Concat", [lowering.source(source) for source in sources], dim=axes_of(sources[0]).dim(dim))
