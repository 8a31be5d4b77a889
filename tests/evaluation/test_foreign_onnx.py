"""ONNX files of other tools: a fixed number of images, channels last, data in other files, operators of older networks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from architectures.onnx_data import data_files
from architectures.onnx_files import read_onnx
from compress.evaluation.file_formats import FILE_FORMATS
from compress.evaluation.submission import read_submission
from metadata.errors import VerificationError
from metadata.files import sha256
from tests.helpers.verdicts import Evaluate, assert_refused

SIDE, CLASSES = 8, 10
ONNX_RUNTIMES = FILE_FORMATS["onnx"].runtimes
Change = Callable[[onnx.TensorProto], Any]


def network(input_dims: list[Any], nodes: list[Any] | None = None) -> onnx.ModelProto:
    """A linear classifier of the images' rows and columns; `nodes` go between the input `x` and the tensor `image`."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(3 * SIDE * SIDE, CLASSES)).astype(np.float32)
    nodes = nodes if nodes is not None else [helper.make_node("Identity", ["x"], ["image"])]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Flatten", ["image"], ["row"]),
         helper.make_node("MatMul", ["row", "weight"], ["y"], name="fc")], "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [input_dims[0], CLASSES])],
        [numpy_helper.from_array(weight, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def fold(folder: Path, model: onnx.ModelProto, **metadata: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    (folder / "metadata.json").write_text(json.dumps({
        "model_format": "onnx", "input_size": [3, SIDE, SIDE], "preprocessing": {
            "resize": SIDE, "crop": SIDE, "mean": [0.5] * 3, "std": [0.5] * 3}, **metadata}))
    return folder


PLAIN = network(["N", 3, SIDE, SIDE])
NHWC_NODES = [helper.make_node("Transpose", ["x"], ["image"], perm=[0, 3, 1, 2])]
# A Reshape with the number of images in it, as exporters write it: the file cannot run with another number.
EIGHT_NODES = [helper.make_node("Constant", [], ["shape"], value_ints=[8, 3, SIDE, SIDE]),
               helper.make_node("Reshape", ["x", "shape"], ["image"])]
VARIANTS = {
    "eight images a call": (network([8, 3, SIDE, SIDE], EIGHT_NODES), 8, False),
    "one image a call": (network([1, 3, SIDE, SIDE]), 1, False),
    "channels last": (network(["N", SIDE, SIDE, 3], NHWC_NODES), None, True),
    "channels last, eight images": (network([8, SIDE, SIDE, 3], NHWC_NODES), 8, True),
}


@pytest.mark.parametrize("backend", ONNX_RUNTIMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_and_batch_answers_as_the_plain_file(variant: str, backend: str, tmp_path: Path) -> None:
    model, batch, channels_last = VARIANTS[variant]
    plain = ONNX_RUNTIMES[backend](read_submission(fold(tmp_path / "plain", PLAIN)), 1)
    runtime = ONNX_RUNTIMES[backend](read_submission(fold(tmp_path / "other", model)), 1)
    images = np.random.default_rng(1).normal(size=(11, 3, SIDE, SIDE)).astype(np.float32)
    for some in (images[:0], images[:1], images[:8], images):
        answers = runtime(some)
        assert answers.shape == (len(some), CLASSES) and np.allclose(answers, plain(some), atol=1e-4)
    assert (runtime.batch, runtime.channels_last) == (batch, channels_last)
    assert runtime.macs == plain.macs == 3 * SIDE * SIDE * CLASSES
    assert any("8 images a call" in warning for warning in runtime.warnings) == (batch == 8)


def test_a_file_of_eight_images_is_scored(few: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    folder = fold(tmp_path / "folder", PLAIN)
    expected = evaluate(folder)[1]
    code, result, error = evaluate(fold(folder, VARIANTS["channels last, eight images"][0]))
    assert code == 0, error
    for key in ("correct", "predictions_sha256"):
        assert result["details"]["accuracy"][key] == expected["details"]["accuracy"][key]
    assert any("among zeros" in warning for warning in result["details"]["warnings"])
    assert result["details"]["input_layout"] == "NHWC"


def test_a_file_of_another_size_says_so(tmp_path: Path) -> None:
    path = fold(tmp_path / "folder", network(["N", 3, 16, 16])) / "model.onnx"
    with pytest.raises(VerificationError) as caught:
        read_onnx(path, (3, SIDE, SIDE))
    assert "images of shape [3, 16, 16], the preprocessing makes [3, 8, 8]" in str(caught.value)


def test_an_input_shape_stated_channels_last_is_understood(tmp_path: Path) -> None:
    folder = fold(tmp_path / "folder", VARIANTS["channels last"][0], input_size=[SIDE, SIDE, 3])
    assert read_submission(folder).input_shape == (3, SIDE, SIDE)


def test_local_response_normalization_runs(tmp_path: Path) -> None:
    """AlexNet, CaffeNet and GoogLeNet of the public zoo have it."""
    nodes = [helper.make_node("LRN", ["x"], ["image"], size=3, alpha=1e-2, beta=0.75, bias=1.0)]
    folder = fold(tmp_path / "folder", network(["N", 3, SIDE, SIDE], nodes))
    runtime = ONNX_RUNTIMES["onnxruntime"](read_submission(folder), 1)
    images = np.random.default_rng(1).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    squares = np.pad(images**2, ((0, 0), (1, 1), (0, 0), (0, 0)))
    normal = images / (1 + 1e-2 / 3 * (squares[:, :-2] + squares[:, 1:-1] + squares[:, 2:]))**0.75
    plain = ONNX_RUNTIMES["onnxruntime"](read_submission(fold(tmp_path / "plain", PLAIN)), 1)
    assert np.allclose(runtime(images), plain(normal.astype(np.float32)), atol=1e-3)
    nodes = [helper.make_node("LRN", ["x"], ["image"], size=2**31 + 1)]
    with pytest.raises(VerificationError, match="LRN over 2147483649 channels"):
        read_onnx(fold(tmp_path / "hostile", network(["N", 3, SIDE, SIDE], nodes)) / "model.onnx", (3, SIDE, SIDE))


def test_einsum_counts_as_the_matrix_product_that_it_is(tmp_path: Path) -> None:
    model = network(["N", 3, SIDE, SIDE])
    model.graph.node[-1].CopyFrom(helper.make_node("Einsum", ["row", "weight"], ["y"], name="fc", equation="bi, io -> bo"))
    assert read_onnx(fold(tmp_path / "folder", model) / "model.onnx", (3, SIDE, SIDE)).macs == 3 * SIDE * SIDE * CLASSES


def test_numbers_in_attribute_lists_are_counted(tmp_path: Path) -> None:
    counted = [read_onnx(fold(tmp_path / str(index), model) / "model.onnx", (3, SIDE, SIDE)).parameters
               for index, model in enumerate((PLAIN, VARIANTS["eight images a call"][0]))]
    assert counted[1] == counted[0] + 4


@pytest.mark.parametrize(("ir_version", "opset"), [(99, 13), (8, 99)])
def test_a_file_of_a_later_onnx_says_so(ir_version: int, opset: int, tmp_path: Path) -> None:
    model = network(["N", 3, SIDE, SIDE])
    model.ir_version, model.opset_import[0].version = ir_version, opset
    with pytest.raises(VerificationError, match=rf"of a later ONNX \(IR {ir_version}, opset {opset}\) than onnx .* knows"):
        read_onnx(fold(tmp_path / "folder", model) / "model.onnx", (3, SIDE, SIDE))


def test_names_of_files_and_folders_as_people_have_them(few: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    place = tmp_path / "submissions"
    folder = fold(place / "team" / "final version", PLAIN, weights_file="Modèle final (1).onnx", accuracy=float("nan"))
    (folder / "model.onnx").rename(folder / "Modèle final (1).onnx")
    (folder / "metadata.json").write_bytes(b"\xef\xbb\xbf" + (folder / "metadata.json").read_bytes())  # Windows' mark
    code, _, error = evaluate(folder)
    assert code == 0, error
    assert_refused(evaluate(place), f"{folder} has one: pass that folder")


# ------------------------------------------------------------------------------------------------- external data


def with_external_data(folder: Path) -> Path:
    model = onnx.load_model(fold(folder, PLAIN) / "model.onnx")
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return folder


@pytest.mark.parametrize("backend", ONNX_RUNTIMES)
def test_external_data_in_the_folder_is_read_counted_and_hashed(backend: str, few: Path, evaluate: Evaluate, tmp_path: Path
                                                               ) -> None:
    place = tmp_path / "submissions"
    place.mkdir()
    expected = evaluate(fold(place / "plain", PLAIN), "--backend", backend)[1]
    folder = with_external_data(place / "external")
    code, result, error = evaluate(folder, "--backend", backend)
    assert code == 0, error
    assert result["details"]["accuracy"]["predictions_sha256"] == expected["details"]["accuracy"]["predictions_sha256"]
    both = [folder / "model.onnx", folder / "model.onnx.data"]
    assert both[1].stat().st_size == 3 * SIDE * SIDE * CLASSES * 4
    counted = result["details"]["bytes"]
    assert counted["weights"] == counted["model_size"] == sum(path.stat().st_size for path in both)
    assert result["details"]["sha256"]["model.onnx.data"] == sha256(both[1])
    assert result["details"]["parameters"]["all"] == expected["details"]["parameters"]["all"]


def place_of(tensor: onnx.TensorProto, **changes: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data} | changes
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


HOSTILE_DATA: dict[str, tuple[Change, str]] = {
    "another folder": (lambda first: place_of(first, location="../secret.bin"), "lies outside the submission"),
    "an absolute path": (lambda first: place_of(first, location="/etc/passwd"), "expected a file in the same folder"),
    "a link out of the folder": (lambda first: place_of(first, location="link"), "lies outside the submission"),
    "a pipe": (lambda first: place_of(first, location="pipe"), "no such plain file"),
    "a folder": (lambda first: place_of(first, location="."), "no such plain file"),
    "no file": (lambda first: place_of(first, location="nowhere"), "no such plain file"),
    "a name with a zero": (lambda first: place_of(first, location="model.onnx.data\0x"), "no file has the name"),
    "an endless name": (lambda first: place_of(first, location="x" * 5000), "no file has the name"),
    "no name": (lambda first: place_of(first, location=""), "expected a file in the same folder"),
    "behind the end": (lambda first: place_of(first, offset="4"), "ends at byte 7,684 of model.onnx.data, which has"),
    "a negative place": (lambda first: place_of(first, offset="-4"), "from byte -4"),
    "no number": (lambda first: place_of(first, length="many"), "is not what it says"),
    "too short": (lambda first: place_of(first, length="4"), "its shape [192, 10] needs 7,680"),
    "larger than any file": (lambda first: first.dims.__setitem__(0, 2**40), "needs"),
}


@pytest.mark.parametrize("attack", HOSTILE_DATA)
def test_external_data_that_are_not_there_or_elsewhere_are_refused(attack: str, tmp_path: Path) -> None:
    folder = with_external_data(tmp_path / "external")
    (tmp_path / "secret.bin").write_bytes(bytes(2**14))
    (folder / "link").symlink_to(tmp_path / "secret.bin")
    os.mkfifo(folder / "pipe")
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    change, said = HOSTILE_DATA[attack]
    change(model.graph.initializer[0])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError) as caught:
        data_files(folder / "model.onnx")
    assert said in str(caught.value)


def test_many_views_of_one_file_are_over_the_limit(tmp_path: Path) -> None:
    """2 MB on disk, 2 GB in memory."""
    folder = with_external_data(tmp_path / "external")
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(2**21)
    first = model.graph.initializer[0]
    first.dims[:] = [2**19]
    place_of(first, length=str(2**21))
    for index in range(2**10):
        view = model.graph.initializer.add()
        view.CopyFrom(first)
        view.name = f"view{index}"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError, match="over the limit of 2 GB"):
        data_files(folder / "model.onnx")


def test_a_package_lists_its_external_data(onnx_submission: Path, submission: Path, evaluate: Evaluate, tmp_path: Path
                                           ) -> None:
    place = tmp_path / "submissions"
    folder = Path(shutil.copytree(onnx_submission, place / "folder"))
    file = read_onnx(folder / "model.onnx", (3, 8, 8))
    onnx.save_model(onnx.load_model(folder / "model.onnx"), folder / "model.onnx", save_as_external_data=True,
                    location="weights.bin", size_threshold=0)
    records = {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
               for name in ("model.onnx", "weights.bin")}
    metadata = json.loads((submission / "model_metadata.json").read_text()) | {
        "model_format": "onnx", "weights_file": "model.onnx", "architecture_file": None, "parameters": file.parameters,
        "macs": file.macs, "quantization": {"scheme": "none", "layers": {}}, "files": records}
    (folder / "model_metadata.json").write_text(json.dumps(metadata))
    code, _, error = evaluate(folder)
    assert code == 0, error
    (folder / "model_metadata.json").write_text(json.dumps(metadata | {"files": {"model.onnx": records["model.onnx"]}}))
    assert_refused(evaluate(folder), "does not list it under files")
