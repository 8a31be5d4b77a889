"""What a request may change of any set: channels, size, and no validation split; the card stays right for the evaluator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.evaluation.measure import measure_accuracy
from loaders.arrays import ArrayImages, FileImages, ResizedImages, in_memory, prefetched
from loaders.catalog import load
from loaders.images import decode_image
from loaders.listing import list_images
from loaders.request import Request
from loaders.splits import Split, write_image_folder
from metadata.errors import UserError
from metadata.schemas import Preprocessing
from tests.helpers.folders import draw_folder
from tests.helpers.mnist import write_mnist


def every(split: Split) -> torch.Tensor:
    return split.images.batch(torch.arange(len(split)))


@pytest.mark.parametrize(("name", "folder", "mean"), [
    ("mnist", "MNIST", 0.1307), ("fashion_mnist", "FashionMNIST", 0.2860)])
def test_grey_sets_as_rgb(name: str, folder: str, mean: float, tmp_path: Path) -> None:
    write_mnist(tmp_path, folder)
    grey, colour = load(Request(name=name, root=tmp_path)), load(Request(name=name, root=tmp_path, channels=3))
    assert grey.card.input_shape == (1, 28, 28) and colour.card.input_shape == (3, 28, 28)
    assert colour.card.preprocessing.mode == "RGB" and colour.card.preprocessing.mean == [mean] * 3
    for one, other in ((grey.train, colour.train), (grey.validation, colour.validation),
                       (grey.open_test(), colour.open_test())):
        assert torch.equal(every(one).expand(-1, 3, -1, -1), every(other))
        assert torch.equal(one.labels, other.labels)
    assert load(Request(name=name, root=tmp_path, channels=1)).card == grey.card


def test_digits_are_rgb_unless_asked_for_grey() -> None:
    colour, grey = load(Request(name="digits")), load(Request(name="digits", channels=1))
    assert colour.card.input_shape == (3, 8, 8) and colour.card == load(Request(name="digits", channels=3)).card
    assert colour.card.preprocessing.mean == [0.305] * 3
    assert grey.card.input_shape == (1, 8, 8)
    assert grey.card.preprocessing == Preprocessing(mode="L", resize=8, crop=8, mean=[0.305], std=[0.376])
    assert torch.equal(every(grey.validation).expand(-1, 3, -1, -1), every(colour.validation))


def test_colour_as_grey_and_channels_that_cannot_be_had(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "images", 2, 4)
    for name in ("cifar10", "image_folder"):
        grey = load(Request(name=name, root=root, channels=1, image_size=12, preprocessing={"resize": 12}))
        assert grey.card.input_shape == (1, 12, 12) and grey.card.preprocessing.mode == "L"
        first = root / "train" / "class_000" / "0.png"
        assert grey.warnings == [f"the input has one channel: colour pictures such as {first} become grey"]
        with Image.open(root / "test" / "class_001" / "2.png") as image:
            assert np.array_equal(every(grey.open_test())[4 + 2, 0].numpy(), np.asarray(image.convert("L")))
        assert load(Request(name=name, root=root, channels=3, image_size=12)).card.input_shape == (3, 12, 12)
    for channels in (0, 2, 4):
        with pytest.raises(UserError, match=rf"data\.channels {channels}: expected 1 or 3"):
            load(Request(name="digits", channels=channels))


def test_arrays_in_colour_become_grey_as_files_do() -> None:
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in (16, 20):
        grey = ResizedImages(pixels=pixels, channels=1, size=(size, size)).batch(torch.arange(3))
        for one, image in zip(grey, pixels, strict=True):
            whole = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
            assert np.array_equal(one[0].numpy(), np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR)))


def test_grey_image_folder_as_rgb(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 4)
    grey, colour = load(Request(name="mnist", root=root)), load(Request(name="mnist", root=root, channels=3))
    assert grey.card.input_shape == (1, 28, 28) and colour.card.input_shape == (3, 28, 28)
    assert colour.card.preprocessing.std == [0.3081] * 3


@pytest.mark.parametrize("size", [5, 8, 13, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_resized_arrays_are_what_the_evaluator_decodes(size: int, channels: int, tmp_path: Path) -> None:
    """To the bit, whether it is given the images at their original size, in either mode, or those that were exported."""
    original, resized = load(Request(name="digits")), load(Request(name="digits", channels=channels, image_size=size))
    settings = resized.card.preprocessing
    assert resized.card.input_shape == (channels, size, size) and (settings.resize, settings.crop) == (size, size)
    test = resized.open_test()
    assert isinstance(test.images, ArrayImages) and every(test).dtype == torch.uint8
    order = test.labels.argsort(stable=True)
    for name, split in (("original", original.open_test()), ("resized", test)):
        write_image_folder(split, resized.card.class_names, tmp_path / name)
        files = list_images(tmp_path / name).images
        read = np.stack([decode_image(path, settings) for path, _ in files])
        assert torch.equal(torch.from_numpy(read), test.images.batch(order)), name


def test_resized_colour_is_what_pil_makes_of_the_whole_image() -> None:
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in (20, 47):
        for index, image in enumerate(ResizedImages(pixels=pixels, channels=3, size=(size, size)).batch(torch.arange(3))):
            whole = Image.fromarray(pixels[index].permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(whole))


def test_arrays_that_would_be_too_large_are_resized_as_they_are_needed(tmp_path: Path) -> None:
    write_mnist(tmp_path, "MNIST")
    seen: list[tuple[int, int]] = []
    whole = load(Request(name="mnist", root=tmp_path, image_size=40,
                         on_progress=lambda done, total: seen.append((done, total))))
    streamed = load(Request(name="mnist", root=tmp_path, image_size=40, memory_limit_gb=1e-9))
    assert isinstance(whole.train.images, ArrayImages) and isinstance(streamed.train.images, ResizedImages)
    assert seen == [(30, 30), (10, 10)]
    for one, other in zip(whole.train.batches(7), streamed.train.batches(7), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    native = load(Request(name="mnist", root=tmp_path, memory_limit_gb=1e-9))  # at the size of the files: in memory already
    assert isinstance(native.train.images, ArrayImages)


def test_image_size_of_folders_keeps_the_room_for_the_random_crop(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 6, size=40)
    splits = load(Request(name="image_folder", root=root, image_size=28))
    assert splits.card.input_shape == (3, 28, 28) and splits.card.preprocessing.resize == 32  # as 256 to 224
    assert splits.train.images.batch(torch.arange(1)).shape == (1, 3, 32, 32)
    plain = load(Request(name="image_folder", root=root, image_size=28, preprocessing={"resize": 28}))
    assert (plain.card.preprocessing.resize, plain.card.preprocessing.crop) == (28, 28)
    assert load(Request(name="cifar10", root=root, image_size=24)).card.preprocessing.resize == 24


def test_sizes_that_contradict_each_other(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 4)
    with pytest.raises(UserError, match=r"data\.image_size 12, data\.crop 10: both set"):
        load(Request(name="image_folder", root=root, image_size=12, preprocessing={"crop": 10}))
    with pytest.raises(UserError, match=r"8x8 arrays; pass data\.image_size"):
        load(Request(name="digits", preprocessing={"resize": 16, "crop": 16}))
    with pytest.raises(UserError, match=r"8x8 arrays"):
        load(Request(name="digits", image_size=16, preprocessing={"resize": 20}))
    for size in (0, -3):
        with pytest.raises(UserError, match=r"data: resize: .*got"):
            load(Request(name="digits", image_size=size))


@pytest.mark.parametrize("memory_limit_gb", [4.0, 1e-9])
@pytest.mark.parametrize("name", ["digits", "image_folder"])
def test_no_validation_split(name: str, memory_limit_gb: float, tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 1) if name == "image_folder" else None  # one image a class: none could be held out
    splits = load(Request(name=name, root=root, validation_fraction=0, image_size=12, memory_limit_gb=memory_limit_gb))
    validation = splits.validation.to(torch.device("cpu"))
    assert len(validation) == len(validation.images) == 0 and splits.card.counts["validation"] == 0
    assert len(splits.train) == (1438 if root is None else 2) and len(splits.open_test()) == (359 if root is None else 2)
    assert validation.labels.dtype == torch.int64
    assert every(validation).shape == (0, 3, 12, 12) and every(validation).dtype == torch.uint8
    assert list(validation.batches(4)) == [] and list(prefetched(validation.images, [])) == []
    assert measure_accuracy(torch.nn.Linear(1, 1), validation.batches(4), splits.card.preprocessing, 0).fraction == 0.0
    write_image_folder(validation, splits.card.class_names, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_fractions_out_of_range_and_no_images_without_a_crop() -> None:
    for fraction in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"data\.validation_fraction .*at least 0 and below 1"):
            load(Request(name="digits", validation_fraction=fraction))
    nothing = FileImages([], Preprocessing(resize=None, crop=None))
    assert nothing.batch(torch.arange(0)).shape == (0, 3, 0, 0)
    assert len(in_memory(nothing, Request(name="image_folder"))) == 0


def test_folder_with_validation_apart_keeps_it(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 3, splits=("train", "val", "test"))
    splits = load(Request(name="image_folder", root=root, validation_fraction=0, image_size=12))
    assert (len(splits.train), len(splits.validation)) == (6, 6)


def test_skipped_images_do_not_change_what_is_written(tmp_path: Path) -> None:
    """With a damaged image in it, the test folder is written anew: from the files, since crops would be cropped again."""
    root = draw_folder(tmp_path, 2, 4, size=20)
    (root / "test" / "class_001" / "3.png").write_bytes(b"no image")
    splits = load(Request(name="image_folder", root=root, preprocessing={"resize": 16, "crop": 12}, skip_unreadable=True))
    test = splits.open_test()
    assert splits.test_folder is None and len(test) == 7
    write_image_folder(test, splits.card.class_names, tmp_path / "out")
    read = np.stack([decode_image(path, splits.card.preprocessing) for path, _ in list_images(tmp_path / "out").images])
    assert torch.equal(torch.from_numpy(read), every(test))
