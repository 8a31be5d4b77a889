"""ONNX submissions: the same answers as PyTorch on both runtimes, and files that must be refused before they run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import model_loader
from architectures.counting import count_macs
from architectures.onnx_files import read_onnx
from compress.evaluation.onnx_runtimes import OnnxRuntime, OpenvinoRuntime
from compress.evaluation.submission import read_submission
from compress.pipeline.stage import TorchModel
from loaders.images import read_images
from loaders.listing import list_images
from metadata.errors import UserError, VerificationError
from metadata.files import sha256
from tests.helpers.commands import PROJECT
from tests.helpers.verdicts import Evaluate, assert_refused

META = "model_metadata.json"
Change = Callable[[onnx.ModelProto, Path], Any]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_both_runtimes_score_what_pytorch_scores(backend: str, onnx_submission: Path, evaluate: Evaluate, few: Path,
                                                 small_run: Path) -> None:
    code, result, error = evaluate(onnx_submission, "--backend", backend)
    assert code == 0, error
    details = result["details"]
    assert details["kind"] == "onnx" and details["backend"] == backend and backend in details["versions"]
    student = TorchModel.load(small_run / "04-finetune")
    assert details["macs"] == count_macs(student.module, student.architecture.input_shape)
    files = read_submission(onnx_submission)
    paths = [path for path, _ in list_images(few).images]
    pixels = read_images(paths, files.preprocessing)
    import torch
    with torch.no_grad():
        expected = student.module.eval()(torch.from_numpy(pixels)).numpy()
    runtime = (OnnxRuntime if backend == "onnxruntime" else OpenvinoRuntime)(files, 1)
    assert np.allclose(runtime(pixels), expected, atol=1e-3)
    labels = np.array([label for _, label in list_images(few).images])
    assert details["accuracy"]["correct"] == int((expected.argmax(1) == labels).sum())


@pytest.mark.parametrize("nncf", [False, pytest.param(True, marks=pytest.mark.skipif(
    importlib.util.find_spec("nncf") is None, reason="NNCF is a peer of the benchmark, not a part of the product"))])
def test_openvino_reports_to_nobody(nncf: bool) -> None:
    """Its import posts to an analytics server unless that is prevented: no connection and no name may be asked for."""
    script = """
import sys
calls = []
sys.addaudithook(lambda event, args: calls.append(event) if event.startswith(("socket.", "urllib.", "http.")) else None)
from compress.evaluation.onnx_runtimes import import_openvino
openvino = import_openvino()
import time
openvino.Core().available_devices
time.sleep(1)
if sys.argv[1] == "True":
    import nncf
    assert not isinstance(nncf.telemetry.telemetry, nncf.telemetry.wrapper.NNCFTelemetry), nncf.telemetry.telemetry
    time.sleep(1)
from openvino.tools.ovc import telemetry_utils
assert telemetry_utils.tm.__name__.endswith("telemetry_stub"), telemetry_utils.tm
assert not calls, calls
print("quiet")
"""
    done = subprocess.run([sys.executable, "-c", script, str(nncf)], cwd=PROJECT, capture_output=True, text=True,
                          check=False)
    assert done.stdout.strip() == "quiet", done.stderr


def test_batches_shuffle_and_agree_with_single_images(onnx_submission: Path, evaluate: Evaluate) -> None:
    _, one, _ = evaluate(onnx_submission)
    code, many, error = evaluate(onnx_submission, "--batch_size", "16")
    assert code == 0, error
    assert many["details"]["accuracy"]["predictions_sha256"] == one["details"]["accuracy"]["predictions_sha256"]
    assert many["details"]["accuracy"]["batch_size"] == 16 and many["details"]["latency"]["batch_size"] == 1
    assert any("batch 16" in warning for warning in many["details"]["warnings"])


def test_torch_cannot_run_onnx(onnx_submission: Path, evaluate: Evaluate) -> None:
    assert_refused(evaluate(onnx_submission, "--backend", "torch"), "runs on onnxruntime or openvino", code=2)


def test_load_model_serves_onnx_packages(onnx_package: Path, onnx_submission: Path, small_run: Path,
                                         tmp_path: Path) -> None:
    import torch
    student = TorchModel.load(small_run / "04-finetune").module.eval()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    script = ("import sys, torch; sys.path.insert(0, sys.argv[1]); import model_loader\n"
              "logits = model_loader.load_model(sys.argv[1])(torch.load(sys.argv[2], weights_only=True))\n"
              "torch.save(logits, sys.argv[3])")  # the bundled file of the package itself
    torch.save(images, tmp_path / "images.pth")
    subprocess.run([sys.executable, "-I", "-B", "-c", script, onnx_package, tmp_path / "images.pth",
                    tmp_path / "logits.pth"], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = student(images)
    answers = [torch.load(tmp_path / "logits.pth", weights_only=True)]
    for path in (onnx_package, next(onnx_package.glob("*.onnx")), onnx_submission):
        model = model_loader.load_model(path)
        assert isinstance(model, torch.nn.Module) and not model.training
        answers += [model(images), model(images.to(memory_format=torch.channels_last)),
                    torch.cat([model(one[None]) for one in images])]
    for logits in answers:
        assert logits.dtype == torch.float32 and torch.allclose(logits, expected, atol=1e-3)


def test_load_model_verifies_onnx_packages(onnx_package: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_package, tmp_path / "package"))
    weights = next(folder.glob("*.onnx"))
    (folder / "other.onnx").write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match=f"has the weights {weights.name}"):
        model_loader.load_model(folder / "other.onnx")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    for path in (folder, weights):
        with pytest.raises(VerificationError, match="its bytes are not those"):
            model_loader.load_model(path)
    weights.rename(tmp_path / "alone.onnx")
    with pytest.raises(UserError, match=META):
        model_loader.load_model(tmp_path / "alone.onnx")


def add_node(op: str, **options: Any) -> Change:
    """Puts an operator between the logits and the output."""
    def change(model: onnx.ModelProto, folder: Path) -> None:
        output = model.graph.output[0].name
        last = next(node for node in model.graph.node if output in node.output)
        last.output[:] = ["before"]
        model.graph.node.append(helper.make_node(op, ["before"], [output], name="extra", **options))
    return change


def a_loop(model: onnx.ModelProto, folder: Path) -> None:
    count, go_on, still = (helper.make_tensor_value_info(name, kind, []) for name, kind in (
        ("i", TensorProto.INT64), ("c", TensorProto.BOOL), ("d", TensorProto.BOOL)))
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "body", [count, go_on], [still])
    model.graph.node.insert(0, helper.make_node("Loop", ["", ""], [], name="for_ever", body=body))


def second_output(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.output.append(helper.make_tensor_value_info(model.graph.node[0].output[0], TensorProto.FLOAT, None))


def second_input(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.input.append(helper.make_tensor_value_info("key", TensorProto.FLOAT, [1]))


def poison(value: float) -> Change:
    def change(model: onnx.ModelProto, folder: Path) -> None:
        tensor = model.graph.initializer[0]
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.flat[0] = value
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return change


def vast(model: onnx.ModelProto, folder: Path) -> None:
    """A constant of 10^13 numbers that a runtime would compute before the first image."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([10**13], np.int64), "much"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["much"], ["zeros"], name="vast"))
    model.graph.node.insert(1, helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0))
    add_node("Identity")(model, folder)
    model.graph.node[-1].CopyFrom(helper.make_node("Add", ["before", "zero"], list(model.graph.node[-1].output)))


def short_tensor(model: onnx.ModelProto, folder: Path) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.raw_data)
    tensor.raw_data = tensor.raw_data[:-4]


def words(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.node.insert(0, helper.make_node("Constant", [], ["many"], value_strings=["secret"] * 1000))


def whole_numbers(model: onnx.ModelProto, folder: Path) -> None:
    add_node("Cast", to=TensorProto.INT64)(model, folder)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64


def grey(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1


def five_classes(model: onnx.ModelProto, folder: Path) -> None:
    add_node("Slice")(model, folder)
    for name, value in (("s", 0), ("e", 5), ("a", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    model.graph.node[-1].input.extend(["s", "e", "a"])
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5


HOSTILE: dict[str, tuple[Change, str]] = {
    "unknown operator": (add_node("Frobnicate"), "is not one of those"),
    "unknown domain": (add_node("Identity", domain="evil.ops"), "is not one of those"),
    "several outputs": (second_output, "got 1 and 2"),
    "several inputs": (second_input, "got 2 and 1"),
    "endless loop": (a_loop, "is not one of those"),
    "random answers": (add_node("RandomNormalLike"), "is not one of those"),
    "NaN": (poison(float("nan")), "NaN"),
    "infinite": (poison(float("inf")), "infinite"),
    "a vast constant": (vast, "over the limit"),
    "a tensor cut short": (short_tensor, "is not what it says"),
    "grey images": (grey, "the input takes images of shape [1, 8, 8]"),
    "five classes": (five_classes, "for 10 classes"),
    "dangling input": (lambda m, f: m.graph.node[3].input.__setitem__(0, "nowhere"), "not a valid ONNX graph"),
    "an operator that crashes a runtime": (add_node("Inverse", domain="com.microsoft"), "is not one of those"),
    "an operator without inputs": (lambda m, f: m.graph.node.add(op_type="Add", output=["nothing"]), "is not one of those"),
    "words": (words, "expected a Constant of numbers, got 'value_strings'"),
    "no logits": (whole_numbers, "must be float logits"),
    "a pipe for metadata": (lambda m, f: ((f / META).unlink(), os.mkfifo(f / META)), "not a plain file"),
    "local function": (lambda m, f: m.functions.add(name="f", domain="d"), "local functions"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_onnx_files_are_refused(attack: str, onnx_submission: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    change, said = HOSTILE[attack]
    folder = Path(shutil.copytree(onnx_submission, tmp_path / "folder"))
    model = onnx.load_model(str(folder / "model.onnx"))
    change(model, folder)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert_refused(evaluate(folder), said)


@pytest.mark.parametrize(("content", "said"), [
    (b"", "the file is empty"), (b"\x00nonsense" * 9, "not an ONNX file"), (None, "2 GB")],
    ids=["empty", "nonsense", "huge"])
def test_files_that_are_no_onnx(content: bytes | None, said: str, onnx_submission: Path, evaluate: Evaluate,
                                tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_submission, tmp_path / "folder"))
    if content is None:
        with (folder / "model.onnx").open("r+b") as file:
            file.truncate(2**31)  # a sparse file: it takes no room
    else:
        (folder / "model.onnx").write_bytes(content)
    assert_refused(evaluate(folder), said)


def test_packaged_metadata_holds_an_onnx_file_to_its_claims(onnx_submission: Path, submission: Path, evaluate: Evaluate,
                                                            tmp_path: Path) -> None:
    """Our own metadata with model_format onnx: hashes and counts are checked as for a graph."""
    folder = Path(shutil.copytree(onnx_submission, tmp_path / "folder"))
    file = read_onnx(folder / "model.onnx", (3, 8, 8))
    metadata = json.loads((submission / "model_metadata.json").read_text())
    metadata |= {"model_format": "onnx", "weights_file": "model.onnx", "architecture_file": None,
                 "parameters": file.parameters, "macs": file.macs, "quantization": {"scheme": "none", "layers": {}},
                 "files": {"model.onnx": {"sha256": sha256(folder / "model.onnx"),
                                          "bytes": (folder / "model.onnx").stat().st_size}}}
    (folder / "model_metadata.json").write_text(json.dumps(metadata))
    code, result, error = evaluate(folder)
    assert code == 0, error
    assert result["details"]["preprocessing"]["stated_by"] == "model_metadata.json"
    assert result["accuracy"] == evaluate(onnx_submission)[1]["accuracy"]
    (folder / "model_metadata.json").write_text(json.dumps(metadata | {"parameters": 1}))
    assert_refused(evaluate(folder), "states 1 parameters")
