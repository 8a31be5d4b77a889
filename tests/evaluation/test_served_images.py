"""What a submission declares as its input is what its preprocessing gives, within bounds of time and memory."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.evaluation.channel import Clock, OutOfTimeError
from compress.evaluation.pictures import decode_pictures
from compress.evaluation.submission import read_submission
from loaders.images import decode_image, normalize, read_pixels, scale_pixels
from metadata.errors import VerificationError
from metadata.schemas import Preprocessing
from tests.helpers.submissions import edit_json

META = "model_metadata.json"


@pytest.mark.parametrize(("changes", "said"), [
    ({"resize": 2**20}, "a resize to 1,048,576 pixels is over the limit"),
    ({"resize": 12_000}, "a resize to 12,000 pixels is over the limit"),
    ({"resize": 65}, "8 times the crop"),
    ({"resize": 4}, "a crop of 8 does not fit into a resize of 4"),
    ({"resize": 16, "crop": 16}, "the preprocessing gives 3 channels of 16x16 pixels"),
    ({"resize": 16, "crop": None}, "images whose shorter side is 16"),
    ({"mode": "L", "mean": [0.5], "std": [0.5]}, "the preprocessing gives 1 channels of 8x8 pixels"),
    ({"resize": 2**20, "crop": 2**20}, "over the limit"),
])
def test_preprocessing_agrees_with_the_declared_input(changes: dict[str, Any], said: str, submission: Path,
                                                              tmp_path: Path) -> None:
    folder = Path(shutil.copytree(submission, tmp_path / "folder"))
    edit_json(folder, META, lambda metadata: metadata["preprocessing"].update(changes))
    start = time.process_time()
    with pytest.raises(VerificationError, match=said):
        read_submission(folder)
    assert time.process_time() - start < 1


def test_pixels_have_the_declared_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    cropped, whole = Preprocessing(resize=16, crop=12), Preprocessing(resize=None, crop=None)
    pixels = read_pixels(tmp_path / "a.png", cropped, (3, 12, 12))
    assert np.array_equal(pixels, decode_image(tmp_path / "a.png", cropped)) and pixels.dtype == np.uint8
    assert np.array_equal(scale_pixels(pixels[None], cropped), normalize(torch.from_numpy(pixels[None]), cropped).numpy())
    assert read_pixels(tmp_path / "a.png", whole, (3, 20, 30)).shape == (3, 20, 30)
    with pytest.raises(VerificationError, match=r"shape \[3, 20, 30\], the submission declares"):
        read_pixels(tmp_path / "a.png", whole, (3, 8, 8))


def test_many_images_lie_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = []
    for index in range(5):
        pictures.append(tmp_path / f"{index}.png")
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(pictures[-1])
    plain = Preprocessing(resize=None, crop=None, mean=[0, 0, 0], std=[1, 1, 1])
    monkeypatch.setattr("compress.evaluation.pictures.IN_MEMORY_BYTES", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    decoded = decode_pictures(pictures, plain, (3, 4, 4), True, Clock(60))
    assert isinstance(decoded.pixels, np.memmap) and sorted(tmp_path.iterdir()) == sorted(pictures)
    assert np.array_equal(decoded.inputs([3, 1])[:, 0, 0, 0], np.float32([3, 1]) / np.float32(255))
    with pytest.raises(VerificationError, match="state a smaller crop, or set TMPDIR"):
        decode_pictures(pictures, plain, (3, 2**24, 2**24), True, Clock(60))
    with pytest.raises(OutOfTimeError, match="0 of 5 test images were read within --time_limit_s 0"):
        decode_pictures(pictures, plain, (3, 4, 4), True, Clock(0))
