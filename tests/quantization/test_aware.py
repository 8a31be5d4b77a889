"""Quantization-aware networks: their grids are those of the real int8 model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from architectures.describe import describe
from compress.packaging.export import export
from compress.quantization.aware import prepare_aware
from compress.quantization.dynamic import quantize_graph
from compress.quantization.int8_table import sqnr_db
from compress.quantization.static import Calibration, StaticSettings, quantize_static as static_file
from compress.quantization.weights import WEIGHT_FORMS, WeightForm
from compress.training.memory_format import unsafe_channels_last
from metadata.errors import UserError
from tests.helpers.fake_quantized import assert_computes_with_the_weights_of, network, parts, SHAPE, some, Weights
from tests.helpers.graphs import graph_of


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches, as ONNX Runtime's calibration takes them."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch.numpy()}


@pytest.mark.parametrize("kind", ["norms", "off", "plain"])
def test_eval_mode_is_onnx_runtimes_static_int8(kind: str, tmp_path: Path) -> None:
    model, batches, images = network(kind), some(), some(1, seed=2)[0]
    before, code = copy.deepcopy(model.state_dict()), model.code
    prepared = prepare_aware(model, batches, weights="8-bit")
    assert model.code == code and not model.training and not prepared.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_computes_with_the_weights_of(prepared, model, "8-bit")
    exported, _ = export(model, describe(model, SHAPE))
    onnx.save(exported, tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(batches), quant_format=QuantFormat.QDQ,
                    per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    constants = {tensor.name: numpy_helper.to_array(tensor)
                 for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    grids = {(float(f"{float(constants[name]):.5g}"), int(constants[name.replace("_scale", "_zero_point")]))
             for name in constants if name.endswith("_scale") and not constants[name].ndim}
    steps = [(float(activation.high - activation.low) / 255, activation) for activation in parts(prepared)[1]]
    assert grids == {(float(f"{step:.5g}"), round(float(-activation.low) / step)) for step, activation in steps}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact sums without VNNI too
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, ["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
    with torch.no_grad():
        got, exact = prepared(images), model(images)
    assert float((got - expected).abs().max()) < 4.1 * steps[-1][0]  # logits are on a grid; a value on an edge moves some
    assert float(((got - expected).abs() < 0.01 * steps[-1][0]).float().mean()) > 0.75
    assert sqnr_db(expected, got) > 40 and sqnr_db(exact, got) > 35


@pytest.mark.parametrize("form", WEIGHT_FORMS)
@pytest.mark.parametrize("kind", ["norms", "plain"])
def test_weights_are_those_that_the_static_quantizer_writes(form: WeightForm, kind: str) -> None:
    model = network(kind)
    exported, _ = export(model, describe(model, SHAPE))
    file = static_file(Calibration(exported, some()[0].numpy()), StaticSettings(weights=form)).model
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    stored = [constants[node.input[0]] * constants[node.input[1]].reshape(-1, *[1] * (constants[node.input[0]].ndim - 1))
              for node in file.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    prepared = prepare_aware(model, some(), weights=form)
    with torch.no_grad(), Weights() as weights:
        prepared(some()[0])
    assert len(weights.seen) == len(stored) > 4
    assert all(any(np.array_equal(got.numpy(), levels) for levels in stored) for got in weights.seen)


def test_what_cannot_be_prepared_gets_one_line() -> None:
    with pytest.raises(UserError, match=r"^quantization-aware training: the model is int8 already[^\n]*$"):
        prepare_aware(quantize_graph(network())[0], some())
    with pytest.raises(UserError, match=r"^quantization-aware training: the model has no Conv2d or Linear[^\n]*$"):
        prepare_aware(graph_of(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())), some())
    with pytest.raises(UserError, match=r"^quantization-aware training: there are no images[^\n]*$"):
        prepare_aware(network(), [])


@pytest.mark.skipif("AVX512" in torch.backends.cpu.get_cpu_capability(), reason="no layer is unsafe with AVX512")
def test_a_wrapped_layer_that_is_unsafe_channels_last_is_found() -> None:
    """The backward pass of a narrow 1x1 convolution with a stride corrupts memory, wrapped or not."""
    model = graph_of(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                   nn.Conv2d(4, 8, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))
    device = torch.device("cpu")
    assert "layer 3:" in unsafe_channels_last(model, device)
    assert "layer 3.layer:" in unsafe_channels_last(prepare_aware(model, some(1)), device)


def test_what_is_added_lies_on_the_device_of_the_network() -> None:
    model = network().to("meta")  # a device that every machine has beside the CPU
    prepared = prepare_aware(model, [torch.zeros(2, *SHAPE)], freeze_after=1)
    assert {tensor.device.type for tensor in prepared.state_dict().values()} == {"meta"}
