"""Every data set keeps the contract, on tiny files in the true formats; damaged folders are named in one line."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.pipeline.stage import Sketch
from compress.pipeline.stages.package import Package
from loaders.arrays import FileImages, prefetched
from loaders.catalog import load, sets
from loaders.images import decode_image, normalize, read_images
from loaders.listing import list_images
from loaders.request import Request
from loaders.splits import Split, hold_out, write_image_folder
from metadata.errors import UserError
from metadata.schemas import Preprocessing
from tests.helpers.folders import draw_folder
from tests.helpers.mnist import write_mnist


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "image_folder", "cifar10"])
def test_loader_contract(name: str, tmp_path: Path) -> None:
    write = {"digits": lambda: None,
             "mnist": lambda: write_mnist(tmp_path, "MNIST"),
             "fashion_mnist": lambda: write_mnist(tmp_path, "FashionMNIST"),
             "image_folder": lambda: draw_folder(tmp_path, 3, 10),
             "cifar10": lambda: draw_folder(tmp_path, 3, 10, size=32)}
    write[name]()
    request = Request(name=name, root=None if name == "digits" else tmp_path,
                      preprocessing={"resize": 12, "crop": 12} if name == "image_folder" else {})
    splits = load(request)
    card = splits.card
    assert name == "fashion_mnist" or card.class_names == sorted(card.class_names)
    for split in (splits.train, splits.validation, splits.open_test()):
        images = split.images.batch(torch.arange(2))
        assert images.dtype == torch.uint8 and tuple(images.shape[1:]) == card.input_shape
        assert split.labels.dtype == torch.int64 and set(split.labels.tolist()) <= set(range(card.num_classes))
        assert len(split.images) == len(split)
    assert set(splits.validation.labels.tolist()) == set(range(card.num_classes))
    again = load(request)
    assert torch.equal(again.validation.labels, splits.validation.labels)
    assert again.card.fingerprint == splits.card.fingerprint


def test_every_set_is_known() -> None:
    assert set(sets()) == {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "image_folder", "oxford_iiit_pet",
                           "flat_folder", "csv", "tiny_imagenet", "parquet", "webdataset"}


def test_fashion_labels_are_those_of_the_data_set(tmp_path: Path) -> None:
    """A teacher that was trained elsewhere numbers the classes as the files do, also where an image folder holds them."""
    write_mnist(tmp_path, "FashionMNIST")
    splits = load(Request(name="fashion_mnist", root=tmp_path))
    test = splits.open_test()
    canonical = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                 "Ankle boot"]
    assert splits.card.class_names == [name.replace("/", "-").lower() for name in canonical]
    assert test.labels[:10].tolist() == list(range(10))  # as in the files
    for name, split in (("train", splits.train), ("test", test)):
        write_image_folder(split, splits.card.class_names, tmp_path / "folder" / name)
    again = load(Request(name="fashion_mnist", root=tmp_path / "folder"))
    assert again.card.class_names == splits.card.class_names
    order = test.labels.argsort(stable=True)
    found = again.open_test()
    assert found.labels.bincount().tolist() == test.labels.bincount().tolist()
    place = found.labels.argsort(stable=True)
    assert torch.equal(found.images.batch(place), test.images.batch(order))


def test_the_public_harness_sorts_classes_so_other_orders_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, "FashionMNIST")
    card = load(Request(name="fashion_mnist", root=tmp_path)).card
    Package(layout="toolkit").check(Sketch(card=card, seed=0))
    by_rank = card.model_copy(update={"class_names": sorted(card.class_names)})
    Package(layout="challenge").check(Sketch(card=by_rank, seed=0))
    with pytest.raises(UserError, match=r"layout challenge: .*sorted class names, and those of fashion_mnist are in its"):
        Package(layout="challenge").check(Sketch(card=card, seed=0))


def test_hold_out_is_stratified_seeded_and_disjoint() -> None:
    labels = torch.arange(1000) % 7
    train, held = hold_out(labels, 0.2, seed=1)
    assert set(train.tolist()).isdisjoint(held.tolist()) and len(train) + len(held) == 1000
    counts = labels[held].bincount()
    assert counts.max() - counts.min() <= 1
    assert not torch.equal(hold_out(labels, 0.2, seed=2)[1], held)
    train, held = hold_out(torch.tensor([0, 0, 1, 3]), 0.5, 0)  # the only image of a class stays in train
    assert {2, 3} < set(train.tolist()) and len(train) == 3 and len(held) == 1
    with pytest.raises(UserError, match="no class has two training images"):
        hold_out(torch.tensor([0, 1, 2]), 0.5, 0)


def test_digits_are_what_scikit_learn_loads() -> None:
    """The file is read without importing the package: a version that moves or changes it must be noticed."""
    from sklearn.datasets import load_digits
    bunch, splits = load_digits(), load(Request(name="digits", channels=1, validation_fraction=0))
    pixels = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]
    train, test = hold_out(torch.from_numpy(bunch.target), 0.2, seed=0)
    for split, ids in ((splits.train, train), (splits.open_test(), test)):
        assert torch.equal(split.images.batch(torch.arange(len(ids))), pixels[ids])
        assert split.labels.tolist() == bunch.target[ids].tolist()


def test_exported_folder_gives_the_same_pixels(tmp_path: Path) -> None:
    splits = load(Request(name="digits"))
    test = splits.open_test()
    write_image_folder(test, splits.card.class_names, tmp_path / "test")
    listing = list_images(tmp_path / "test")
    files = listing.images
    assert listing.classes == splits.card.class_names and len(files) == len(test) == 359
    read = torch.from_numpy(read_images([path for path, _ in files], splits.card.preprocessing))
    labels = torch.tensor([label for _, label in files])
    order = test.labels.argsort(stable=True)
    assert torch.equal(labels, test.labels[order])
    assert torch.equal(read, normalize(test.images.batch(order), splits.card.preprocessing))
    with pytest.raises(UserError, match="already there"):
        write_image_folder(test, splits.card.class_names, tmp_path / "test")


def test_streaming_gives_what_memory_gives(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 3, 8)
    settings = {"resize": 12, "crop": 12}
    in_memory = load(Request(name="image_folder", root=root, preprocessing=settings))
    streamed = load(Request(name="image_folder", root=root, preprocessing=settings, memory_limit_gb=1e-9))
    assert isinstance(streamed.train.images, FileImages)
    for one, other in zip(in_memory.train.batches(5), streamed.train.batches(5), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_streams_from_disk_leave_randomness_alone_and_name_what_is_wrong(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 8)
    images = load(Request(name="image_folder", root=root, preprocessing={"resize": 12, "crop": 12},
                          memory_limit_gb=1e-9)).train.images
    assert isinstance(images, FileImages)
    batches = torch.arange(len(images)).split(4)
    before = torch.random.get_rng_state()
    assert [len(pixels) for _, pixels in prefetched(images, batches)] == [len(ids) for ids in batches]
    assert torch.equal(before, torch.random.get_rng_state())
    images.paths[5].write_text("no image")
    with pytest.raises(UserError, match=r"not a readable image") as caught:
        list(prefetched(images, batches))
    assert str(images.paths[5]) in str(caught.value) and "\n" not in str(caught.value)


def test_what_fails_in_a_decoder_is_not_taken_for_its_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("an operator failed")

    images = load(Request(name="image_folder", root=draw_folder(tmp_path, 2, 8), preprocessing={"resize": 12, "crop": 12},
                          memory_limit_gb=1e-9)).train.images
    monkeypatch.setattr("loaders.arrays.decode_image", broken)  # the forked processes have it too
    with pytest.raises(RuntimeError, match="an operator failed"):
        list(prefetched(images, torch.arange(len(images)).split(4)))


def test_a_killed_decoder_is_an_error_of_one_line(tmp_path: Path) -> None:
    images = load(Request(name="image_folder", root=draw_folder(tmp_path, 2, 40), preprocessing={"resize": 12, "crop": 12},
                          memory_limit_gb=1e-9)).train.images
    stream = prefetched(images, torch.arange(len(images)).split(2))
    next(stream)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(UserError, match="a process that decodes images was killed") as caught:
        list(stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (33, 33), (64, 31)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_decoding_is_what_torchvision_does(shape: tuple[int, int], mode: str, tmp_path: Path) -> None:
    from torchvision.transforms import v2

    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).convert(mode).save(path)
    ours = decode_image(path, Preprocessing(resize=24, crop=17))
    with Image.open(path) as image:
        transform = v2.Compose([v2.Resize(24), v2.CenterCrop(17), v2.PILToTensor()])
        assert np.array_equal(ours, transform(image.convert("RGB")).numpy())


def test_larger_training_images_leave_room_for_the_crop(tmp_path: Path) -> None:
    splits = load(Request(name="image_folder", root=draw_folder(tmp_path, 2, 6, size=40),
                          preprocessing={"resize": 32, "crop": 24}))
    assert splits.card.input_shape == (3, 24, 24)
    assert splits.train.images.batch(torch.arange(1)).shape == (1, 3, 32, 32)
    assert splits.validation.images.batch(torch.arange(1)).shape == (1, 3, 24, 24)


def test_separate_validation_folder_is_used(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 6, splits=("train", "val", "test"))
    splits = load(Request(name="image_folder", root=root, preprocessing={"resize": 12, "crop": 12}))
    assert (len(splits.train), len(splits.validation), len(splits.open_test())) == (12, 12, 12)
    assert splits.test_folder == root / "test"


@pytest.mark.parametrize(("damage", "said"), [
    (lambda root: root.joinpath("train").rename(root / "old"), "expected"),
    (lambda root: root.joinpath("test").rename(root / "tests"), "expected a test split"),
    (lambda root: (root / "train" / "class_new").mkdir(), "class_new: the class has no images"),
    (lambda root: (root / "test" / "class_000").rename(root / "test" / "class_zzz"), "1 of its classes are not in"),
    (lambda root: (root / "train" / "class_000" / "0.png").write_text("no image"), "class_000/0.png"),
    (lambda root: (root / "train" / "class_001" / "2.png").write_bytes(
        (root / "train" / "class_001" / "2.png").read_bytes()[:300]), "class_001/2.png"),
    (lambda root: (root / "train" / "class_001" / "2.png").write_bytes(b""), "class_001/2.png"),
], ids=["no train", "no test", "empty class", "other classes", "not an image", "cut short", "empty file"])
def test_damaged_folders_are_named(damage: object, said: str, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "set", 3, 4)
    damage(root)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        load(Request(name="image_folder", root=root, preprocessing={"resize": 12, "crop": 12}))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_images_are_skipped_only_when_asked(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 5)
    (root / "train" / "class_000" / "0.png").write_text("no image")
    splits = load(Request(name="image_folder", root=root, preprocessing={"resize": 12, "crop": 12}, skip_unreadable=True))
    assert len(splits.train) + len(splits.validation) == 9
    assert len(splits.warnings) == 1 and "class_000/0.png" in splits.warnings[0]


def test_unknown_set_missing_root_and_wrong_class_count(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load(Request(name="cifar_10"))
    with pytest.raises(UserError, match=r"data\.root is not set"):
        load(Request(name="image_folder"))
    with pytest.raises(UserError, match="download=true"):
        load(Request(name="cifar10", root=tmp_path))
    root = draw_folder(tmp_path, 3, 4)
    with pytest.raises(UserError, match=r"3 classes, data\.num_classes says 100"):
        load(Request(name="image_folder", root=root, num_classes=100, preprocessing={"resize": 12, "crop": 12}))


def test_real_mnist(real_mnist: Path) -> None:
    """Through torchvision's own class."""
    splits = load(Request(name="mnist", root=real_mnist))
    counts = len(splits.train), len(splits.validation), len(splits.open_test())
    assert counts == (54001, 5999, 10000)  # a tenth of each class is held out
    mean = splits.train.images.batch(torch.arange(len(splits.train))).float().mean() / 255
    assert float(mean) == pytest.approx(splits.card.preprocessing.mean[0], abs=1e-3)


def test_overrides_of_the_preprocessing_are_used_or_refused(tmp_path: Path) -> None:
    assert load(Request(name="digits", preprocessing={"mean": [0.1, 0.2, 0.3]})).card.preprocessing.mean == [0.1, 0.2, 0.3]
    for changes in ({"mean": [0.1]}, {"std": [0.0, 1.0, 1.0]}, {"resize": 16}, {"crop": 4}):
        with pytest.raises(UserError, match="data"):
            load(Request(name="digits", preprocessing=changes))
    root = draw_folder(tmp_path, 2, 4)
    with pytest.raises(UserError, match="needs 3 values"):
        load(Request(name="image_folder", root=root, preprocessing={"resize": 12, "crop": 12, "mean": [0.5]}))


def test_fingerprint_changes_with_any_split(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 4)
    request = Request(name="image_folder", root=root, preprocessing={"resize": 12, "crop": 12})
    before = load(request).card.fingerprint
    assert load(request).card.fingerprint == before
    one, other = root / "test" / "class_000" / "0.png", root / "test" / "class_001" / "0.png"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert load(request).card.fingerprint != before


def test_damaged_test_image_is_found_before_anything_trains(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 4)
    (root / "test" / "class_001" / "3.png").write_bytes(b"no image")
    settings = {"resize": 12, "crop": 12}
    with pytest.raises(UserError, match=r"class_001/3\.png.*data\.skip_unreadable"):
        load(Request(name="image_folder", root=root, preprocessing=settings))
    splits = load(Request(name="image_folder", root=root, preprocessing=settings, skip_unreadable=True))
    assert len(splits.open_test()) == 7 and splits.test_folder is None


def test_split_batches_cover_everything_in_order() -> None:
    splits = load(Request(name="digits"))
    labels = torch.cat([labels for _, labels in splits.validation.batches(50)])
    assert torch.equal(labels, splits.validation.labels)
    assert isinstance(splits.validation, Split)
