"""The weights of static int8 files: three forms, rounded as everywhere, two of which answer alike on any CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from torch import nn

from compress.quantization.calibration import histograms
from compress.quantization.int8_table import sqnr_db
from compress.quantization.saturation import saturating
from compress.quantization.static import Calibration, quantize_static, round_weights, StaticSettings
from compress.quantization.weights import WeightForm
from tests.helpers.static_int8 import answers, BACKENDS, calibrated, exact, float_file, images, on_onnxruntime, Planes


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("reduced", [False, True], ids=["8-bit", "7-bit"])
def test_weights_without_a_limit_are_those_of_onnx_runtimes_quantizer(reduced: bool) -> None:
    """Of convolutions, depthwise and grouped too, of Gemm and MatMul; a channel of zeros has the scale 1."""
    torch.manual_seed(0)
    model = Planes()
    with torch.no_grad():
        model.conv.weight[3] = 0
    file = float_file(model)[0]
    ranges = TensorsData(CalibrationMethod.MinMax, {
        name: TensorData(lowest=np.float32(histogram.low), highest=np.float32(histogram.high))
        for name, histogram in histograms(file, images()).items()})
    quantizer = QDQQuantizer(onnx.ModelProto.FromString(file.SerializeToString()), True, reduced, QuantType.QInt8,
                             QuantType.QUInt8, ranges, [], [], ["Conv", "Gemm", "MatMul"],
                             {"WeightSymmetric": True, "QuantizeBias": False})
    quantizer.quantize_model()
    theirs = constants(quantizer.model.model)
    round_weights(file, quantizer.model.model, "7-bit" if reduced else "8-bit")
    ours = constants(quantizer.model.model)
    changed = {name for name in theirs if theirs[name].tobytes() != ours[name].tobytes()}
    assert not changed and sum(values.dtype == np.int8 and values.ndim > 1 for values in theirs.values()) == 5
    round_weights(file, quantizer.model.model, "pair")
    ours = constants(quantizer.model.model)
    assert sum(theirs[name].tobytes() != ours[name].tobytes() for name in theirs) >= 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_bias_of_small_weights_is_kept(backend: str, tmp_path: Path) -> None:
    """Runtimes hold a bias in 32 bits, in units of its channel's scale, in which it would saturate."""
    torch.manual_seed(0)
    narrow = nn.Conv2d(3, 16, 3)
    with torch.no_grad():
        narrow.weight[::2] *= 1e-10
        narrow.bias.copy_(torch.linspace(-1, 1, 16))  # type: ignore[union-attr]
    file, graph = float_file(nn.Sequential(narrow, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))
    quantized = quantize_static(Calibration(file, images()), StaticSettings())
    assert sqnr_db(exact(graph, images(8)), answers(quantized.model, images(8), tmp_path, backend)) > 35


@pytest.mark.parametrize("network", ["slim", pytest.param("mobile", marks=pytest.mark.slow)])
def test_files_are_a_quarter_and_load_without_vnni(network: str) -> None:
    """The precise mode is what the evaluator sets on CPUs without VNNI: weights become unsigned, and products stay exact.

    Without VNNI the fast kernels saturate with 8-bit weights (to 19 dB for `slim`); with the other two no kernel can.
    """
    model, _ = calibrated(network)
    quantized = quantize_static(model, StaticSettings(weights="8-bit")).model
    assert len(quantized.SerializeToString()) <= 0.27 * len(model.model.SerializeToString())
    assert sqnr_db(on_onnxruntime(quantized, literal=True), on_onnxruntime(quantized, precise=True)) > 25
    forms: tuple[WeightForm, ...] = ("pair", "7-bit")
    for form in forms:
        limited = quantize_static(model, StaticSettings(weights=form)).model
        assert abs(limited.ByteSize() - quantized.ByteSize()) < 100
        assert sum(saturating(limited)[1].values()) == 0 < sum(saturating(quantized)[1].values())
        assert torch.equal(on_onnxruntime(limited), on_onnxruntime(limited, precise=True))
