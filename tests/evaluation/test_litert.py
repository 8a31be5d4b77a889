"""`.tflite` files of other people: MLPerf Tiny's reference networks, scored by the runtime's own integers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.mlperf_tiny import scored
from compress.evaluation.litert_files import read_litert
from compress.evaluation.runtimes import open_file
from compress.evaluation.submission import read_submission
from metadata.errors import VerificationError
from metadata.schemas import Preprocessing
from tests.helpers.commands import PROJECT
from tests.helpers.verdicts import Evaluate

pytest.importorskip("ai_edge_litert")
NETWORKS = PROJECT.parent / "shared" / "data" / "mlperf_tiny"
SHAPE = (3, 32, 32)
pytestmark = pytest.mark.skipif(not NETWORKS.is_dir(), reason="MLPerf Tiny's networks are not in ../shared/data")
COUNTED = {"pretrainedResnet.tflite": (77_708, 12_501_632), "pretrainedResnet_quant.tflite": (77_708, 12_501_632),
           "pretrainedResnet_large_float.tflite": (480_332, 76_473_920),
           "pretrainedResnet_large_int8.tflite": (480_332, 76_473_920)}


@pytest.mark.parametrize("name", COUNTED)
def test_reference_networks_answer_as_the_runtime_itself(name: str) -> None:
    from ai_edge_litert.interpreter import Interpreter
    runtime = open_file(NETWORKS / name, SHAPE, Preprocessing())
    assert (runtime.parameters["all"], runtime.macs) == COUNTED[name]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3))
    plain = Interpreter(model_path=str(NETWORKS / name), num_threads=1)
    plain.allocate_tensors()
    taken, given = plain.get_input_details()[0], plain.get_output_details()[0]
    answers = runtime(pixels.transpose(0, 3, 1, 2).astype(np.float32))
    for image, answer in zip(pixels, answers, strict=True):
        whole = taken["dtype"] is np.int8
        plain.set_tensor(taken["index"], (image[None] - 128 * whole).astype(taken["dtype"]))
        plain.invoke()
        expected = plain.get_tensor(given["index"])[0]
        assert np.array_equal(answer, (expected.astype(np.float32) + 128) / 256 if whole else expected)


@pytest.mark.parametrize("length", [0, 7, 8, 100, 5_000, 98_000])
def test_a_file_that_is_cut_short_says_so(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes((NETWORKS / "pretrainedResnet_quant.tflite").read_bytes()[:length])
    with pytest.raises(VerificationError, match=r"empty|does not bear the mark 'TFL3'|damaged or cut short"):
        read_litert(path, SHAPE)


def test_a_folder_with_loose_metadata_is_scored(few: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    folder = tmp_path / "place" / "resnet8"
    folder.mkdir(parents=True)
    shutil.copy(NETWORKS / "pretrainedResnet_quant.tflite", folder / "model.tflite")
    (folder / "metadata.json").write_text(json.dumps({
        "model_format": "TensorFlow Lite", "input_shape": [32, 32, 3],
        "preprocessing": {"resize": 32, "mean": [0.0] * 3, "std": [1 / 255] * 3}}))
    files = read_submission(folder)
    assert (files.kind, files.input_shape) == ("litert", SHAPE)
    code, result, error = evaluate(folder)
    assert code == 0, error
    details = result["details"]
    assert (details["kind"], details["backend"], details["input_layout"]) == ("litert", "litert", "NHWC")
    assert details["input_and_output"] == "int8 and int8" and "ai_edge_litert" in details["versions"]
    assert details["macs"] == 12_501_632 and details["bytes"]["weights"] == 98_496


def test_the_runtime_reports_to_nobody() -> None:
    script = """
import sys
calls = []
sys.addaudithook(lambda event, args: calls.append(event) if event.startswith(("socket.", "urllib.", "http.")) else None)
from ai_edge_litert.interpreter import Interpreter
network = Interpreter(sys.argv[1])
network.allocate_tensors()
network.invoke()
assert not calls, calls
print("quiet")
"""
    done = subprocess.run([sys.executable, "-c", script, NETWORKS / "pretrainedResnet_quant.tflite"], capture_output=True,
                          text=True, check=False)
    assert done.stdout.strip() == "quiet", done.stderr


@pytest.mark.slow
def test_the_int8_networks_have_as_many_images_right_as_ever(tmp_path: Path) -> None:
    packed = NETWORKS.parent / "cifar10.tar.xz"
    if not packed.is_file():
        pytest.skip("needs CIFAR-10 in ../shared/data")
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path, [member for member in tar if member.name.startswith("cifar10/test/")], filter="data")
    for name, correct in (("pretrainedResnet_quant.tflite", 8_697), ("pretrainedResnet_large_int8.tflite", 9_131)):
        row = scored(NETWORKS / name, tmp_path / "cifar10" / "test")
        assert (row["correct"], row["images"]) == (correct, 10_000), name
