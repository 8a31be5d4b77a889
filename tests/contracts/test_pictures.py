"""Pictures as people have them: more than 8 bits, every mode of Pillow, an orientation in the EXIF data, other filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pydantic import TypeAdapter

from compress.pipeline.config import DataConfig, RunConfig
from compress.pipeline.plan import make_plan
from compress.training.flags import resolve_training
from compress.training.run import prepare_training
from compress.training.trackers import Tracker, terminal
from loaders.catalog import load
from loaders.content import FileHashes
from loaders.images import decode_image, is_turned
from loaders.request import Request
from metadata.errors import UserError
from metadata.records import DatasetCard
from metadata.schemas import Preprocessing, StatedPreprocessing
from tests.helpers.folders import draw_folder

WHOLE = Preprocessing(resize=None, crop=None)
GREY = np.random.default_rng(0).random((20, 30))
LEVELS = (GREY * 255).round().astype(np.uint8)  # (20, 30), the same picture in 8 bits
ORIENTATION = 0x0112


def arrow() -> Image.Image:
    """(48, 64) pixels that no turn and no mirror leaves as they are."""
    pixels = np.full((48, 64, 3), 240, np.uint8)
    pixels[4:40, 8:16] = 20
    pixels[4:12, 16:40] = (200, 40, 40)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("name", "values", "mode"), [
    ("16.png", (GREY * 65535).round().astype(np.uint16), "I;16"),
    ("16.tif", (GREY * 65535).round().astype(np.uint16), "I;16"),
    ("16b.tif", (GREY * 65535).round().astype(">u2"), "I;16B"),
    ("16.pgm", (GREY * 65535).round().astype(np.uint16), "I"),
    ("32.tif", (GREY * 65535).round().astype(np.int32), "I"),
    ("8_in_32.tif", LEVELS.astype(np.int32), "I"),
    ("float.tif", GREY.astype(np.float32), "F"),
    ("overshoot.tiff", (GREY * 1.002 - 0.001).astype(np.float32), "F"),
])
def test_grey_of_more_than_8_bits_is_scaled(name: str, values: np.ndarray, mode: str, tmp_path: Path) -> None:
    path = tmp_path / name
    Image.fromarray(values).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    colours = decode_image(path, WHOLE)
    assert colours.shape == (3, 20, 30) and np.abs(colours.astype(int) - LEVELS).max() <= 1
    grey = decode_image(path, Preprocessing(mode="L", resize=None, crop=None, mean=[0], std=[1]))
    assert np.array_equal(grey[0], colours[0])


def test_the_ends_of_16_bits_are_the_ends_of_8(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(values).save(tmp_path / "exact.png")
    assert np.array_equal(decode_image(tmp_path / "exact.png", WHOLE)[0], values // 257)


@pytest.mark.parametrize(("values", "said"), [
    ((GREY * 100 - 50).astype(np.int32), "integer values from -49 to 49, expected 0 to 65535"),
    ((GREY * 1e6).astype(np.int32), "integer values from .* to 99.*, expected 0 to 65535"),
    ((GREY * 255).astype(np.float32), "float values from 0.0.* to 254.*, expected 0 to 1"),
    (np.where(GREY > 0.5, np.nan, GREY).astype(np.float32), "float values from nan to nan"),
], ids=["negative", "over 16 bits", "float of 255", "not a number"])
def test_values_out_of_range_are_refused_by_name(values: np.ndarray, said: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "scan.tif")
    with pytest.raises(UserError, match=rf"scan\.tif: {said}") as caught:
        decode_image(tmp_path / "scan.tif", WHOLE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("mode", "suffix"), [
    ("1", "png"), ("L", "png"), ("P", "gif"), ("LA", "png"), ("PA", "tif"), ("RGBA", "png"), ("RGBA", "webp"),
    ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("YCbCr", "tif"), ("RGB", "bmp")])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_mode_becomes_what_pillow_converts_it_to(mode: str, suffix: str, tmp_path: Path) -> None:
    path, image = tmp_path / f"picture.{suffix}", arrow().convert("RGBA" if mode == "PA" else "RGB").convert(
        "LA" if mode == "PA" else mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64).astype(np.uint8)))
    image.save(path, **({"transparency": 0} if suffix == "gif" else {}))
    with Image.open(path) as stored:
        assert np.array_equal(decode_image(path, WHOLE), np.asarray(stored.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["moves.gif", "pages.tif", "moves.webp", "moves.png"])
def test_of_several_frames_the_first_counts(name: str, tmp_path: Path) -> None:
    frames = [arrow(), ImageOps.invert(arrow())]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:],
                   **({"lossless": True} if name.endswith("webp") else {}))
    assert np.abs(decode_image(tmp_path / name, WHOLE).transpose(1, 2, 0).astype(int) - np.asarray(arrow())).max() <= 2


def tagged(path: Path, orientation: int, **options: Any) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    arrow().save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_an_orientation_is_applied_where_the_preprocessing_says_so(suffix: str, orientation: int, tmp_path: Path) -> None:
    path = tagged(tmp_path / f"camera.{suffix}", orientation, **({"lossless": True} if suffix == "webp" else {}))
    stored = Preprocessing(resize=None, crop=None, exif_orientation=False)
    with Image.open(path) as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)
    with Image.open(path) as image:
        as_stored = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_image(path, WHOLE), shown)
    assert np.array_equal(decode_image(path, stored), as_stored)
    same = orientation == 1 or suffix == "tif"  # Pillow turns a TIFF itself
    assert np.array_equal(shown, as_stored) == same and is_turned(path) != same


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, of damaged EXIF data
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff",
                                  b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x03ab\0\0\0\0\0\0"])
def test_damaged_exif_data_leave_the_picture_as_it_is(exif: bytes, tmp_path: Path) -> None:
    arrow().save(tmp_path / "camera.jpg", exif=exif)
    stored = Preprocessing(resize=None, crop=None, exif_orientation=False)
    assert np.array_equal(decode_image(tmp_path / "camera.jpg", WHOLE), decode_image(tmp_path / "camera.jpg", stored))


def test_a_file_that_states_no_orientation_means_none(tmp_path: Path) -> None:
    """As written by version 0.1, which took pictures as they are stored."""
    old = {"mode": "RGB", "resize": 32, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    stated = TypeAdapter(StatedPreprocessing).validate_python(old)
    assert stated.exif_orientation is False and stated.interpolation == "bilinear"
    assert Preprocessing(interpolation="InterpolationMode.BICUBIC").interpolation == "bicubic"  # torchvision's name
    card = {"name": "image_folder", "class_names": ["a"], "input_shape": [3, 32, 32], "preprocessing": old}
    assert DatasetCard.model_validate(card).preprocessing == stated
    again = DatasetCard.model_validate(DatasetCard.model_validate(card | {"preprocessing": WHOLE}).model_dump())
    assert again.preprocessing == WHOLE and WHOLE.exif_orientation


@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_files_and_arrays_are_resized_with_the_filter_that_was_asked_for(interpolation: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    expected = np.asarray(Image.fromarray(pixels).resize((33, 24), Image.Resampling[interpolation.upper()]))
    settings = Preprocessing(resize=24, crop=None, interpolation=interpolation)  # type: ignore[arg-type]
    assert np.array_equal(decode_image(tmp_path / "one.png", settings), expected.transpose(2, 0, 1))

    data = DataConfig(name="digits", channels=1, image_size=12, interpolation=interpolation.upper())  # type: ignore[arg-type]
    digits, plain = load(data.request()), load(Request(name="digits", channels=1, workers=1))
    assert digits.card.preprocessing.interpolation == interpolation
    one, whole = (split.train.images.batch(torch.arange(1))[0, 0].numpy() for split in (digits, plain))
    assert np.array_equal(one, np.asarray(Image.fromarray(whole).resize((12, 12), Image.Resampling[interpolation.upper()])))


def test_a_grey_folder_makes_a_plan_of_one_channel(tmp_path: Path) -> None:
    """The models of the project take the channels of the data, unless their options say otherwise."""
    root = draw_folder(tmp_path, 2, 4)
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    stage = {"model": "slim_resnet18", "options": {"width": 8, "stem": "small"}, "train": {"epochs": 1}}
    config = RunConfig.model_validate({
        "recipe": "r", "name": "r", "stages": [{"teacher": stage}, {"distill": stage}],
        "data": {"name": "image_folder", "root": root, "channels": 1, "image_size": 12}})
    planned = make_plan(config, Tracker(terminal()))
    assert planned.splits.card.input_shape == (1, 12, 12) and planned.splits.warnings == []
    assert planned.splits.card.preprocessing.mean == [0.459] and planned.splits.card.preprocessing.std == [0.2256]
    flags = ["--dataset", "image_folder", "--data_root", str(root), "--image_size", "12", "--channels", "1", "--model_name"]
    training, tracker = resolve_training([*flags, "slim_resnet18"]), Tracker(terminal())
    splits, model, options = prepare_training(training, tracker, FileHashes())
    assert splits.card.input_shape == (1, 12, 12) and options["in_channels"] == 1
    assert model(torch.zeros(2, 1, 12, 12)).shape == (2, 2)
    with pytest.raises(UserError, match=r"resnet18: it does not take images of shape \[1, 12, 12\]"):
        prepare_training(resolve_training([*flags, "resnet18"]), tracker, FileHashes())
    stage["options"] |= {"in_channels": 3}  # type: ignore[operator]
    with pytest.raises(UserError, match=r"does not take images of shape \[1, 12, 12\]"):
        make_plan(config, Tracker(terminal()))


def test_settings_of_the_data_reach_the_card(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 3)
    data = DataConfig(name="image_folder", root=root, resize=12, crop=12, interpolation="bicubic", exif_orientation=False)
    preprocessing = load(data.request()).card.preprocessing
    assert (preprocessing.interpolation, preprocessing.exif_orientation) == ("bicubic", False)
    assert load(data.model_copy(update={"exif_orientation": None}).request()).card.preprocessing.exif_orientation
