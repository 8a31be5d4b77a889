"""CIFAR, IDX and pet files, tiny but in the true formats, go through torchvision's own classes; damage is named."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from loaders.arrays import FileImages
from loaders.catalog import load
from loaders.images import decode_image
from loaders.listing import list_images
from loaders.request import Request
from loaders.splits import write_image_folder
from metadata.errors import UserError
from tests.helpers.folders import draw_folder
from tests.helpers.mnist import write_mnist

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BREEDS = ["Abyssinian", "american_bulldog", "Bengal", "great_pyrenees"]  # in the set's own order, cats capitalised


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def write_cifar(root: Path, kind: type[datasets.CIFAR10], batches: list[str], keys: dict[str, list[int]],
                names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Writes python batches of 40 images; torchvision's class then expects their checksums, and verifies them."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    sums, drawn = {}, []
    for name in batches:
        pixels = generator.integers(0, 256, (40, 3072), dtype=np.uint8)  # rows: red, green and blue planes
        content = pickle.dumps({"batch_label": name, "data": pixels, "filenames": [f"{i}.png" for i in range(40)], **keys},
                               protocol=2)
        (folder / name).write_bytes(content)
        sums[name] = md5(content)
        drawn.append(pixels)
    meta = pickle.dumps(names, protocol=2)
    (folder / kind.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in batches[:-1]])
    monkeypatch.setattr(kind, "test_list", [[batches[-1], sums[batches[-1]]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    return np.stack(drawn)


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    batches = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return write_cifar(root, datasets.CIFAR10, batches, {"labels": [index % 10 for index in range(40)]},
                       {"label_names": CIFAR10_NAMES}, monkeypatch)


def test_cifar10_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = write_cifar10(tmp_path, monkeypatch)
    splits = load(Request(name="cifar10", root=tmp_path))
    assert splits.card.class_names == sorted(CIFAR10_NAMES) and splits.card.input_shape == (3, 32, 32)
    assert (len(splits.train), len(splits.validation)) == (180, 20)
    test = splits.open_test()
    assert torch.equal(test.images.batch(torch.arange(40)), torch.from_numpy(drawn[5]).view(40, 3, 32, 32))
    assert [splits.card.class_names[label] for label in test.labels[:10].tolist()] == CIFAR10_NAMES


def test_cifar100_labels_are_the_fine_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = [f"class_{(index * 37) % 100:02d}" for index in range(100)]  # not in order, as labels do not follow the alphabet
    labels = {"fine_labels": [index // 4 * 10 for index in range(40)], "coarse_labels": [1] * 40}
    drawn = write_cifar(tmp_path, datasets.CIFAR100, ["train", "test"], labels,
                        {"fine_label_names": fine, "coarse_label_names": ["a"] * 20}, monkeypatch)
    assert load(Request(name="cifar100", root=tmp_path)).warnings == [
        "90 of 100 classes have no training image: class_37, class_74, class_11, class_48, class_85 and others"]
    splits = load(Request(name="cifar100", root=tmp_path, validation_fraction=0))
    test = splits.open_test()
    assert splits.card.class_names == fine and len(splits.train) == 40 and splits.warnings == []
    assert test.labels.tolist() == labels["fine_labels"]
    assert [splits.card.class_names[label] for label in test.labels.tolist()] == [fine[i] for i in labels["fine_labels"]]
    assert torch.equal(test.images.batch(torch.arange(40)), torch.from_numpy(drawn[1]).view(40, 3, 32, 32))


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "data_batch_3").unlink(),
    lambda folder: (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:1000]),
    lambda folder: (folder / "test_batch").write_bytes(b""), lambda folder: (folder / "batches.meta").unlink(),
], ids=["missing batch", "cut short", "empty test batch", "no names"])
def test_damaged_cifar_is_told_in_one_line(damage: Callable[[Path], object], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    damage(tmp_path / "cifar-10-batches-py")
    with pytest.raises(UserError, match="cifar10 is not there, or damaged") as caught:
        load(Request(name="cifar10", root=tmp_path))
    assert "download=true" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "content", "said"), [
    ("train-images-idx3-ubyte", lambda data: data[:5000], "mnist is not there, or damaged"),
    ("train-images-idx3-ubyte", lambda data: b"", "mnist is not there, or damaged"),
    ("train-images-idx3-ubyte", lambda data: b"\xff" * 5000, "mnist is not there, or damaged"),
    ("train-labels-idx1-ubyte", lambda data: data[:20], "mnist is not there, or damaged"),
    ("train-labels-idx1-ubyte", lambda data: data[:4] + (10).to_bytes(4, "big") + data[8:18], "10 for 40 images"),
    ("train-labels-idx1-ubyte", lambda data: data[:8] + bytes([77] * 40), "labels below 10"),
], ids=["cut short", "empty", "other numbers", "labels cut short", "fewer labels", "labels out of range"])
def test_damaged_mnist_is_told_in_one_line(file: str, content: Callable[[bytes], bytes], said: str, tmp_path: Path) -> None:
    write_mnist(tmp_path, "MNIST")
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=said) as caught:
        load(Request(name="mnist", root=tmp_path))
    assert "download=true" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)])
def test_packed_idx_files_are_unpacked_when_fetching_is_asked_for(name: str, kind: type[datasets.MNIST], tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """With the right checksums torchvision has nothing to fetch, so this needs no network; unasked nothing is written."""
    write_mnist(tmp_path / "plain", kind.__name__)
    raw = tmp_path / "packed" / kind.__name__ / "raw"
    raw.mkdir(parents=True)
    sums = []
    for path in sorted((tmp_path / "plain" / kind.__name__ / "raw").iterdir()):
        packed = gzip.compress(path.read_bytes())
        (raw / f"{path.name}.gz").write_bytes(packed)
        sums.append((f"{path.name}.gz", md5(packed)))
    monkeypatch.setattr(kind, "resources", sums)
    with pytest.raises(UserError, match=r"unpack .*-ubyte\.gz and the other .*gunzip, or pass data\.download=true"):
        load(Request(name=name, root=tmp_path / "packed"))
    assert len(list(raw.iterdir())) == 4
    splits = load(Request(name=name, root=tmp_path / "packed", download=True))
    plain = load(Request(name=name, root=tmp_path / "plain"))
    assert splits.card == plain.card
    assert torch.equal(splits.open_test().labels, plain.open_test().labels)


def write_pets(root: Path, images: int = 5) -> Path:
    """Annotations and JPEG files as the archives hold them: odd sizes, one GIF called .jpg, and files nobody lists."""
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, breed in enumerate(BREEDS, start=1):
        species = 1 if breed[0].isupper() else 2
        for index in range(2 * images):
            shape = generator.integers(30, 60, 2)
            pixels = np.clip(60 * number + generator.integers(-30, 30, (*shape, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{breed}_{index + 1}.jpg",
                                         format="GIF" if index == 0 and number == 1 else "JPEG")
            rows["trainval" if index < images else "test"].append(f"{breed}_{index + 1} {number} {species} {number}")
    for split, lines in rows.items():
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (folder / "images" / "Abyssinian_1.mat").write_bytes(b"MATLAB")
    (folder / "annotations" / "list.txt").write_text("#Image CLASS-ID SPECIES BREED ID\n")
    return root


SMALL = {"resize": 24, "crop": 16}


def pets(root: Path, **changes: object) -> Request:
    return Request(name="oxford_iiit_pet", root=root, preprocessing=SMALL, **changes)  # type: ignore[arg-type]


def test_pets_are_those_of_torchvision(tmp_path: Path) -> None:
    write_pets(tmp_path)
    splits = load(pets(tmp_path))
    card = splits.card
    assert card.class_names == ["Abyssinian", "American Bulldog", "Bengal", "Great Pyrenees"]
    assert card.input_shape == (3, 16, 16) and card.counts == {"train": 16, "validation": 4}
    assert splits.train.images.batch(torch.arange(16)).shape == (16, 3, 24, 24)  # room for the random crop
    assert splits.validation.images.batch(torch.arange(4)).shape == (4, 3, 16, 16)
    assert splits.validation.labels.bincount().tolist() == [1, 1, 1, 1]
    theirs, test = datasets.OxfordIIITPet(tmp_path, split="test"), splits.open_test()
    assert [card.class_names[label] for label in test.labels.tolist()] == [theirs.classes[label] for _, label in theirs]
    assert test.paths is not None and len(test) == 20
    assert test.labels.tolist() == [label for _, label in theirs]
    for index, path in enumerate(test.paths):
        assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), np.asarray(theirs[index][0]))
    trainval = [*(splits.train.paths or []), *(splits.validation.paths or [])]
    assert {path.name for path in trainval}.isdisjoint(path.name for path in test.paths) and len(set(trainval)) == 20


def test_pets_at_their_own_size_stream_and_come_from_an_image_folder(tmp_path: Path) -> None:
    write_pets(tmp_path / "files", images=2)
    splits = load(Request(name="oxford_iiit_pet", root=tmp_path / "files", memory_limit_gb=1e-9))
    assert isinstance(splits.train.images, FileImages) and splits.card.input_shape == (3, 224, 224)
    assert splits.train.images.batch(torch.arange(2)).shape == (2, 3, 256, 256)
    folder = draw_folder(tmp_path / "folder", 3, 4)
    assert load(pets(folder)).card.num_classes == 3
    with pytest.raises(UserError, match=r"4 classes, data\.num_classes says 37"):
        load(pets(tmp_path / "files", num_classes=37))


def test_pets_written_as_a_folder_are_decoded_to_the_same_pixels(tmp_path: Path) -> None:
    """Cropped images would be resized and cropped a second time by the evaluator."""
    splits = load(pets(write_pets(tmp_path)))
    test = splits.open_test()
    write_image_folder(test, splits.card.class_names, tmp_path / "out")
    listing = list_images(tmp_path / "out")
    files = listing.images
    assert listing.classes == splits.card.class_names and splits.test_folder is None
    read = np.stack([decode_image(path, splits.card.preprocessing) for path, _ in files])
    order = test.labels.argsort(stable=True)
    assert torch.equal(torch.from_numpy(read), test.images.batch(order))


@pytest.mark.parametrize(("damage", "said"), [
    (lambda folder: folder.rename(folder.with_name("pets")), r"expected .*oxford-iiit-pet/images .*data\.download=true"),
    (lambda folder: (folder / "annotations" / "test.txt").unlink(), r"annotations/test\.txt: cannot be read"),
    (lambda folder: (folder / "annotations" / "test.txt").write_text(""), r"test\.txt: lists no images"),
    (lambda folder: (folder / "annotations" / "trainval.txt").write_text("Bengal_1 3 1 3\nBengal 2\n"),
     r"trainval\.txt:2: expected 'IMAGE CLASS SPECIES BREED' .*got 'Bengal 2'"),
    (lambda folder: (folder / "annotations" / "trainval.txt").write_text("../../secret_1 3 1 3\n"), r"trainval\.txt:1:"),
    (lambda folder: (folder / "annotations" / "test.txt").write_text("Bengal_6 3 1 3\nSphynx_1 5 1 5\n"),
     r"other classes \(4 and 2\); not in both: Abyssinian, American Bulldog, Great Pyrenees, Sphynx"),
    (lambda folder: (folder / "images" / "american_bulldog_7.jpg").unlink(), r"american_bulldog_7\.jpg: there is no such"),
    (lambda folder: (folder / "images" / "Bengal_2.jpg").write_bytes(b"no image"), r"Bengal_2\.jpg: not a readable image"),
    (lambda folder: (folder / "images" / "Bengal_9.jpg").write_bytes(b""), r"Bengal_9\.jpg: .*data\.skip_unreadable"),
], ids=["missing", "no annotations", "empty annotations", "short line", "path outside", "other classes", "missing image",
        "damaged image", "empty test image"])
def test_damaged_pets_are_told_in_one_line(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    write_pets(tmp_path)
    damage(tmp_path / "oxford-iiit-pet")
    with pytest.raises(UserError, match=said) as caught:
        load(pets(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_pets_are_skipped_only_when_asked(tmp_path: Path) -> None:
    images = write_pets(tmp_path) / "oxford-iiit-pet" / "images"
    (images / "Bengal_2.jpg").unlink()
    (images / "Bengal_9.jpg").write_bytes(b"no image")
    splits = load(pets(tmp_path, skip_unreadable=True))
    assert len(splits.train) + len(splits.validation) == 19 and len(splits.open_test()) == 19
    assert len(splits.warnings) == 2


def test_pets_are_fetched_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data\.root is not set"):
        load(Request(name="oxford_iiit_pet"))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match="expected"):
        load(pets(tmp_path))
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"oxford_iiit_pet cannot be fetched .*check the network") as caught:
        load(pets(tmp_path, download=True))
    assert "\n" not in str(caught.value)
    write_pets(tmp_path / "there")
    assert len(load(pets(tmp_path / "there", download=True)).open_test()) == 20  # nothing is fetched twice


def test_the_sets_own_folder_as_the_root_is_said(tmp_path: Path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        load(Request(name="mnist", root=tmp_path / "MNIST"))
    assert f"pass data.root={tmp_path}" in str(caught.value) and "download=True" not in str(caught.value)
