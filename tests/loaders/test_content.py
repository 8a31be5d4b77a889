"""The content of a data set: what changes its hashes, what does not, and what is read again."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies

from loaders.catalog import load
from loaders.content import Content, array_content, content_changes, read_hashes, write_hashes
from loaders.request import Request
from tests.helpers.folders import draw_folder


@pytest.fixture
def request_of(tmp_path: Path) -> Request:
    root = draw_folder(tmp_path / "set", 2, 5, splits=("train", "val", "test"))
    return Request(name="image_folder", root=root, preprocessing={"resize": 12, "crop": 12})


def content(request: Request) -> Content:
    return load(replace(request, hashes=read_hashes(request.root or Path()))).card.content  # that of no earlier start


def test_files_count_by_their_bytes_and_order(request_of: Request, tmp_path: Path) -> None:
    before = content(request_of)
    assert list(before) == ["train", "validation", "test"]
    assert all(list(classes) == ["class_000", "class_001"] for classes in before.values())
    assert all(text.startswith("5 images ") for classes in before.values() for text in classes.values())
    copied = Path(shutil.copytree(request_of.root or Path(), tmp_path / "copied"))
    (copied / "val").rename(copied / "valid")
    for path in (copied / "train" / "class_000").iterdir():
        path.rename(path.with_name(f"renamed_{path.name}"))
        os.utime(path.with_name(f"renamed_{path.name}"), (1, 1))
    again = replace(request_of, root=copied, memory_limit_gb=1e-9, validation_fraction=0.5, seed=3)
    assert content(again) == before
    one, other = (copied / "train" / "class_000" / f"renamed_{number}.png" for number in (1, 2))
    one.rename(copied / "swap")
    other.rename(one)
    (copied / "swap").rename(other)
    assert content_changes(before, content(again)) == ["other images in train (class_000)"]
    one.rename(copied / "train" / "class_001" / "a.png")
    (copied / "test" / "class_001" / "0.png").write_bytes(other.read_bytes())
    assert content_changes(before, content(again)) == ["other images in train (class_000, class_001)",
                                                       "other images in test (class_001)"]
    (copied / "valid" / "class_001" / "0.png").unlink()
    assert "1 image fewer in validation (class_001)" in content_changes(before, content(again))


def test_images_that_are_left_out_count_as_left_out(request_of: Request) -> None:
    """They decide which others are held out, so that one that is removed later makes another split."""
    damaged = (request_of.root or Path()) / "train" / "class_001" / "2.png"
    whole = content(replace(request_of, skip_unreadable=True))
    assert whole == content(request_of)  # nothing to skip
    damaged.write_bytes(b"no image")
    skipped = content(replace(request_of, skip_unreadable=True))
    assert skipped["train"]["class_001"].startswith("4 images ")
    damaged.unlink()
    assert content_changes(skipped, content(request_of)) == ["other images in train (class_001)"]


def test_the_second_start_reads_only_what_may_have_changed(request_of: Request, tmp_path: Path) -> None:
    hashes = read_hashes(tmp_path)
    first = load(replace(request_of, hashes=hashes)).card.content
    assert hashes.changed
    write_hashes(tmp_path, hashes)
    again = read_hashes(tmp_path)
    assert again.known == {key: tuple(value) for key, value in hashes.known.items()}
    again.known["test/class_000"] = again.known["test/class_000"][0], "known"  # what is known is not read
    assert load(replace(request_of, hashes=again)).card.content["test"]["class_000"] == "5 images known"
    assert not again.changed
    image = (request_of.root or Path()) / "train" / "class_000" / "0.png"
    stat, data = image.stat(), image.read_bytes()
    image.write_bytes(data[:-1] + b"?")  # the same size, inode and time of writing, other bytes
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    known = read_hashes(tmp_path)
    assert content_changes(first, load(replace(request_of, hashes=known)).card.content) == [
        "other images in train (class_000)"]
    assert known.changed
    (tmp_path / ".hashes.json").write_text("[1]")
    assert read_hashes(tmp_path).known == {}


def test_arrays_count_by_pixels_labels_and_order() -> None:
    pixels = torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, names = torch.tensor([0, 1, 0, 1, 0, 0]), ["a", "b", "none"]
    before = array_content(names, {"train": (pixels, labels)})
    assert before["train"]["none"].startswith("0 images ") and before["train"]["a"].startswith("4 images ")
    other = pixels.clone()
    other[1, 0, 0, 0] ^= 1
    order = torch.tensor([0, 2, 1, 3, 4, 5])  # each class has its images in the same order as before
    for changed, where in (((other, labels), "other images in train (b)"),
                           ((pixels, torch.tensor([1, 0, 0, 1, 0, 0])), "other images in train (a, b)"),
                           ((pixels[order], labels[order]), "other images in train (a, b)"),
                           ((pixels[:5], labels[:5]), "1 image fewer in train (a)")):
        assert content_changes(before, array_content(names, {"train": changed})) == [where]
    digits = load(Request(name="digits"))
    assert digits.card.content == load(Request(name="digits", seed=4, image_size=16, channels=1)).card.content
    assert sum(int(text.split()[0]) for text in digits.card.content["test"].values()) == 359


CONTENTS = strategies.dictionaries(strategies.sampled_from(["train", "test"]), strategies.dictionaries(
    strategies.sampled_from("abc"), strategies.builds("{} images {}".format, strategies.integers(0, 9),
                                                      strategies.sampled_from("xy")), min_size=1))


@given(CONTENTS, CONTENTS)
@settings(deadline=None, derandomize=True)
def test_a_change_is_named_exactly_where_there_is_one(before: Content, now: Content) -> None:
    found = content_changes(before, now)
    assert (not found) == (before == now)
    assert len(found) == sum(before.get(split) != now.get(split) for split in before.keys() | now.keys())
