"""Which products ONNX Runtime adds in 16 bits on a CPU without VNNI: this CPU is asked, or an emulated one."""

from __future__ import annotations

import itertools
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.quantization.calibration import watched
from compress.quantization.saturation import saturating
from compress.quantization.static import layers_of, quantize_static, StaticSettings
from compress.quantization.weights import quantize_weight
from metadata.machine import machine
from tests.helpers.qdq import Array, extreme, qdq, run, SIGNED, UNSIGNED, weights
from tests.helpers.static_int8 import calibrated, images

FLAGS = set(machine()["flags"])
natively = pytest.mark.skipif(
    "avx2" not in FLAGS or any(flag.startswith("avx512") for flag in FLAGS) or "avx_vnni" in FLAGS,
    reason="only an x86 CPU with AVX2, without AVX512 and VNNI, shows the sums in 16 bits of AVX2")
CONVOLUTIONS = [(channels, kernel, groups, 1) for channels in range(1, 10) for kernel in (1, 3) for groups in (1, 2, 4)
                if channels * kernel > 1] + [(1, 3, 8, 2), (1, 3, 4, 4), (1, 3, 16, 2), (16, 3, 2, 1), (5, 3, 16, 1)]
COARSE = 2.0**11  # large enough that no sum of two products leaves 8 bits


def two_at_a_time(places: int, outputs: int = 0) -> Array:
    """Return rows (outputs, places) of zeros, in each of which another two places hold 127."""
    pairs = list(itertools.combinations(range(places), 2))
    pairs = [pairs[index % len(pairs)] for index in range(max(outputs, len(pairs)))]
    rows = np.zeros((len(pairs), places), np.int8)
    rows[np.arange(len(pairs))[:, None], np.array(pairs)] = 127
    return rows


def wrong(got: Array, exact: Array) -> Array:
    """Return which output channels differ."""
    return (got != exact).swapaxes(0, 1).reshape(exact.shape[1], -1).any(1)


@natively
@pytest.mark.parametrize(("channels", "kernel", "groups", "multiplier"), CONVOLUTIONS)
def test_convolutions_add_the_pairs_that_are_counted(channels: int, kernel: int, groups: int, multiplier: int) -> None:
    """Ordinary, grouped, of one channel a group with several outputs: the emulation saturates where the CPU does."""
    places, outputs = channels * kernel * kernel, groups * multiplier
    rows = two_at_a_time(places, outputs if multiplier > 1 else 0)
    rows = np.concatenate([rows] * groups) if multiplier == 1 else rows[:len(rows) // outputs * outputs]
    for part in np.split(rows, len(rows) // outputs) if multiplier > 1 else [rows]:
        weight = part.reshape(-1, channels, kernel, kernel)
        model = qdq("Conv", weight, requantize=COARSE, group=groups, pads=[kernel // 2] * 4)
        levels = np.full((1, channels * groups, 6, 6), 127.5, np.float32)
        native, exact, emulated = run(model, levels, precise=False), run(model, levels), run(saturating(model)[0], levels)
        assert np.array_equal(native, emulated)
        assert saturating(model)[1]["layer"] == wrong(native, exact).sum() > 0


@natively
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize("features", [2, 3, 4, 7, 8, 16, 33])
def test_linear_layers_add_the_pairs_that_are_counted(op: str, features: int) -> None:
    weight = two_at_a_time(features)
    model = qdq(op, weight, requantize=COARSE, transB=1) if op == "Gemm" else qdq(
        op, np.ascontiguousarray(weight.T), requantize=COARSE, axis=1)
    levels = np.full((3, features), 127.5, np.float32)
    native, exact, emulated = run(model, levels, precise=False), run(model, levels), run(saturating(model)[0], levels)
    assert np.array_equal(native, emulated)
    assert saturating(model)[1]["layer"] == wrong(native, exact).sum() > 0


@natively
@pytest.mark.parametrize("dtype", [UNSIGNED, SIGNED], ids=["u8", "s8"])
@pytest.mark.parametrize(("outputs", "channels", "kernel", "groups"), [
    (16, 8, 3, 1), (16, 3, 3, 1), (16, 4, 1, 1), (64, 64, 3, 1), (16, 16, 3, 2), (8, 16, 3, 8), (32, 16, 3, 16),
    (7, 5, 3, 1), (16, 1, 3, 1)])
def test_a_layer_of_random_weights_is_emulated_bit_for_bit(outputs: int, channels: int, kernel: int, groups: int,
                                                           dtype: int) -> None:
    generator = np.random.default_rng(outputs + channels)
    shift = 128 if dtype == SIGNED else 0
    model = qdq("Conv", weights(generator, (outputs, channels // groups, kernel, kernel)), 100 - shift, dtype,
                requantize=2.0**12, group=groups, pads=[kernel // 2] * 4, strides=[2, 2])
    levels = ((extreme(generator, (2, channels, 9, 9), 0, 255) - 100) / 2).astype(np.float32)
    native, exact = run(model, levels, precise=False), run(model, levels)
    assert np.array_equal(native, run(saturating(model)[0], levels)) and not np.array_equal(native, exact)


@natively
def test_a_depthwise_layer_is_exact() -> None:
    generator = np.random.default_rng(0)
    model = qdq("Conv", np.full((16, 1, 3, 3), 127, np.int8), requantize=2.0**12, group=16, pads=[1] * 4)
    levels = (extreme(generator, (2, 16, 9, 9), 0, 255) / 2).astype(np.float32)
    assert np.array_equal(run(model, levels, precise=False), run(model, levels))


@pytest.mark.parametrize(("outputs", "channels", "kernel", "groups"), [
    (16, 8, 3, 1), (16, 3, 3, 1), (16, 6, 1, 1), (16, 16, 3, 2), (8, 16, 3, 8), (32, 16, 3, 16), (16, 1, 3, 1),
    (16, 16, 3, 16)])
def test_pair_limited_layers_are_exact_on_every_cpu(outputs: int, channels: int, kernel: int, groups: int) -> None:
    """Of any groups, with weights that are as large as the limit allows and activations that are as large as they get."""
    generator = torch.Generator().manual_seed(outputs + channels)
    drawn = torch.rand(outputs, channels // groups, kernel, kernel, generator=generator)
    drawn = drawn.gt(0.2) * (0.95 + 0.1 * drawn) * torch.rand(drawn.shape, generator=generator).sub(0.3).sign()
    weight = quantize_weight(drawn, "pair", depthwise=outputs == channels == groups)[0].numpy()
    model = qdq("Conv", weight, requantize=2.0**11, group=groups, pads=[kernel // 2] * 4)
    assert saturating(model)[1]["layer"] == 0
    for levels in (np.full((1, channels, 7, 7), 127.5), extreme(np.random.default_rng(0), (1, channels, 7, 7), 0, 255) / 2):
        exact = run(model, levels.astype(np.float32))
        assert exact.any() and np.array_equal(run(model, levels.astype(np.float32), precise=False), exact)


@pytest.mark.slow
@natively
def test_the_layers_of_a_network_are_emulated_to_two_steps() -> None:
    """ONNX Runtime rounds a layer and its requantization at once, the emulation first in float32."""
    calibration, _ = calibrated("slim")
    batch = 4 * images(4, seed=3)  # large, so that many sums saturate
    for name in [node.name for node in layers_of(calibration.model)]:
        alone = quantize_static(calibration, StaticSettings(weights="8-bit"), only=[name]).model
        node = next(node for node in alone.graph.node if node.name == name)
        rounding = next(other for other in alone.graph.node if other.op_type == "QuantizeLinear"
                        and other.input[0] == node.output[0])
        emulated, exact = (run(watched(model, [rounding.output[0]]), batch).astype(int)
                           for model in (saturating(alone)[0], alone))
        native = run(watched(alone, [rounding.output[0]]), batch, precise=False).astype(int)
        off, saturated = (np.abs(native - other) for other in (emulated, exact))
        assert off.max() <= 2 and (off > 0).mean() < 0.005 and saturated.max() > 10 and (saturated > 0).mean() > 0.05, name


EMULATED = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(None, {"input": np.load(sys.argv[2])})[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="no emulator of x86 CPUs (qemu-x86_64) is installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator runs this machine's Python, which is not for x86")
@pytest.mark.parametrize("network", ["slim", "mobile"])
def test_emulated_cpus_answer_alike_from_limited_weights(network: str, tmp_path: Path) -> None:
    """Haswell has AVX2 without VNNI, and saturates. Nehalem has SSE4.2, with which ONNX Runtime does not saturate.

    On Nehalem ONNX Runtime's sums and pools of activations round otherwise, by up to two steps of the logits.
    """
    calibration, _ = calibrated(network)
    batch = images(4, seed=3)
    np.save(tmp_path / "images.npy", batch)
    answers: dict[tuple[str, str], Any] = {}
    for form in ("pair", "8-bit"):
        model = quantize_static(calibration, StaticSettings(weights=form)).model  # type: ignore[arg-type]
        onnx.save(model, tmp_path / "model.onnx")
        answers[form, "exact"] = run(model, batch)
        for cpu in ("Haswell", "Nehalem"):
            subprocess.run(["qemu-x86_64", "-cpu", cpu, sys.executable, "-c", EMULATED, *(
                str(tmp_path / name) for name in ("model.onnx", "images.npy", "logits.npy"))], check=True)
            answers[form, cpu] = np.load(tmp_path / "logits.npy")
    assert np.array_equal(answers["pair", "Haswell"], answers["pair", "exact"])
    assert not np.array_equal(answers["8-bit", "Haswell"], answers["8-bit", "exact"])
    values = np.unique(answers["pair", "exact"])  # logits are on a grid
    assert np.abs(answers["pair", "Nehalem"] - answers["pair", "exact"]).max() < 2.1 * np.diff(values).min()
