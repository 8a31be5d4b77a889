"""Check ExecuTorch's `.pte` files without running them: one method, known operators, and XNNPACK's graphs inside."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from pathlib import Path

from architectures.build import MAX_ACTIVATION_ELEMENTS, MAX_TOTAL_ELEMENTS
from architectures.counting import check_costs
from architectures.image_layout import takes_channels_last
from compress.evaluation.flat_tables import FlatTable
from metadata.errors import VerificationError
from metadata.files import check_download

DELEGATE = "XnnpackBackend"
TENSOR, FLOAT = 5, 6  # codes of the schema: a value that is a tensor, a tensor of float32
KERNEL_CALL, DELEGATE_CALL = 1, 2
MAX_ARENA_BYTES = 2**31  # of what is computed
MAX_RANK = 8
# The operators that may stay outside of XNNPACK, without "aten::" or "quantized_decomposed::".
_PTE_OPERATORS = """
    _log_softmax _native_batch_norm_legit_no_training _softmax _to_copy _to_dim_order_copy abs add addmm amax amin
    argmax avg_pool2d bmm cat clamp clone _clone_dim_order constant_pad_nd convolution cos dequantize_per_channel
    dequantize_per_tensor div elu eq erf exp expand_copy fill floor full full_like ge gelu glu gt hardtanh
    index_select le leaky_relu linear log logit lt masked_fill max_pool2d_with_indices maximum mean minimum mm mul
    native_group_norm native_layer_norm ne neg permute_copy pixel_shuffle pixel_unshuffle pow quantize_per_tensor
    reciprocal relu repeat round rsqrt select_copy sigmoid sin slice_copy split_copy split_with_sizes_copy sqrt
    squeeze_copy sub sum t_copy tanh transpose_copy unbind_copy unsqueeze_copy upsample_bilinear2d
    upsample_nearest2d var view_copy where"""
PTE_OPERATORS = frozenset(_PTE_OPERATORS.split())
# XNNPACK's nodes by their numbers in the schema: where the tensors are that a product or a pool reads and writes.
FULLY_CONNECTED, CONV, DEPTHWISE, DECONVOLUTION, ATTENTION, BATCH_PRODUCT = 2, 7, 13, 39, 36, 37
LAST_NODE = 47
XNN_POOLS = (12, 14)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutorchFile:
    """What a checked `.pte` file holds.

    Args:
        content: its bytes.
        parameters: the number of stored numbers.
        macs: multiply-adds an image, by the shapes that the file states.
        batch: the number of images that a call has.
        channels_last: whether the input is (N, H, W, C).
    """

    content: bytes
    parameters: int
    macs: int
    batch: int
    channels_last: bool


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What is counted on the way through a file: stored numbers, multiply-adds, other steps by node."""

    parameters: int = 0
    macs: int = 0
    elements: int = 0
    work: dict[str, int] = dataclasses.field(default_factory=dict)

    def sizes(self, path: Path, shape: Sequence[int]) -> tuple[int, ...]:
        """Return a shape that is within the limits, and count its elements."""
        if len(shape) > MAX_RANK or min(shape, default=0) < 0:
            raise VerificationError(f"{path}: a tensor of shape {list(shape)[:MAX_RANK + 1]}")
        elements = math.prod(map(int, shape))
        self.elements += elements
        if elements > MAX_ACTIVATION_ELEMENTS or self.elements > MAX_TOTAL_ELEMENTS:
            raise VerificationError(f"{path}: a tensor has {elements:,} elements, {self.elements:,} with those before, "
                                    f"over the limits of {MAX_ACTIVATION_ELEMENTS:,} and {MAX_TOTAL_ELEMENTS:,}")
        return tuple(map(int, shape))


def read_executorch(path: Path, input_shape: Sequence[int], layout: str | None = None) -> ExecutorchFile:
    """Check a `.pte` file without running it: images in, one row of logits an image out, on the CPU, by XNNPACK.

    Args:
        path: the file.
        input_shape: (C, H, W) of an image, also where the file takes (N, H, W, C).
        layout: "NCHW" or "NHWC" where the metadata state it.

    Raises:
        VerificationError: not such a file, damaged, operators beyond the tables above, another delegate than XNNPACK,
            jumps, data in other files, several inputs or outputs, images of another shape, or sizes over the limits.
    """
    check_download(path)
    content = path.read_bytes()
    program = FlatTable.root(path, content, b"ET12")
    plans = program.tables(1)
    if len(plans) != 1 or plans[0].text(0) != "forward":
        raise VerificationError(f"{path}: expected one method, forward, got {len(plans)}")
    plan, tally = plans[0], Tally()
    if any(size < 0 or size > MAX_ARENA_BYTES for size in plan.numbers(8, "i8").tolist()) or plan.tables(9):
        raise VerificationError(f"{path}: the memory that it asks for is over the limit of {MAX_ARENA_BYTES:,} bytes, or "
                                "not the CPU's")
    tensors = _pte_values(path, plan, tally)
    image, logits = (_only_tensor(path, plan, field, what, tensors) for field, what in ((3, "input"), (4, "output")))
    if len(image) != 4 or image[0] < 1:
        raise VerificationError(f"{path}: expected an input of images (N, C, H, W), got {list(image)}")
    if not logits or logits[0] != image[0]:
        raise VerificationError(f"{path}: expected logits for {image[0]} images, got the shape {list(logits)}")
    _calls(path, plan, tensors, tally)
    _delegates(path, program, plan, tally)
    work = {name: steps // image[0] for name, steps in tally.work.items()}
    check_costs(str(path), tally.macs // image[0], work)
    return ExecutorchFile(content=content, parameters=tally.parameters, macs=tally.macs // image[0], batch=image[0],
                          channels_last=takes_channels_last(path, image, input_shape, layout))


def _pte_values(path: Path, plan: FlatTable, tally: Tally) -> dict[int, tuple[int, ...]]:
    """Return the shapes of the tensors by the number of the value; count those that are stored."""
    shapes = {}
    for index, value in enumerate(plan.tables(2)):
        tensor = value.table(1)
        if value.number(0, "B") != TENSOR or tensor is None:
            continue
        extra = tensor.table(9)
        if tensor.number(1, "i") or (extra and (extra.number(2, "b") or extra.number(3, "b"))):
            raise VerificationError(f"{path}: a tensor lies in another file, or not in the memory of the CPU; that is not "
                                    "supported")
        shapes[index] = tally.sizes(path, tensor.numbers(2, "i4").tolist())
        if tensor.number(5, "I"):
            tally.parameters += math.prod(shapes[index])
    return shapes


def _only_tensor(path: Path, plan: FlatTable, field: int, what: str, tensors: dict[int, tuple[int, ...]]
                 ) -> tuple[int, ...]:
    """Return the shape of the only input or output. Raise VerificationError unless it is float32."""
    numbers = plan.numbers(field, "i4").tolist()
    if len(numbers) != 1 or numbers[0] not in tensors:
        raise VerificationError(f"{path}: expected one {what}, a tensor, got {len(numbers)}")
    tensor = plan.tables(2)[numbers[0]].table(1)
    assert tensor is not None
    plain = tensor.numbers(3, "u1").tolist()
    if tensor.number(0, "b") != FLOAT or plain != list(range(len(plain))):
        raise VerificationError(f"{path}: expected an {what} of float32 in its usual order, got the type "
                                f"{tensor.number(0, 'b')} in the order {plain}")
    return tensors[numbers[0]]


def _calls(path: Path, plan: FlatTable, tensors: dict[int, tuple[int, ...]], tally: Tally) -> None:
    """Check the instructions, and count what the operators outside of XNNPACK cost."""
    names = []
    for operator in plan.tables(6):
        space, _, name = operator.text(0).rpartition("::")
        if space not in ("aten", "quantized_decomposed", "dim_order_ops") or name not in PTE_OPERATORS:
            raise VerificationError(f"{path}: operator {operator.text(0)!r} is not one of those that image classifiers are "
                                    "made of")
        names.append(name)
    for chain in plan.tables(5):
        for index, instruction in enumerate(chain.tables(2)):
            kind, call = instruction.number(0, "B"), instruction.table(1)
            if kind == DELEGATE_CALL:
                continue
            if kind != KERNEL_CALL or call is None or not 0 <= call.number(0, "i") < len(names):
                raise VerificationError(f"{path}: expected calls of operators and delegates, got instruction {kind}: jumps "
                                        "and the like are not supported")
            name = names[call.number(0, "i")]
            shapes = [tensors[at] for at in call.numbers(1, "i4").tolist() if at in tensors]
            _count(tally, f"{name} ({index})", name, shapes)


def _count(tally: Tally, where: str, name: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Count a call of an operator; its last tensor is its result."""
    steps = sum(map(math.prod, shapes))
    written = math.prod(shapes[-1]) if shapes else 0
    if name == "convolution" and len(shapes) > 2:
        tally.macs += written * math.prod(shapes[1][1:])
    elif name in ("mm", "bmm", "addmm", "linear") and len(shapes) > 2:
        first = shapes[1 if name == "addmm" else 0]
        tally.macs += written * (first[-1] if first else 1)
    elif "pool" in name and len(shapes) > 1:
        steps += written * math.prod(shapes[0][2:])  # at most: the window is a list of numbers
    elif name.startswith("upsample"):
        steps *= 16
    tally.work[where] = steps


# --------------------------------------------------------------------------------------------------- XNNPACK's graphs


def _delegates(path: Path, program: FlatTable, plan: FlatTable, tally: Tally) -> None:
    """Check the graphs for XNNPACK, and count what they cost."""
    inline, segments = program.tables(3), program.tables(4)
    for delegate in plan.tables(7):
        place = delegate.table(1)
        if delegate.text(0) != DELEGATE or place is None:
            raise VerificationError(f"{path}: a part is for {delegate.text(0)!r}; this evaluator runs programs for "
                                    f"{DELEGATE} and ExecuTorch's own kernels")
        index = place.number(1, "I")
        if place.number(0, "b") == 0 and index < len(inline):
            start, size = inline[index].data(0)
        elif place.number(0, "b") == 1 and index < len(segments):
            start, size = _segment(path, program, segments[index])
        else:
            raise VerificationError(f"{path}: a part for XNNPACK is not there")
        _xnnpack_graph(path, program.content[start:start + size], tally)


def _segment(path: Path, program: FlatTable, segment: FlatTable) -> tuple[int, int]:
    """Return where a segment begins in the file, and its bytes."""
    content = program.content
    if content[8:12] != b"eh00" or len(content) < 32:
        raise VerificationError(f"{path}: damaged: it has segments, and no header that says where")
    begin = struct.unpack_from("<Q", content, 24)[0] + segment.number(0, "Q")
    size = segment.number(1, "Q")
    if begin + size > len(content):
        raise VerificationError(f"{path}: damaged or cut short: a segment ends at {begin + size:,} of "
                                f"{len(content):,} bytes")
    return begin, size


def _xnnpack_graph(path: Path, blob: bytes, tally: Tally) -> None:
    """Check a graph for XNNPACK: its nodes, and the sizes of its tensors."""
    if blob[4:8] == b"XH00" and len(blob) >= 30:
        start, size, data, data_size = struct.unpack_from("<IIIQ", blob, 10)
        if start + size > len(blob) or data + data_size > len(blob):
            raise VerificationError(f"{path}: damaged or cut short: the weights of a part for XNNPACK lie outside of it")
        blob = blob[start:start + size]
    graph = FlatTable.root(path, blob, b"XN01")
    stored = len(graph.tables(8))
    shapes: dict[int, tuple[int, ...]] = {}
    for value in graph.tables(2):
        tensor = value.table(1)
        quantized = tensor if value.number(0, "B") == 2 else None
        tensor = tensor.table(0) if tensor and quantized else tensor
        if tensor is None:
            raise VerificationError(f"{path}: a part for XNNPACK has a value without a tensor")
        shape = tally.sizes(path, tensor.numbers(2, "u4").tolist())
        shapes[tensor.number(6, "I")] = shape
        constant = tensor.number(3, "I")
        if constant > max(0, stored - 1):
            raise VerificationError(f"{path}: a tensor of a part for XNNPACK names constant {constant:,} of {stored:,}")
        if constant:
            scales = quantized.table(2) if quantized and quantized.number(1, "B") == 1 else None
            tally.parameters += math.prod(shape) + (
                max(len(scales.numbers(0, "f4")), scales.number(3, "I")) if scales else 0)
    for index, each in enumerate(graph.tables(1)):
        kind, node = each.number(0, "B"), each.table(1)
        if not 1 <= kind <= LAST_NODE or node is None:
            raise VerificationError(f"{path}: a part for XNNPACK has a node of the kind {kind}, which is not known")
        tally.work[f"XNNPACK node {index} of {len(tally.work)}"] = _xnnpack_costs(kind, node, shapes, tally)


def _xnnpack_costs(kind: int, node: FlatTable, shapes: dict[int, tuple[int, ...]], tally: Tally) -> int:
    """Count the multiply-adds of a node. Return its other steps."""
    def shape(field: int) -> tuple[int, ...]:
        return shapes.get(node.number(field, "I"), ())

    if kind in (CONV, DEPTHWISE, DECONVOLUTION):
        images, result = shape(15), shape(18)
        window = node.number(4, "I") * node.number(5, "I")
        each = {CONV: node.number(10, "I"), DEPTHWISE: 1, DECONVOLUTION: node.number(11, "I")}[kind]
        tally.macs += math.prod(images if kind == DECONVOLUTION else result) * window * each
        return math.prod(images) + math.prod(result)
    if kind == FULLY_CONNECTED:
        tally.macs += math.prod(shape(3)) * (shape(1) or (1,))[-1]
        return math.prod(shape(0)) + math.prod(shape(3))
    if kind in (BATCH_PRODUCT, ATTENTION):
        query, result = shape(0), shape(5 if kind == ATTENTION else 2)
        tally.macs += math.prod(result) * (query or (1,))[-1] * (2 if kind == ATTENTION else 1)
        return math.prod(query) + math.prod(result)
    if kind in XNN_POOLS:
        images, result = shape(10), shape(11)
        window = min(node.number(4, "I") * node.number(5, "I"), math.prod(images[1:3]))
        return math.prod(images) + math.prod(result) * (1 + window)
    return max(map(math.prod, shapes.values()), default=0)
