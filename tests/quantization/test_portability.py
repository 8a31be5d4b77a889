"""Portability of int8 files: the emulation is the integers of a CPU without VNNI, and the verdicts follow from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from architectures.build import build
from architectures.describe import describe
from architectures.kernels import kernels_saturate, no_int8_kernels
from architectures.zoo import make
from compress.packaging.export import export
from compress.quantization.int8_table import sqnr_db
from compress.quantization.portability import drop_bound, verify_portability
from compress.quantization.saturation import Backend, saturating
from metadata.errors import UserError
from tests.helpers.qdq import Array, extreme, qdq, run, SIGNED, STEP, UNSIGNED, weights

PROJECT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(bool(no_int8_kernels()), reason=no_int8_kernels() or "there are int8 kernels")
def clamped(products: list[int]) -> int:
    """The sum as vpmaddubsw and 32-bit additions make it."""
    pairs = [products[start:start + 2] for start in range(0, len(products), 2)]
    return sum(min(max(sum(pair), -32768), 32767) for pair in pairs)


def convolved(levels: Array, weight: Array, zero_point: int, backend: Backend, stride: int, pad: int, dilation: int,
              groups: int) -> Array:
    """Brute force on unsigned levels: product by product, pair by pair, in the order of the kernels."""
    outputs, width, *kernel = weight.shape
    padded = np.pad(levels, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=zero_point)
    size = [(length - dilation * (k - 1) - 1) // stride + 1 for length, k in zip(padded.shape[2:], kernel, strict=True)]
    result = np.zeros((len(levels), outputs, *size))
    for n, o, i, j in np.ndindex(*result.shape):
        first = o // (outputs // groups) * width
        products = []
        for y, x in np.ndindex(*kernel):
            products += [int(padded[n, first + c, i * stride + y * dilation, j * stride + x * dilation])
                         * int(weight[o, c, y, x]) for c in range(width)]
            if backend == "openvino" and width % 2:
                products.append(0)
        result[n, o, i, j] = clamped(products) - zero_point * int(weight[o].astype(int).sum())
    return result


def same(got: Array, accumulators: Array, axis: int) -> bool:
    steps = 2.0 ** (np.arange(accumulators.shape[axis]) % 4)
    steps = steps.reshape([-1 if dim == axis % accumulators.ndim else 1 for dim in range(accumulators.ndim)])
    return bool(np.array_equal(got, accumulators * STEP * steps))


@pytest.mark.parametrize("dtype", [UNSIGNED, SIGNED], ids=["u8", "s8"])
@pytest.mark.parametrize("channels, outputs, kernel, stride, pad, dilation, groups", [
    (4, 3, (3, 3), 1, 1, 1, 1), (4, 4, (3, 2), 2, 2, 1, 2), (6, 4, (1, 1), 2, 0, 1, 1), (3, 3, (3, 3), 1, 1, 2, 1),
    (6, 4, (2, 3), 1, 1, 1, 2), (2, 4, (3, 3), 1, 1, 1, 2)])
def test_convolution_is_the_brute_force_sum_of_clamped_pairs(
        dtype: int, channels: int, outputs: int, kernel: tuple[int, int], stride: int, pad: int, dilation: int, groups: int,
) -> None:
    generator = np.random.default_rng(channels + outputs)
    weight = weights(generator, (outputs, channels // groups, *kernel))
    shift, zero_point = (128, 200) if dtype == SIGNED else (0, 200)
    levels = extreme(generator, (2, channels, 7, 6), 0, 255)
    model = qdq("Conv", weight, zero_point - shift, dtype, strides=[stride] * 2, pads=[pad] * 4, dilations=[dilation] * 2,
                group=groups)
    images = ((levels - zero_point) * STEP).astype(np.float32)
    exact = run(model, images)
    backends: tuple[Backend, ...] = ("onnxruntime", "openvino")
    for backend in backends:
        emulated, counts = saturating(model, backend)
        onnx.checker.check_model(emulated, full_check=True)
        single = backend == "openvino" and channels == groups  # a zero fills up each pair
        assert (counts["layer"] == 0) == single
        got = run(emulated, images)
        assert np.array_equal(got, exact) == single
        assert same(got, convolved(levels, weight, zero_point, backend, stride, pad, dilation, groups), 1)
    assert run(model, images).tobytes() == exact.tobytes()  # the model itself stays as it was


@pytest.mark.parametrize("op, axis, rows, attributes", [
    ("Gemm", 0, (), {"transB": 1, "alpha": 0.5}), ("Gemm", 1, (), {}), ("MatMul", 1, (), {}), ("MatMul", 1, (3,), {})])
@pytest.mark.parametrize("features", [40, 41])
def test_linear_layers_pair_their_features(op: str, axis: int, rows: tuple[int, ...], attributes: dict[str, Any],
                                           features: int) -> None:
    generator = np.random.default_rng(features)
    weight = weights(generator, (6, features))
    levels = extreme(generator, (2, *rows, features), 0, 255)
    model = qdq(op, weight if axis == 0 else np.ascontiguousarray(weight.T), 30, axis=axis,
                rank=levels.ndim, **attributes)
    emulated, counts = saturating(model)
    accumulators = np.array([[clamped([int(x) * int(w) for x, w in zip(row, own, strict=True)])
                              - 30 * int(own.astype(int).sum()) for own in weight] for row in levels.reshape(-1, features)])
    expected = accumulators.reshape(*levels.shape[:-1], 6) * attributes.get("alpha", 1)
    assert counts["layer"] > 0
    assert same(run(emulated, ((levels - 30) * STEP).astype(np.float32)), expected, -1)


def test_what_follows_the_layer_reads_the_saturated_sums_and_many_pairs_go_in_parts() -> None:
    generator = np.random.default_rng(0)
    weight, levels = weights(generator, (48, 192)), extreme(generator, (8, 192), 0, 255)
    emulated, counts = saturating(qdq("Gemm", weight, requantize=2.0**12, transB=1))
    assert counts["layer"] > 1000  # several times PAIRS_AT_ONCE
    pairs = (levels[:, None].astype(int) * weight).reshape(8, 48, 96, 2).sum(3)
    sums = pairs.clip(-32768, 32767).sum(2) * STEP * 2.0 ** (np.arange(48) % 4)
    expected = np.rint(sums / 2**12).clip(0, 255) * 2**12
    assert np.array_equal(run(emulated, (levels * STEP).astype(np.float32)), expected)
    assert len([node for node in emulated.graph.node if node.op_type == "Clip"]) > 3


def test_depthwise_kernels_and_unsigned_weights_do_not_saturate() -> None:
    large = np.full((4, 1, 3, 3), 127, np.int8)
    model = qdq("Conv", large, group=4)
    emulated, counts = saturating(model)
    assert counts == {"layer": 0}
    assert emulated == model
    unsigned = np.full((4, 8), 255, np.uint8)
    model = qdq("Gemm", unsigned, transB=1)
    next(tensor for tensor in model.graph.initializer if tensor.name == "zeros").CopyFrom(
        numpy_helper.from_array(np.zeros(4, np.uint8), "zeros"))
    assert saturating(model)[1] == {}


def test_weights_that_are_quantized_in_the_graph_are_read_too() -> None:
    generator = np.random.default_rng(0)
    model = qdq("Gemm", weights(generator, (5, 20)), transB=1)
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    steps = 2.0 ** (np.arange(5, dtype=np.float32) % 4)
    values = numpy_helper.to_array(stored).astype(np.float32) * steps[:, None]
    model.graph.initializer.remove(stored)
    quantize = helper.make_node("QuantizeLinear", ["float w", "steps", "zeros"], ["w"], axis=0)
    constant = helper.make_node("Constant", [], ["float w"], value=numpy_helper.from_array(values))
    for node in (quantize, constant):
        model.graph.node.insert(0, node)
    assert saturating(model)[1] == saturating(qdq("Gemm", weights(np.random.default_rng(0), (5, 20)), transB=1))[1]


CAPPED = """
import sys
import numpy as np
import torch
ops, one, said = torch.ops.onednn, [1, 1], {}
given = np.load(sys.argv[1])
for name in sorted({key.split("/")[0] for key in given.files}):
    levels, weight, zero_point = (torch.from_numpy(given[f"{name}/{key}"]) for key in ("levels", "weight", "zero_point"))
    scale, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.long)
    if weight.ndim == 2:
        packed = ops.qlinear_prepack(weight, list(levels.shape))
        got = ops.qlinear_pointwise(levels, 1.0, int(zero_point), packed, scale, zeros, None, 1.0, 0, torch.float32, "none",
                                    [], "")
    else:
        levels = levels.contiguous(memory_format=torch.channels_last)
        pad, groups = [weight.shape[2] // 2] * 2, levels.shape[1] // weight.shape[1]
        packed = ops.qconv_prepack(weight, scale, 1.0, int(zero_point), one, pad, one, groups, list(levels.shape))
        got = ops.qconv2d_pointwise(levels, 1.0, int(zero_point), packed, scale, zeros, None, one, pad, one, groups, 1.0, 0,
                                    torch.float32, "none", [], "")
    said[name] = got.contiguous().numpy()
np.savez(sys.argv[2], **said)
"""


@needs_kernels
def test_emulation_is_what_onednn_computes_on_a_cpu_without_vnni(tmp_path: Path) -> None:
    """The same oneDNN, capped to AVX2, whose kernels do saturate."""
    generator = np.random.default_rng(0)
    cases = {"conv": ((16, 8, 3, 3), 8, 0), "offset": ((16, 8, 3, 3), 8, 90), "pointwise": ((16, 12, 1, 1), 12, 30),
             "rgb": ((16, 3, 3, 3), 3, 0), "grouped": ((16, 4, 3, 3), 16, 0), "depthwise": ((16, 1, 3, 3), 16, 0),
             "linear": ((16, 64), 64, 0), "odd linear": ((16, 63), 63, 50)}
    given: dict[str, Array] = {}
    for name, (shape, channels, zero_point) in cases.items():
        levels = extreme(generator, (2, channels, *([6, 6] if len(shape) == 4 else [])), 0, 255).astype(np.uint8)
        given |= {f"{name}/levels": levels, f"{name}/weight": weights(generator, shape),
                  f"{name}/zero_point": np.array(zero_point)}
    np.savez(tmp_path / "given.npz", allow_pickle=False, **given)
    subprocess.run([sys.executable, "-c", CAPPED, str(tmp_path / "given.npz"), str(tmp_path / "said.npz")], check=True,
                   env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"})
    said = np.load(tmp_path / "said.npz")
    for name, (shape, channels, zero_point) in cases.items():
        attributes = ({"transB": 1} if len(shape) == 2 else
                      {"pads": [shape[2] // 2] * 4, "group": channels // shape[1]})
        model = qdq("Gemm" if len(shape) == 2 else "Conv", given[f"{name}/weight"], zero_point, **attributes)
        images = ((given[f"{name}/levels"].astype(np.float32) - zero_point) * STEP)
        emulated, counts = saturating(model, "openvino")
        assert (counts["layer"] > 0) == (name != "depthwise"), name
        assert same(run(emulated, images), said[name], 1), name
        assert same(run(model, images), said[name], 1) == (name == "depthwise"), name


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """A few batches for ONNX Runtime's own quantizer."""

    def __init__(self, images: Array) -> None:
        self.batches = iter(np.split(images, 2))

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """A float ONNX file, and images for it."""
    torch.manual_seed(0)
    model = make("slim_resnet18", num_classes=4, width=8, stem="small").eval()
    architecture = describe(model, (3, 16, 16))
    graph = build(architecture)
    graph.load_state_dict(model.state_dict())
    path = tmp_path_factory.mktemp("network") / "float.onnx"
    path.write_bytes(export(graph.eval(), architecture)[0].SerializeToString())
    return path, torch.randn(64, 3, 16, 16).numpy()


def quantized(network: tuple[Path, Array], folder: Path, reduce_range: bool = False, kind: QuantType = QuantType.QUInt8,
              form: QuantFormat = QuantFormat.QDQ) -> bytes:
    path, images = network
    quantize_static(str(path), str(folder / "int8.onnx"), Calibration(images[:8]), form, per_channel=True,
                    reduce_range=reduce_range, activation_type=kind, weight_type=QuantType.QInt8)
    return (folder / "int8.onnx").read_bytes()


@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8])
def test_files_of_onnx_runtimes_quantizer_are_emulated_and_small_inputs_answer_the_same(
        network: tuple[Path, Array], tmp_path: Path, kind: QuantType) -> None:
    content, images = quantized(network, tmp_path, kind=kind), network[1]
    model = onnx.load_model_from_string(content)
    emulated, counts = saturating(model)
    assert sorted(counts) == sorted(node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm"))
    assert sum(counts.values()) > 100
    answers = run(model, images)
    found = verify_portability(content, images, answers.argmax(1))
    assert json.loads(json.dumps(found)) == found
    assert found["accuracy"] == 1 and found["images"] == 64 and found["method"] == "emulated on 64 images"
    assert found["accuracy_saturating"] == 1 - found["changed_predictions"] / 64
    assert found["layers_that_can_saturate"] == {name: count for name, count in counts.items() if count}
    difference = np.abs(run(emulated, images) - answers).max()
    assert difference > 0
    if kind == QuantType.QUInt8:  # levels near 0 cannot saturate: what remains is float32 in place of integers
        assert np.abs(run(emulated, images * 0) - run(model, images * 0)).max() <= 0.02 * np.abs(answers).max()


def test_a_reduced_range_holds_without_a_run(network: tuple[Path, Array], tmp_path: Path) -> None:
    found = verify_portability(quantized(network, tmp_path, reduce_range=True), np.empty((0, 3, 16, 16)), [])
    assert found["holds"] and found["conclusive"] and found["layers_that_can_saturate"] == {}
    assert found["method"] == "no pair of products can exceed 16 bits"
    assert "images" not in found and found["machine"]["cpu"]


ON_OPENVINO = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from compress.evaluation.onnx_runtimes import import_openvino
model = import_openvino().Core().compile_model(sys.argv[2], "CPU", {"INFERENCE_NUM_THREADS": 1,
                                                                    "INFERENCE_PRECISION_HINT": "f32"})
np.save(sys.argv[4], next(iter(model(np.load(sys.argv[3])).values())))
"""


@needs_kernels
def test_a_whole_network_is_emulated_as_openvino_computes_it_on_a_cpu_without_vnni(network: tuple[Path, Array],
                                                                                   tmp_path: Path) -> None:
    """OpenVINO's roundings between the layers are its own: in both arithmetics they leave the same distance.

    A CPU without VNNI shows the one arithmetic alone.
    """
    content, images = quantized(network, tmp_path), network[1]
    np.save(tmp_path / "images.npy", images)
    model = onnx.load_model_from_string(content)
    answers = {"": run(model, images), "AVX2": run(saturating(model, "openvino")[0], images)}
    distance: dict[tuple[str, str], float] = {}
    shown = ("AVX2",) if kernels_saturate() else ("", "AVX2")
    for capped in shown:
        subprocess.run([sys.executable, "-c", ON_OPENVINO, str(PROJECT), *(str(tmp_path / name) for name in (
            "int8.onnx", "images.npy", "logits.npy"))], check=True,
            env=os.environ | ({"ONEDNN_MAX_CPU_ISA": capped} if capped else {}))
        logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
        distance |= {(capped, other): sqnr_db(torch.from_numpy(answers[other]), logits) for other in answers}
    assert min(distance[own, own] for own in shown) > max(
        distance[own, other] for own in shown for other in answers if other != own) + 5, distance


def planted(count: int, hurt: int) -> tuple[bytes, Array, Array]:
    """Class 0 wins by two large products, which saturate where both inputs are large: so in `hurt` images of `count`."""
    weight = np.array([[127, 127, 0, 0, 0, 0], [0, 0, 127, 0, 127, 0]], np.int8)
    model = qdq("Gemm", weight, transB=1)
    next(tensor for tensor in model.graph.initializer if tensor.name == "steps").CopyFrom(
        numpy_helper.from_array(np.ones(2, np.float32), "steps"))
    levels = np.tile([255, 255, 255, 0, 9, 0], (count, 1))  # 64770 against 33528, and 32767 where the first saturates
    levels[hurt:] = 100, 100, 0, 0, 0, 0
    return model.SerializeToString(), (levels * STEP).astype(np.float32), np.zeros(count, np.int64)


def test_a_file_that_saturation_breaks_does_not_hold() -> None:
    content, images, labels = planted(50, 50)
    found = verify_portability(content, images, labels)
    assert not found["holds"] and found["conclusive"] and found["verdict"].startswith("does not hold: loses 100.00% on 50")
    assert (found["accuracy"], found["accuracy_saturating"], found["changed_predictions"]) == (1, 0, 50)
    assert found["layers_that_can_saturate"] == {"layer": 1}
    gained = verify_portability(content, torch.from_numpy(images), torch.ones(50), threads=2, batch=7)
    assert gained["holds"] and gained["verdict"].startswith("holds: gains 100.00% on 50 images")


@pytest.mark.parametrize("count, hurt, tolerated, holds, conclusive", [
    (2000, 0, 0.003, True, True), (500, 0, 0.003, False, False), (500, 0, 0.01, True, True),
    (2000, 2, 0.003, False, False), (4000, 2, 0.003, True, True), (500, 8, 0.003, False, True)])
def test_a_sample_that_is_too_small_to_tell_does_not_count_as_holding(count: int, hurt: int, tolerated: float, holds: bool,
                                                                      conclusive: bool) -> None:
    content, images, labels = planted(count, hurt)
    found = verify_portability(content, images, labels, tolerated, batch=500)
    assert (found["holds"], found["conclusive"]) == (holds, conclusive), found["verdict"]
    assert found["changed_predictions"] == hurt
    assert ("images would tell" in found["verdict"]) == (not conclusive)


def test_the_bound_is_that_of_the_score_interval() -> None:
    assert drop_bound(0, 0, 1000) == pytest.approx(1.6449**2 / (1000 + 1.6449**2))  # the interval's closed form there
    assert drop_bound(20, 20, 5000) == pytest.approx(1.6449 * 40**0.5 / 5000, rel=0.05)  # its limit for many changes
    assert drop_bound(5, 1, 1000) > drop_bound(4, 1, 1000) > 0.003 > drop_bound(1, 4, 1000)
    assert drop_bound(7, 2, 1000, -1) < 0.005 < drop_bound(7, 2, 1000)
    assert drop_bound(7, 2, 1000, -1) == -drop_bound(2, 7, 1000)


def test_mistakes_are_told_in_one_line(network: tuple[Path, Array], tmp_path: Path) -> None:
    content, images, labels = planted(4, 4)
    with pytest.raises(UserError, match="expected images with one label each, got 4 images"):
        verify_portability(content, images, labels[:3])
    with pytest.raises(UserError, match="not an ONNX file"):
        verify_portability(b"no file", images, labels)
    with pytest.raises(UserError, match="QDQ form, got one with QLinearConv"):
        verify_portability(quantized(network, tmp_path, form=QuantFormat.QOperator), images, labels)
    weight = weights(np.random.default_rng(0), (4, 4, 3, 3))
    with pytest.raises(UserError, match="layer layer has transA or auto_pad set"):
        saturating(qdq("Conv", weight, auto_pad="SAME_UPPER"))
