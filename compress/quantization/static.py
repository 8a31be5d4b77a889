"""Static int8: quantize a float ONNX network to fixed 8-bit grids for weights and activations, in QDQ form.

ONNX Runtime and OpenVINO turn QDQ (quantize and dequantize around each operator) into integer arithmetic. ONNX Runtime's
quantizer places the nodes. This file chooses its options and finishes its result: ranges from histograms, equalised
layers, weights rounded as everywhere in the toolkit, corrected biases, and short names, which make the file smaller.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

from architectures.layers.table import LAYER_TABLE
from architectures.onnx_costs import ONNX_CONVOLUTIONS, ONNX_PRODUCTS
from compress.quantization.calibration import Histogram, Images, Method, histograms, range_of, session, watched
from compress.quantization.equalization import equalize
from compress.quantization.int8_table import Int8Row, decibels
from compress.quantization.weights import DEFAULT_FORM, quantize_weight, WeightForm
from metadata.errors import UserError

LARGEST_BIAS = 2**30  # levels, of the 2**31 that fit
NOT_QUANTIZED = "the quantizer left it float"
Operators = Literal["weighted", "sums", "all"]
OPERATORS: tuple[Operators, ...] = get_args(Operators)


def quantized_operators(choice: Operators) -> list[str]:
    """Return the ONNX operators that a choice gives integers, by the layer table."""
    included = OPERATORS[:OPERATORS.index(choice) + 1]
    return sorted({name for row in LAYER_TABLE.values() for name, operator in row.operators.items()
                   if operator.quantized in included})


def weighted_operators() -> list[str]:
    """Return the ONNX operators of layers with weights."""
    return sorted({name for row in LAYER_TABLE.values() if row.weighted for name, operator in row.operators.items()
                   if operator.quantized == "weighted"})


@dataclass(frozen=True, kw_only=True)
class StaticSettings:
    """One way to quantize.

    Args:
        operators: which operators become int8: "weighted": layers with weights; "sums": sums and pools too; "all": every
            operator that has an int8 kernel.
        activations: unsigned or signed 8 bits.
        weights: see `compress.quantization.weights`: "pair" and "7-bit" answer alike on CPUs without VNNI.
        method: how to choose ranges.
        images: number of calibration images to use; 0: all.
        correct: subtract from each bias the mean error of the rounded weights.
        equalise: first equalise the channel ranges of neighbouring layers.
        float_ends: keep the first and the last layer float.
    """

    operators: Operators = "sums"
    activations: Literal["uint8", "int8"] = "uint8"
    weights: WeightForm = DEFAULT_FORM
    method: Method = "min-max"
    images: int = 0
    correct: bool = True
    equalise: bool = False
    float_ends: bool = False

    def ends(self, names: Sequence[str]) -> set[str]:
        """Return which of a network's layers, given in order, `float_ends` keeps float."""
        return {names[0], names[-1]} if self.float_ends and names else set()

    def __str__(self) -> str:
        parts = ["U8S8" if self.activations == "uint8" else "S8S8", self.method, self.operators]
        parts += [f"{self.images} images"] if self.images else []
        parts += [text for text, on in ((f"{self.weights} weights", self.weights != DEFAULT_FORM),
                                        ("biases as trained", not self.correct), ("equalised", self.equalise),
                                        ("float ends", self.float_ends)) if on]
        return ", ".join(parts)


@dataclass
class Calibration:
    """A float network and its calibration images. Candidates share its histograms and its equalised form.

    Args:
        model: as `compress.packaging.export.export` writes it.
        images: (N, C, H, W), preprocessed.
        threads: number of ONNX Runtime's threads.
    """

    model: onnx.ModelProto
    images: Images
    threads: int = 1
    _models: dict[bool, onnx.ModelProto] = field(init=False, default_factory=dict)
    _histograms: dict[tuple[bool, int], dict[str, Histogram]] = field(init=False, default_factory=dict)

    def network(self, equalised: bool = False) -> onnx.ModelProto:
        """Return the float network, or its equalised form."""
        if equalised not in self._models:
            self._models[equalised] = equalize(self.model)[0] if equalised else self.model
        return self._models[equalised]

    def histograms(self, equalised: bool = False, images: int = 0) -> dict[str, Histogram]:
        """Return the histograms of the network's tensors on the first `images` images; 0: on all."""
        key = equalised, images
        if key not in self._histograms:
            self._histograms[key] = histograms(self.network(equalised), self.images[:images or None], self.threads)
        return self._histograms[key]


def layers_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that are layers with weights, in order."""
    operators = weighted_operators()
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in operators and node.input[1] in constants]


def layer_weights(model: onnx.ModelProto) -> dict[str, int]:
    """Return the number of weights of each layer, without its bias."""
    constants = _constants(model.graph)
    return {node.name: int(np.prod(constants[node.input[1]].dims)) for node in layers_of(model)}


def _with_what_follows(network: onnx.ModelProto, floats: Collection[str]) -> set[str]:
    """Return the float layers and the operators without weights that read a float tensor: int8 there would gain nothing."""
    layers = {node.name for node in layers_of(network)}
    products = {node.name for node in network.graph.node if node.op_type in weighted_operators()} - layers  # of attention
    stay, float_tensors = products | set(floats), set[str]()
    for node in network.graph.node:
        if node.name in floats or (node.name not in layers and float_tensors.intersection(node.input)):
            stay.add(node.name)
            float_tensors.update(node.output)
    return stay


@dataclass(frozen=True)
class Int8Network:
    """An int8 network.

    Args:
        model: in QDQ form.
        outputs: for each layer, by name, the tensor of the float network that the layer's output in `model` corresponds to:
            the layer's own output, or that of the activation fused into the layer.
        network: the float network that was quantized, equalised if the settings say so.
    """

    model: onnx.ModelProto
    outputs: dict[str, str]
    network: onnx.ModelProto


def quantize_static(calibration: Calibration, settings: StaticSettings, kept_float: Collection[str] = (),
                    only: Collection[str] = ()) -> Int8Network:
    """Quantize a float network.

    Args:
        calibration: the float network with its histograms.
        settings: how to quantize.
        kept_float: names of layers that stay float.
        only: if given, quantize these layers alone.

    Raises:
        UserError: no layer is left to become int8.
    """
    network = calibration.network(settings.equalise)
    found = calibration.histograms(settings.equalise, settings.images)
    names = [node.name for node in layers_of(network)]
    stay = set(kept_float) | settings.ends(names)
    if not set(names) - stay:
        raise UserError("quantize_static: no Conv2d or Linear layer is left to become int8")
    ranges = TensorsData(CalibrationMethod.MinMax, {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ((name, range_of(histogram, settings.method)) for name, histogram in found.items())})
    copied = onnx.ModelProto()
    copied.CopyFrom(network)
    quantizer = QDQQuantizer(
        copied, True, False, QuantType.QInt8,  # per-channel weight scales; the weights are rounded again below
        QuantType.QUInt8 if settings.activations == "uint8" else QuantType.QInt8, ranges, sorted(only),
        sorted(_with_what_follows(network, stay)),
        weighted_operators() if only else quantized_operators(settings.operators),
        {"ActivationSymmetric": False, "WeightSymmetric": True,
         "QuantizeBias": False})  # runtimes quantize biases when they load the file; stored scales would only add bytes
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    round_weights(network, quantized, settings.weights)
    if settings.correct:
        correct_biases(network, quantized, found)
    outputs = {node.name: node.output[0].removesuffix("_QuantizeLinear_Input")
               for node in layers_and_products(quantized.graph)}
    return Int8Network(compacted(quantized), outputs, network)


# -------------------------------------------------------------------------------------------------- following a graph


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _rounded(graph: onnx.GraphProto) -> dict[str, NDArray[np.float64]]:
    """Return the dequantized weights, by the name of the output of their DequantizeLinear node."""
    constants, values = _constants(graph), {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            integers, scale = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in node.input[:2])
            axis = _attribute(node, "axis", 1)
            shape = [1] * integers.ndim
            if scale.size > 1:
                shape[axis] = -1
            values[node.output[0]] = integers * scale.reshape(shape)
    return values


def round_weights(network: onnx.ModelProto, quantized: onnx.ModelProto, form: WeightForm) -> None:
    """Replace the integer weights of each int8 layer and their scales, in place.

    Runtimes hold a bias as 32-bit multiples of its channel's scale times the input's. A channel whose weights are so small
    that its bias would not fit gets a larger scale: its bias would saturate.

    Args:
        network: the float network.
        quantized: its int8 form, in which each layer has weights of its own.
        form: see `quantize_weight`.

    Raises:
        UserError: the weights are not finite.
    """
    floats, constants = _constants(network.graph), _constants(quantized.graph)
    restoring = {node.output[0]: node for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    weight_names = {node.name: node.input[1] for node in layers_of(network)}
    for node in quantized.graph.node:
        restored = restoring.get(node.input[1]) if node.name in weight_names else None
        if restored is None:
            continue
        exact = torch.from_numpy(numpy_helper.to_array(floats[weight_names[node.name]]).copy())
        axis, groups = _attribute(restored, "axis", 1), _attribute(node, "group", 1)
        depthwise = groups == len(exact) and exact.shape[1] == 1
        levels, scale = quantize_weight(exact.movedim(axis, 0), form, depthwise, node.name)
        if len(node.input) > 2:
            bias, step = (torch.from_numpy(numpy_helper.to_array(constants[name]).copy())
                          for name in (node.input[2], restoring[node.input[0]].input[1]))
            least = (bias.abs() / (step * LARGEST_BIAS)).maximum(scale)
            levels = (levels * (scale / least).view(-1, *[1] * (levels.dim() - 1))).to(torch.int8)  # towards 0
            scale = least
        scale[~levels.flatten(1).any(1)] = 1
        for name, values in zip(restored.input, (levels.movedim(0, axis), scale), strict=False):
            constants[name].CopyFrom(numpy_helper.from_array(values.contiguous().numpy(), name))


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def correct_biases(network: onnx.ModelProto, quantized: onnx.ModelProto, found: dict[str, Histogram]) -> int:
    """Subtract from each int8 layer's bias the mean error of the rounded weights, in place; return the number of layers.

    Source: Nagel et al. 2019 (see compress/quantization/equalization.py), section 4.2, eq. 17: the rounding error of the
    weights times the mean of each input channel; borders count as the inside.
    """
    floats, constants, rounded = _constants(network.graph), _constants(quantized.graph), _rounded(quantized.graph)
    inputs = {node.name: node for node in layers_of(network)}
    corrected = 0
    for node in quantized.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3 or node.input[1] not in rounded:
            continue
        given = found.get(inputs[node.name].input[0])
        if given is None:  # it reads a tensor of the network's own, of which no image is measured
            continue
        exact = numpy_helper.to_array(floats[inputs[node.name].input[1]]).astype(np.float64)
        error = (rounded[node.input[1]] - exact).reshape(*exact.shape[:2], -1).sum(axis=2)  # (out, in of a group)
        means = given.channel_means
        groups = len(means) // error.shape[1]
        shift = np.einsum("goi,gi->go", error.reshape(groups, -1, error.shape[1]), means.reshape(groups, -1)).reshape(-1)
        bias = constants[node.input[2]]
        bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) - shift).astype(np.float32), bias.name))
        corrected += 1
    return corrected


def compacted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store equal constants once, and give short names to all but layers, input and output.

    In a network of a few hundred thousand weights the quantizer's names are a tenth of the file. Each layer keeps its own
    zero points, though all are zero: on CPUs without VNNI, ONNX Runtime rewrites them in place.
    """
    graph = model.graph
    alike: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.INT8:
            renamed[tensor.name] = tensor.name
            continue
        renamed[tensor.name] = alike.setdefault((tensor.data_type, values.shape, values.tobytes()), tensor.name)
    kept = [tensor for tensor in graph.initializer if renamed[tensor.name] == tensor.name]
    layers = {node.name for node in layers_and_products(graph)}
    fixed = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {name: name for name in fixed}
    new_tensors = (name for number in count() if (name := f"t{number}") not in fixed)
    new_nodes = (name for number in count() if (name := f"n{number}") not in layers)

    def shortened(name: str) -> str:
        name = renamed.get(name, name)
        if name and name not in short:
            short[name] = next(new_tensors)
        return short.get(name, name)

    del graph.value_info[:]
    for node in graph.node:
        inputs, outputs = [shortened(name) for name in node.input], [shortened(name) for name in node.output]
        del node.input[:], node.output[:]
        node.input.extend(inputs)
        node.output.extend(outputs)
        if node.name not in layers:
            node.name = next(new_nodes)  # ONNX Runtime derives tensor names from the node's name, so it must not be empty
        node.doc_string = ""
    tensors = [numpy_helper.from_array(numpy_helper.to_array(tensor), shortened(tensor.name)) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    onnx.checker.check_model(model, full_check=True)
    return model


def layers_and_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that the evaluator counts as layers; a submission's metadata lists their names."""
    return [node for node in graph.node if node.op_type in ONNX_CONVOLUTIONS or node.op_type in ONNX_PRODUCTS]


# --------------------------------------------------------------------------------------------------------- the table


def int8_rows(calibration: Calibration, quantized: Int8Network, images: Images, why_float: dict[str, str],
              times: dict[str, tuple[float | None, float | None]]) -> list[Int8Row]:
    """Return one row for each layer.

    Args:
        calibration: the float network.
        quantized: the result of `quantize_static`.
        images: (N, C, H, W), to compare the layers' outputs on.
        why_float: the reason for each layer that stayed float.
        times: each layer's milliseconds as float and as int8, where they were measured.
    """
    network, graph = quantized.network, quantized.model.graph
    layers, found, weights = layers_of(network), calibration.histograms(), layer_weights(network)
    restored = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    now = {node.name: node for node in layers_and_products(graph)}
    noise = _noise(calibration, quantized, images)
    macs = {node.name: _macs(node, weights[node.name], found[node.output[0]].shape) for node in layers}
    rows = []
    for node in layers:
        int8, kind = set(now[node.name].input[:2]) <= restored, "Conv2d" if node.op_type == "Conv" else "Linear"
        reason = "static, per channel" if int8 else why_float.get(node.name, NOT_QUANTIZED)
        before_ms, after_ms = times.get(node.name, (None, None))
        rows.append(Int8Row(
            layer=node.name, kind=kind, dtype="int8" if int8 else "float32", reason=reason, weights=weights[node.name],
            macs_share=macs[node.name] / max(sum(macs.values()), 1), sqnr_db=noise[node.name], before_ms=before_ms,
            after_ms=after_ms))
    return rows


def _noise(calibration: Calibration, quantized: Int8Network, images: Images) -> dict[str, float]:
    """Return the signal-to-noise ratio of each layer's output over all images, in decibels; run one image at a time."""
    graph = quantized.model.graph
    restoring = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    rounding = {node.input[0]: restoring.get(node.output[0], node.input[0]) for node in graph.node
                if node.op_type == "QuantizeLinear"}  # a ReLU fused into a layer is applied by the rounding of its output
    results = {node.name: rounding.get(node.output[0], node.output[0]) for node in layers_and_products(graph)}
    names = [node.name for node in layers_of(quantized.network)]
    expected, got = (session(watched(model, sorted({tensors[name] for name in names})), calibration.threads)
                     for model, tensors in ((quantized.network, quantized.outputs), (quantized.model, results)))
    sums = {name: [0.0, 0.0] for name in names}
    for image in images:
        before, after = (_answers(side, image) for side in (expected, got))
        for name in names:
            signal, value = before[quantized.outputs[name]].astype(np.float64), after[results[name]]
            sums[name][0] += float(np.square(signal).sum())
            sums[name][1] += float(np.square(value - signal).sum())
    return {name: decibels(*pair) for name, pair in sums.items()}


def _answers(runtime: Any, image: Images) -> dict[str, NDArray[np.float32]]:
    """Return a session's outputs for one image, (C, H, W), by name."""
    values = runtime.run(None, {runtime.get_inputs()[0].name: image[None]})
    return {output.name: value for output, value in zip(runtime.get_outputs(), values, strict=True)}


def _macs(node: onnx.NodeProto, weights: int, shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of a layer for one image; `shape` is the output's shape without the batch."""
    channels = shape[0] if node.op_type != "MatMul" else shape[-1]
    return weights * int(np.prod(shape)) // channels
