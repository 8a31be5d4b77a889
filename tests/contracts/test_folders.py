"""Folders as people have them: links, hidden files, other suffixes, classes that are empty or a folder too deep."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from compress.pipeline.config import RunConfig
from compress.pipeline.plan import make_plan
from compress.training.trackers import Tracker, terminal
from loaders.catalog import load
from loaders.images import decode_image
from loaders.listing import IMAGE_SUFFIXES, list_images
from loaders.request import Request
from loaders.splits import Splits
from metadata.errors import UserError
from metadata.schemas import Preprocessing
from tests.helpers.folders import draw_folder

SMALL = {"resize": 12, "crop": 12}


def opened(root: Path, **changes: object) -> Splits:
    return load(Request(name="image_folder", root=root, preprocessing=SMALL, **changes))  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path, _ in list_images(folder).images]


# ----------------------------------------------------------------------------------------------------------- listing


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES - {".apng", ".mpo"}))
def test_what_pillow_writes_is_listed_and_decoded(suffix: str, tmp_path: Path) -> None:
    needed = {".avif": "avif", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}.get(suffix)
    if needed and not features.check(needed):
        pytest.skip(f"this Pillow has no {needed}")
    (tmp_path / "class").mkdir()
    path = tmp_path / "class" / f"PICTURE{suffix.upper()}"
    pixels = np.full((16, 24, 3), (200, 200, 200), np.uint8)
    Image.fromarray(pixels).convert({".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")).save(path)
    assert names(tmp_path) == [f"class/{path.name}"]
    decoded = decode_image(path, Preprocessing(resize=None, crop=None))
    assert decoded.shape == (3, 16, 24)
    assert suffix == ".pbm" or np.abs(decoded.astype(int) - 200).max() <= 4


def test_links_to_files_and_folders_are_followed_without_going_round(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "set", 2, 3)
    elsewhere = draw_folder(tmp_path / "elsewhere", 1, 2)
    one = root / "train" / "class_000"
    (one / "file.png").symlink_to(elsewhere / "train" / "class_000" / "0.png")
    (one / "more").symlink_to(elsewhere / "train" / "class_000", target_is_directory=True)
    (one / "more_again").symlink_to(elsewhere / "train" / "class_000", target_is_directory=True)
    (one / "up").symlink_to(root / "train", target_is_directory=True)
    (one / "itself").symlink_to(one, target_is_directory=True)
    (one / "loop").symlink_to(one / "loop")
    (one / "gone.png").symlink_to(tmp_path / "gone.png")
    (root / "train" / "class_002").symlink_to(elsewhere / "test" / "class_000", target_is_directory=True)
    assert names(root / "train") == [
        "class_000/0.png", "class_000/1.png", "class_000/2.png", "class_000/file.png", "class_000/more/0.png",
        "class_000/more/1.png", "class_001/0.png", "class_001/1.png", "class_001/2.png", "class_002/0.png",
        "class_002/1.png"]
    listing = list_images(root / "train")
    assert listing.left_out == {"broken link": 2, "folder listed already": 2, "link to a folder above": 1}
    assert listing.warnings() == [f"{root}/train: left out: broken link (2), folder listed already (2), link to a folder "
                                  f"above (1); the first is {one}/gone.png"]
    shutil.copytree(root / "train" / "class_001", root / "test" / "class_002")
    splits = opened(root)
    assert (len(splits.train), len(splits.validation), splits.warnings) == (8, 3, listing.warnings())


def test_a_link_to_the_whole_set_gives_the_same_list(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "set", 2, 3)
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert names(tmp_path / "link" / "train") == names(root / "train") and len(names(root / "train")) == 6


def test_what_is_left_out_is_counted_by_its_kind(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 3)
    one = root / "train" / "class_000"
    for name in ("a.heic", "b.HEIC", "notes.txt", "README", ".hidden.png", "._0.png", ".DS_Store", "Thumbs.db"):
        (one / name).write_bytes(b"")
    (root / "train" / "loose.png").write_bytes((one / "0.png").read_bytes())
    (root / "train" / "labels.csv").write_text("class_000,0.png\n")
    os.mkfifo(one / "pipe.png")
    (one / "folder.png").mkdir()
    for system in ("__MACOSX", ".ipynb_checkpoints", "lost+found", "@eaDir"):
        for place in (root / "train", one):
            (place / system).mkdir()
            (place / system / "0.png").write_bytes((one / "0.png").read_bytes())
    (root / "train" / ".cache").mkdir()
    listing = list_images(root / "train")
    assert listing.classes == ["class_000", "class_001"] and len(listing.images) == 6
    assert listing.left_out == {"hidden": 3, ".heic": 2, ".csv": 1, ".txt": 1, "image outside a class folder": 1,
                                "no suffix": 1, "special file": 1}
    assert listing.warnings() == [
        f"{root}/train: left out: hidden (3), .heic (2), .csv (1), .txt (1), image outside a class folder (1), no suffix "
        f"(1), others (1); the first is {root}/train/.cache"]
    assert opened(root).warnings == listing.warnings()


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = draw_folder(tmp_path, 2, 3)
    scan = os.scandir

    def forbid(folder: Path) -> object:
        if Path(folder).name == "class_001":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr("loaders.listing.os.scandir", forbid)  # root may read every folder
    with pytest.raises(UserError, match=r"train/class_001: the folder cannot be read: .*Permission denied"):
        list_images(root / "train")


# ----------------------------------------------------------------------------------------------------------- classes


def test_the_only_image_of_a_class_stays_in_train(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 3, 4)
    for path in sorted((root / "train" / "class_001").iterdir())[1:]:
        path.unlink()
    splits = opened(root)
    assert splits.train.labels.bincount().tolist() == [3, 1, 3]
    assert splits.validation.labels.bincount().tolist() == [1, 0, 1]
    assert splits.warnings == ["1 of 3 classes have a single training image, which stays in train, so validation has none "
                               f"of them: class_001 ({root}/train/class_001)"]
    assert opened(root, validation_fraction=0).warnings == []
    shutil.copytree(root / "test", root / "val")
    assert opened(root).validation.labels.bincount().tolist() == [4, 4, 4] and opened(root).warnings == []


def test_nothing_held_out_is_refused_with_a_way_on(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "set", 2, 4)
    config = RunConfig.model_validate({
        "recipe": "r", "name": "r", "stages": [{"teacher": {"model": "slim_resnet18", "options": {"width": 8}}}],
        "data": {"name": "image_folder", "root": root, "validation_fraction": 0, **SMALL}})
    with pytest.raises(UserError, match=r"data\.validation_fraction 0: nothing is held out.*val/ beside train/"):
        make_plan(config, Tracker(terminal()))
    shutil.copytree(root / "test", root / "val")
    assert len(make_plan(config, Tracker(terminal())).splits.validation) == 8


def test_classes_that_another_split_lacks_are_named_and_keep_their_numbers(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 4, 4, splits=("train", "test", "val"))
    for path in (root / "test" / "class_001").iterdir():
        path.unlink()
    shutil.rmtree(root / "val" / "class_002")
    splits = opened(root)
    assert splits.open_test().labels.unique().tolist() == [0, 2, 3]
    assert splits.validation.labels.unique().tolist() == [0, 1, 3]
    assert splits.warnings == [
        f"{root}/{split}: no images of 1 of the 4 classes: {lacking}; put images there, or the accuracy says nothing about "
        "them" for split, lacking in (("test", "class_001"), ("val", "class_002"))]
    (root / "test" / "class_001").rename(root / "test" / "new")  # empty: no image is of an unknown class
    assert len(opened(root).open_test()) == 12
    (root / "test" / "class_003").rename(root / "test" / "newer")
    with pytest.raises(UserError, match=r"test: 1 of its classes are not in .*train: newer; 2 of those in train have no "
                                        "images here: class_001, class_003"):
        opened(root)


def test_a_class_without_training_images_is_named_with_what_it_holds(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 2, 4)
    (root / "train" / "class_new").mkdir()
    (root / "train" / "class_new" / "0.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"class_new: the class has no images .*put images there, or remove the folder; "
                                        r".*left out: \.heic \(1\)"):
        opened(root)


# --------------------------------------------------------------------------------------------------------- structure


def only_classes(root: Path) -> None:
    for folder in (root / "test").iterdir():
        folder.rename(root / folder.name)
    shutil.rmtree(root / "test")
    shutil.rmtree(root / "train")


def nest(root: Path) -> None:
    for folder in (root / "train", root / "test"):
        folder.rename(root / "moved")
        folder.mkdir()
        (root / "moved").rename(folder / "images")


def deepen(root: Path) -> None:
    root.rename(root.parent / "deeper")
    root.mkdir()
    (root.parent / "deeper").rename(root / "deeper")


def unsort(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train" / "0.png").write_bytes(b"")


@pytest.mark.parametrize(("change", "below", "said"), [
    (lambda root: (only_classes(root), shutil.copytree(root / "class_000", root / "more" / "class_000")), "",
     r"found 4 folders with 16 images in it \(class_000, class_001, class_002, more\); if these are the classes, pass "
     r"data\.name=flat_folder, or move them into .*/train, and images for testing into .*/test"),
    (lambda root: None, "train", r"this is a split itself; pass data\.root=.*set$"),
    (deepen, "", r"found .*/set/deeper/train; pass data\.root=.*/set/deeper"),
    (lambda root: (root / "train").rename(root / "Training set"), "", r"found .*/Training set; rename it to .*/train"),
    (lambda root: shutil.rmtree(root), "", "there is no such folder"),
    (lambda root: (shutil.rmtree(root), root.write_text("")), "", "is a file"),
    (lambda root: (shutil.rmtree(root), root.mkdir()), "", "found no folders"),
    (lambda root: (shutil.rmtree(root), root.mkdir(), (root / "data.arrow").write_text("")), "",
     r"found .*data\.arrow; write the set of `datasets` as Parquet files"),
    (nest, "", r"train: one class only, 'images'; expected two or more; if the 3 folders in it are \(class_000"),
    (unsort, "", r"train: no class folders in it, 1 images directly in it; expected .*/train/<class>/<image>"),
], ids=["classes alone", "a split", "one deeper", "other name", "missing", "file", "empty", "arrow", "one class",
        "no classes"])
def test_other_structures_are_told_as_they_are(change: Callable[[Path], object], below: str, said: str,
                                               tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "set", 3, 4)
    change(root)
    with pytest.raises(UserError, match=said) as caught:
        opened(root / below)
    assert "\n" not in str(caught.value)


def test_folders_within_the_classes_are_said_to_be_no_classes(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "set", 4, 3)
    for split in ("train", "test"):
        for number, name in enumerate(("animals", "animals", "vehicles", "vehicles")):
            (root / split / name).mkdir(exist_ok=True)
            (root / split / f"class_{number:03d}").rename(root / split / name / f"class_{number:03d}")
    splits = opened(root)
    assert splits.card.class_names == ["animals", "vehicles"]
    assert splits.warnings == [f"{root}/train: the classes are its 2 folders (animals, vehicles), not the 4 folders in "
                               "these (class_000, class_001, class_002, class_003)"]
    assert torch.equal(splits.open_test().labels, torch.tensor([0] * 6 + [1] * 6))
