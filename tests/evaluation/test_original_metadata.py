"""Preprocessing as people state it for files of other tools: ranges of values, layouts, sizes that the input tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress.evaluation.submission import read_submission
from compress.evaluation.submission_files import SubmissionFiles
from loaders.images import scale_pixels
from metadata.errors import VerificationError


def read(folder: Path, **metadata: Any) -> SubmissionFiles:
    onnx.save(onnx.ModelProto(producer_name="nobody"), folder / "model.onnx")
    (folder / "metadata.json").write_text(json.dumps({"model_format": "onnx", **metadata}))
    return read_submission(folder)


@pytest.mark.parametrize(("stated", "black", "white"), [
    ({"value_range": [0, 255]}, [0, 0, 0], [255, 255, 255]), ({"range": [-1, 1]}, [-1] * 3, [1] * 3),
    ({"value_range": [0, 255], "mean": [100, 50, 0], "std": [5, 1, 255]}, [-20, -50, 0], [31, 205, 1]),
    ({"value_range": [0, 255], "mode": "L"}, [0], [255]), ({"mean": [0.5] * 3, "std": [0.5] * 3}, [-1] * 3, [1] * 3)])
def test_what_black_and_white_become(stated: dict[str, Any], black: list[float], white: list[float], tmp_path: Path
                                    ) -> None:
    files = read(tmp_path, preprocessing={"resize": 8, "crop": 8, **stated})
    assert files.notes == ()
    for level, expected in ((0, black), (255, white)):
        pixels = np.full((1, len(black), 1, 1), level, np.uint8)
        assert scale_pixels(pixels, files.preprocessing).ravel().tolist() == pytest.approx(expected, abs=1e-4)


def test_plain_pixels_come_out_whole(tmp_path: Path) -> None:
    """A quantized input rounds to whole pixels: none may lie beside one."""
    files = read(tmp_path, preprocessing={"resize": 8, "crop": 8, "value_range": [0, 255]})
    levels = np.arange(256, dtype=np.uint8)[:, None, None, None].repeat(3, 1)
    assert np.abs(scale_pixels(levels, files.preprocessing) - levels).max() < 1e-4


@pytest.mark.parametrize("wrong", [[255, 0], [0], "0-255", [0, float("inf")], [1, 1], None,
                                   [0, 10**400], [-10**400, 0], [float("nan"), 1]])
def test_a_range_that_is_none_is_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="value_range"):
        read(tmp_path, preprocessing={"value_range": wrong})


@pytest.mark.parametrize("key", ["mean", "std", "resize", "crop", "value_range", "interpolation"])
def test_numbers_without_measure_are_refused(key: str, tmp_path: Path) -> None:
    for number in (10**400, -10**400, float("inf"), float("nan")):
        for value in (number, [number] * 2, [number] * 3):
            for more in ({}, {"value_range": [0, 255]}):
                with pytest.raises(VerificationError) as caught:
                    read(tmp_path, preprocessing={"resize": 8, "crop": 8, **more, key: value})
                assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


@pytest.mark.parametrize(("metadata", "layout"), [
    ({"layout": "NHWC"}, "NHWC"), ({"preprocessing": {"layout": "channels_last"}}, "NHWC"),
    ({"data_format": "channels-first"}, "NCHW"), ({}, None)])
def test_layouts(metadata: dict[str, Any], layout: str | None, tmp_path: Path) -> None:
    assert read(tmp_path, **metadata).layout == layout


@pytest.mark.parametrize(("shape", "size", "taken"), [
    ([32, 32, 3], (32, 32), (3, 32, 32)), ([3, 96, 128], (96, 128), (3, 96, 128))])
def test_the_size_of_a_file_of_another_tool_is_its_inputs(shape: list[int], size: tuple[int, int],
                                                          taken: tuple[int, int, int], tmp_path: Path) -> None:
    files = read(tmp_path, input_shape=shape, preprocessing={"value_range": [0, 255]})
    assert files.input_shape == taken and files.preprocessing.window == size and files.notes == ()
