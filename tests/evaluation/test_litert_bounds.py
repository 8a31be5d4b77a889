"""`.tflite` files that must be refused before they run, each in one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.evaluation.litert_files import read_litert
from compress.evaluation.runtimes import open_file
from compress.packaging.litert.model import Grid, ModelBuilder
from metadata.errors import UserError, VerificationError
from metadata.schemas import Preprocessing
from tests.helpers.verdicts import Evaluate, assert_refused

pytest.importorskip("ai_edge_litert")
SHAPE = (3, 8, 8)
Change = Callable[[ModelBuilder], Any]


def classifier(change: Change = lambda file: None, inputs: tuple[int, ...] = (1, 8, 8, 3)) -> bytes:
    """A linear classifier of the images' means, in a file that `change` has spoilt."""
    file = ModelBuilder()
    schema, generator = file.schema, np.random.default_rng(0)
    image = file.tensor("images", inputs)
    axes = file.constant(np.array([1, 2], np.int32))
    means, logits = file.tensor("means", (1, 3)), file.tensor("logits", (1, 10))
    weight, bias = file.constant(generator.normal(size=(10, 3)).astype(np.float32)), file.constant(np.zeros(10, np.float32))
    file.operator("MEAN", [image, axes], means, schema.ReducerOptionsT(keepDims=False))
    file.operator("FULLY_CONNECTED", [means, weight, bias], logits, schema.FullyConnectedOptionsT())
    change(file)
    return file.pack(image, logits)


def poison(value: float) -> Change:
    def change(file: ModelBuilder) -> None:
        floats = next(buffer for buffer in file.buffers if buffer.data is not None and len(buffer.data) == 120)
        floats.data = floats.data.copy()
        floats.data.view(np.float32)[0] = value
    return change


def another_code(name: str, custom: str | None = None) -> Change:
    """Names the first operator otherwise."""
    def change(file: ModelBuilder) -> None:
        file.codes = {(name, 1): 0, ("FULLY_CONNECTED", 1): 1}
        if custom:
            plain = file.schema.OperatorCodeT
            file.schema = type("Schema", (), {**vars(file.schema), "OperatorCodeT": lambda **given: plain(
                **given, customCode=custom if given["builtinCode"] == 32 else None)})
    return change


def tensor(index: int, **values: Any) -> Change:
    return lambda file: [setattr(file.tensors[index], name, value) for name, value in values.items()]


def cut(file: ModelBuilder) -> None:
    """A tensor whose bytes are fewer than its shape says."""
    file.buffers[2].data = file.buffers[2].data[:-4]


HOSTILE: dict[str, tuple[Change, str]] = {
    "a Flex operator": (another_code("CUSTOM", "FlexErf"), "the custom operator 'FlexErf' is not one of those"),
    "a custom operator": (another_code("CUSTOM", "Nobody"), "the custom operator 'Nobody' is not one of those"),
    "a loop": (another_code("WHILE"), "operator 119 of the schema is not one of those"),
    "random numbers": (another_code("RANDOM_UNIFORM"), "operator 148 of the schema is not one of those"),
    "NaN": (poison(float("nan")), "holds NaN or infinite values"),
    "infinite": (poison(float("inf")), "holds NaN or infinite values"),
    "a vast tensor": (tensor(2, shape=np.array([1 << 20, 1 << 20], np.int32)), "over the limits"),
    "a negative size": (tensor(2, shape=np.array([1, -3], np.int32)), "has the shape [1, -3]"),
    "twenty axes": (tensor(2, shape=np.ones(20, np.int32)), "has the shape [1, 1, 1"),
    "a tensor cut short": (cut, "its shape [10, 3] of float32 needs 120"),
    "a state": (tensor(2, isVariable=True), "keeps a state between calls"),
    "texts": (tensor(2, type=5), "is of the type 5"),
    "whole numbers without a scale": (tensor(0, type=9), "is int8 and states no scale"),
    "no images": (tensor(0, shape=np.array([1, 192], np.int32)), "got float32 with 2 dimensions"),
    "grey images": (tensor(0, shape=np.array([1, 8, 8, 1], np.int32)), "the input takes images of shape [8, 8, 1]"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_files_are_refused_in_one_line(attack: str, tmp_path: Path) -> None:
    change, said = HOSTILE[attack]
    path = tmp_path / "model.tflite"
    path.write_bytes(classifier(change))
    with pytest.raises(VerificationError) as caught:
        read_litert(path, SHAPE)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    path, content = tmp_path / "model.tflite", classifier()
    inputs = struct.pack("<3I", 2, 0, 1)  # the list of the first operator's inputs
    assert content.count(inputs) == 1
    path.write_bytes(content.replace(inputs, struct.pack("<3I", 2, 0, 999)))
    with pytest.raises(VerificationError, match="operator 0 names a tensor or an operator that is not there"):
        read_litert(path, SHAPE)


def test_every_cut_and_many_flipped_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    content, path = classifier(), tmp_path / "model.tflite"
    generator = np.random.default_rng(0)
    spoilt = [content[:length] for length in range(0, len(content), 61)]
    for _ in range(300):
        flipped = bytearray(content)
        for place in generator.integers(0, len(content), 3):
            flipped[place] = int(generator.integers(256))
        spoilt.append(bytes(flipped))
    refused = 0
    for each in spoilt:
        path.write_bytes(each)
        try:
            read_litert(path, SHAPE)
        except VerificationError as error:
            refused += 1
            assert "\n" not in str(error)
    assert len(spoilt) // 3 < refused <= len(spoilt)


def test_a_file_that_lies_about_its_shapes_is_counted_by_the_runtimes(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(classifier())
    honest = open_file(path, SHAPE, Preprocessing())
    path.write_bytes(classifier(tensor(3, shape=np.array([1, 1], np.int32))))  # says that it computes a single logit
    lying = open_file(path, SHAPE, Preprocessing())
    assert read_litert(path, SHAPE).macs == 3 and lying.macs == honest.macs == 30


def test_a_file_that_no_runtime_opens_is_a_failed_result(few: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    """Its operator has one input too few: the runtime finds that, in the reader."""
    def change(file: ModelBuilder) -> None:
        file.operators[0].inputs = np.array([0], np.int32)

    folder = tmp_path / "place" / "folder"
    folder.mkdir(parents=True)
    (folder / "model.tflite").write_bytes(classifier(change))
    (folder / "metadata.json").write_text(json.dumps({"model_format": "litert", "input_shape": [8, 8, 3]}))
    assert_refused(evaluate(folder), "LiteRT cannot load it")


@pytest.mark.parametrize(("layout", "wide", "said"), [
    ("NHWC", (1, 8, 8, 3), None), (None, (1, 3, 8, 8), None), ("NCHW", (1, 8, 8, 3), "state the layout NCHW")])
def test_the_layout_is_stated_or_found(layout: str | None, wide: tuple[int, ...], said: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(classifier(inputs=wide))
    if said:
        with pytest.raises(VerificationError, match=said):
            read_litert(path, SHAPE, layout)
    else:
        assert read_litert(path, SHAPE, layout).channels_last == (wide[3] == 3)


def test_quantized_images_and_logits(tmp_path: Path) -> None:
    """Pixels are rounded to the file's grid and cut at its ends, logits are restored."""
    file = ModelBuilder()
    image = file.tensor("images", (1, 8, 8, 3), "int8", grid=Grid(0.5, 10))
    logits = file.tensor("means", (1, 3), "int8", grid=Grid(0.25, -3))
    file.operator("MEAN", [image, file.constant(np.array([1, 2], np.int32))], logits,
                  file.schema.ReducerOptionsT(keepDims=False), int8=True)
    path = tmp_path / "model.tflite"
    path.write_bytes(file.pack(image, logits))
    runtime = open_file(path, SHAPE, Preprocessing())
    assert runtime.details["input_and_output"] == "int8 and int8"
    images = np.full((1, *SHAPE), 3.3, np.float32)
    images[0, 1] = 1000.0  # beyond the grid: 0.5 * (127 - 10)
    answers = runtime(images)
    assert answers.dtype == np.float32 and answers.tolist() == [[3.5, min(58.5, 0.25 * (127 + 3)), 3.5]]


def test_a_backend_that_is_not_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(classifier())
    monkeypatch.setattr("compress.evaluation.litert_runtime.LitertRuntime.module", "litert_of_nobody")
    with pytest.raises(UserError, match="backend litert: the package is not installed; pip install ai-edge-litert"):
        open_file(path, SHAPE, Preprocessing())
