"""A described network as one ONNX file, written straight from the layer table.

No exporter is needed: the architecture JSON is a graph of some 25 layer types, and each is an ONNX operator or two. So the
nodes carry our layers' names, BatchNorm is folded first, and nothing depends on how a version of torch traces.

Opset 17 is the lowest that has what the table needs in a form that runtimes fuse (scales a channel in QuantizeLinear since
13, HardSwish since 14), so that older runtimes read the file too; GELU, which is an operator since 20, and GroupNorm
(21) are written out as the operators that they are made of, which runtimes recognise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from architectures.build import check_shapes
from architectures.describe import carry_over, describe
from architectures.folding import fold_batch_norm
from architectures.layers import Architecture, Layer
from metadata.errors import UserError, VerificationError

OPSET = 17
INPUT = "input"
PLAIN = {"ReLU": "Relu", "Sigmoid": "Sigmoid", "Tanh": "Tanh", "Hardswish": "HardSwish", "Add": "Add", "Multiply": "Mul"}


class _Writer:
    """The graph under construction: nodes, initializers, and which tensor holds each layer's output."""

    def __init__(self, architecture: Architecture, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.shapes: dict[str, tuple[int, ...]] = {INPUT: architecture.input_shape} | check_shapes(architecture)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.tensors = {INPUT: INPUT}  # a layer's output by its name; layers that do nothing share their input's

    def constant(self, name: str, values: Any, dtype: type[np.generic] = np.float32) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def parameter(self, layer: Layer, key: str) -> str:
        name = f"{layer.name}.{key}"
        return self.constant(name, self.weights[name].detach().float().cpu().numpy())

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node whose output has its name."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def add(self, layer: Layer) -> None:
        inputs = [self.tensors[source] for source in layer.inputs]
        shape = self.shapes[layer.inputs[0]]
        if layer.type in ("Dropout", "Identity"):
            self.tensors[layer.name] = inputs[0]
        elif layer.type in PLAIN:
            self.tensors[layer.name] = self.node(PLAIN[layer.type], layer.name, inputs)
        else:
            self.tensors[layer.name] = LAYERS[layer.type](self, layer, inputs, shape)


def _bias(writer: _Writer, layer: Any, outputs: int) -> str:
    """A layer's bias, zeros where it has none.

    OpenVINO 2026 gives wrong int8 sums for small batches behind a Gemm without one; and calibration may correct it.
    """
    return writer.parameter(layer, "bias") if layer.bias else writer.constant(f"{layer.name}.bias", np.zeros(outputs))


def _convolution(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    inputs = [*inputs, writer.parameter(layer, "weight"), _bias(writer, layer, layer.out_channels)]
    return writer.node("Conv", layer.name, inputs, kernel_shape=layer.kernel_size, strides=layer.stride,
                       pads=[*layer.padding, *layer.padding], dilations=layer.dilation, group=layer.groups)


def _linear(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    if len(shape) == 1:  # (N, features)
        inputs = [*inputs, writer.parameter(layer, "weight"), _bias(writer, layer, layer.out_features)]
        return writer.node("Gemm", layer.name, inputs, transB=1)
    weight = writer.constant(f"{layer.name}.weight", writer.weights[f"{layer.name}.weight"].detach().cpu().numpy().T)
    product = writer.node("MatMul", f"{layer.name}.product", [*inputs, weight])
    return writer.node("Add", layer.name, [product, _bias(writer, layer, layer.out_features)])


def _batch_norm(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    name, count = layer.name, layer.num_features
    affine = ([writer.parameter(layer, "weight"), writer.parameter(layer, "bias")] if layer.affine else
              [writer.constant(f"{name}.weight", np.ones(count)), writer.constant(f"{name}.bias", np.zeros(count))])
    moments = [writer.parameter(layer, "running_mean"), writer.parameter(layer, "running_var")]
    return writer.node("BatchNormalization", name, [*inputs, *affine, *moments], epsilon=layer.eps)


def _group_norm(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    """Each group of channels as one channel of an InstanceNormalization, then the scale and offset of each channel."""
    name, groups = layer.name, layer.num_groups
    ones, zeros = (writer.constant(f"{name}.{key}", np.full(groups, value)) for key, value in (("ones", 1), ("zeros", 0)))
    rows = writer.constant(f"{name}.rows", [0, groups, -1], np.int64)
    grouped = writer.node("Reshape", f"{name}.grouped", [*inputs, rows])
    normal = writer.node("InstanceNormalization", f"{name}.normal", [grouped, ones, zeros], epsilon=layer.eps)
    back = writer.constant(f"{name}.shape", [-1, *shape], np.int64)
    if not layer.affine:
        return writer.node("Reshape", name, [normal, back])
    plain = writer.node("Reshape", f"{name}.plain", [normal, back])
    scale, offset = (writer.constant(f"{name}.{key}", writer.weights[f"{name}.{key}"].detach().cpu().numpy()
                                     .reshape(-1, *[1] * (len(shape) - 1))) for key in ("weight", "bias"))
    return writer.node("Add", name, [writer.node("Mul", f"{name}.scaled", [plain, scale]), offset])


def _relu6(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    return writer.node("Clip", layer.name, [*inputs, writer.constant(f"{layer.name}.min", 0.0),
                                            writer.constant(f"{layer.name}.max", 6.0)])


def _silu(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    return writer.node("Mul", layer.name, [*inputs, writer.node("Sigmoid", f"{layer.name}.sigmoid", inputs)])


def _gelu(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    """x/2 (1 + erf(x / sqrt 2)), or with tanh(sqrt(2/pi) (x + 0.044715 x^3)). Source: Hendrycks and Gimpel 2016."""
    name = layer.name
    one, half = writer.constant(f"{name}.one", 1.0), writer.constant(f"{name}.half", 0.5)
    if layer.approximate == "none":
        scaled = writer.node("Div", f"{name}.scaled", [*inputs, writer.constant(f"{name}.root", np.sqrt(2.0))])
        curve = writer.node("Erf", f"{name}.erf", [scaled])
    else:
        cube = writer.node("Pow", f"{name}.cube", [*inputs, writer.constant(f"{name}.three", 3.0)])
        small = writer.node("Mul", f"{name}.small", [cube, writer.constant(f"{name}.factor", 0.044715)])
        inner = writer.node("Add", f"{name}.inner", [*inputs, small])
        root = writer.constant(f"{name}.root", np.sqrt(2 / np.pi))
        curve = writer.node("Tanh", f"{name}.tanh", [writer.node("Mul", f"{name}.scaled", [inner, root])])
    gate = writer.node("Add", f"{name}.gate", [curve, one])
    return writer.node("Mul", name, [writer.node("Mul", f"{name}.gated", [*inputs, gate]), half])


def _beyond(layer: Any, shape: tuple[int, ...], dilation: Sequence[int]) -> list[int]:
    """How far the last windows of a pool reach beyond the image, by axis: its padding, or more by ceil_mode.

    ONNX runtimes do not agree on ceil_mode (ONNX keeps a last window that begins in the padding, PyTorch does not), so it
    is written out as padding.
    """
    ends = []
    for size, kernel, stride, pad, step in zip(shape[1:], layer.kernel_size, layer.stride, layer.padding, dilation,
                                               strict=True):
        reach = step * (kernel - 1) + 1
        windows = -(-(size + 2 * pad - reach) // stride) + 1
        if (windows - 1) * stride >= size + pad:  # as PyTorch's pooling_output_shape
            windows -= 1
        ends.append(max(pad, (windows - 1) * stride + reach - size - pad) if layer.ceil_mode else pad)
    return ends


def _max_pool(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    return writer.node("MaxPool", layer.name, inputs, kernel_shape=layer.kernel_size, strides=layer.stride,
                       dilations=layer.dilation, pads=[*layer.padding, *_beyond(layer, shape, layer.dilation)])


def _average_pool(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    """The mean of what lies in the image, times its share of the window where padding counts.

    OpenVINO 2026 is wrong where padding counts itself, once the network is int8: it pads integers with 0, which is not what
    stands for zero there.
    """
    ends = _beyond(layer, shape, (1, 1))
    shares = [_shares_inside(*axis) for axis in zip(shape[1:], layer.kernel_size, layer.stride, layer.padding, ends,
                                                    strict=True)]
    counts = layer.count_include_pad and any((share < 1).any() for share in shares)
    pooled = writer.node("AveragePool", f"{layer.name}.inside" if counts else layer.name, inputs,
                         kernel_shape=layer.kernel_size, strides=layer.stride, pads=[*layer.padding, *ends])
    if not counts:
        return pooled
    return writer.node("Mul", layer.name, [pooled, writer.constant(f"{layer.name}.shares", np.outer(*shares))])


def _shares_inside(size: int, kernel: int, stride: int, pad: int, end: int) -> NDArray[np.float64]:
    """By window along an axis: the part inside the image over the part that counts, which ends with the layer's padding."""
    starts = np.arange((size + pad + end - kernel) // stride + 1) * stride - pad
    inside = np.minimum(starts + kernel, size) - np.maximum(starts, 0)
    return inside / (np.minimum(starts + kernel, size + pad) - starts)


def _adaptive_pool(kind: str) -> Callable[..., str]:
    def write(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
        size, wanted = shape[1:], layer.output_size
        if wanted == (1, 1):
            return writer.node(f"Global{kind}Pool", layer.name, inputs)
        if any(have % want for have, want in zip(size, wanted, strict=True)):
            raise UserError(f"export: layer {layer.name} pools {size[0]}x{size[1]} to {wanted[0]}x{wanted[1]}; windows of "
                            "unequal size have no ONNX operator, only whole multiples do")
        kernel = [have // want for have, want in zip(size, wanted, strict=True)]
        return writer.node(f"{kind}Pool", layer.name, inputs, kernel_shape=kernel, strides=kernel)
    return write


def _flatten(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    if layer.start_dim == 1 and layer.end_dim in (-1, len(shape)):
        return writer.node("Flatten", layer.name, inputs, axis=1)
    target = writer.constant(f"{layer.name}.shape", [-1, *writer.shapes[layer.name]], np.int64)
    return writer.node("Reshape", layer.name, [*inputs, target])


def _mean(writer: _Writer, layer: Any, inputs: list[str], shape: tuple[int, ...]) -> str:
    axes = sorted(dim % (len(shape) + 1) for dim in layer.dim)
    if axes != [2, 3] or len(shape) != 3:
        return writer.node("ReduceMean", layer.name, inputs, axes=axes, keepdims=int(layer.keepdim))
    if layer.keepdim:  # runtimes have int8 kernels for this pooling, and none for the mean
        return writer.node("GlobalAveragePool", layer.name, inputs)
    pooled = writer.node("GlobalAveragePool", f"{layer.name}.pooled", inputs)
    return writer.node("Flatten", layer.name, [pooled], axis=1)


LAYERS: dict[str, Callable[..., str]] = {
    "Conv2d": _convolution, "Linear": _linear, "BatchNorm1d": _batch_norm, "BatchNorm2d": _batch_norm,
    "GroupNorm": _group_norm, "ReLU6": _relu6, "SiLU": _silu, "GELU": _gelu,
    "Hardsigmoid": lambda writer, layer, inputs, shape: writer.node("HardSigmoid", layer.name, inputs, alpha=1 / 6,
                                                                    beta=0.5),
    "LeakyReLU": lambda writer, layer, inputs, shape: writer.node("LeakyRelu", layer.name, inputs,
                                                                  alpha=layer.negative_slope),
    "MaxPool2d": _max_pool, "AvgPool2d": _average_pool,
    "AdaptiveAvgPool2d": _adaptive_pool("Average"), "AdaptiveMaxPool2d": _adaptive_pool("Max"),
    "Flatten": _flatten, "Mean": _mean,
    "Concat": lambda writer, layer, inputs, shape: writer.node("Concat", layer.name, inputs, axis=layer.dim)}


def export(model: fx.GraphModule, architecture: Architecture) -> tuple[onnx.ModelProto, Architecture]:
    """The network as ONNX, and the architecture that the file follows: the same with BatchNorm folded.

    The file maps "input", (N, C, H, W) float32 with any N, to (N, classes) logits; nodes have the layers' names.

    Args:
        model: a float network as `architectures.build.build` makes them, on the CPU; it stays as it is.
        architecture: what describes it, with its history.

    Raises:
        UserError: a layer has no ONNX form, or is int8 already.
    """
    folded = fold_batch_norm(model)
    described = carry_over(describe(folded, architecture.input_shape), architecture)
    if described.is_int8:
        raise UserError("export: the model is int8 already (quantize_dynamic); export the float one")
    writer = _Writer(described, folded.state_dict())
    for layer in described.layers:
        writer.add(layer)
    output = writer.tensors[described.layers[-1].name]
    graph = helper.make_graph(
        writer.nodes, described.model_type,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", *described.input_shape])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", *described.output_shape])], writer.initializers)
    exported = helper.make_model(graph, producer_name="compress", opset_imports=[helper.make_opsetid("", OPSET)],
                                 ir_version=8)  # that of opset 17's time: older runtimes refuse a newer one
    onnx.checker.check_model(exported, full_check=True)
    return exported, described


def check_same(expected: Tensor, got: Tensor, tolerance: float = 1e-3) -> dict[str, float]:
    """Holds the logits of the exported file to those of the network: (N, classes) each.

    The largest difference may be `tolerance` of the largest logit, which float32 sums in another order stay far below,
    and the first class of every image must be the same, but for a tie within that difference.

    Raises:
        VerificationError: they differ by more; the message has the numbers.
    """
    difference = float((expected - got).abs().max())
    scale = max(float(expected.abs().max()), 1e-6)
    first, other = expected.argmax(1), got.argmax(1)
    rows = torch.arange(len(expected))
    margin = expected[rows, first] - expected[rows, other]
    changed = int((margin > tolerance * scale).sum())
    if not bool(torch.isfinite(expected).all() and torch.isfinite(got).all()) or difference > tolerance * scale or changed:
        raise VerificationError(f"export: the ONNX file is not the network: logits differ by up to {difference:.3g} "
                                f"(largest logit {scale:.3g}), {changed} of {len(expected)} images get another class")
    return {"images": len(expected), "largest_difference": difference, "largest_logit": scale,
            "other_first_class": int((first != other).sum())}
