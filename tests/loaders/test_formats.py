"""Each format gives the images of the folder that it was made of; what it is taken for is said, or asked where unsure."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.evaluation.pictures import list_test_data
from loaders.arrays import FileImages
from loaders.catalog import load
from loaders.content import content_changes
from loaders.images import decode_image
from loaders.listing import list_images
from loaders.packed import Packed, Spool
from loaders.request import Request
from loaders.splits import Split, Splits, write_image_folder
from metadata.errors import UserError
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.folders import draw_folder
from tests.helpers.formats import (
    FORMATS, renamed, write_csv, write_flat, write_parquet, write_tiny_imagenet, write_webdataset)

SIZE = {"resize": 12, "crop": 12}


def opened(root: Path, name: str = "image_folder", **changes: object) -> Splits:
    return load(Request(name=name, root=root, preprocessing=SIZE, **changes))  # type: ignore[arg-type]


def images_of(split: Split) -> set[tuple[bytes, int]]:
    pixels = split.images.batch(torch.arange(len(split)))
    return {(image.numpy().tobytes(), label) for image, label in zip(pixels, split.labels.tolist(), strict=True)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "folder", 3, 8)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognized_and_holds_the_contract(name: str, folder: Path, tmp_path: Path) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    expected = opened(folder)
    root = FORMATS[name](folder, tmp_path / "set")
    splits = opened(root)
    assert splits.card.name == name and f"read as {name}: " in splits.warnings[0]
    assert splits.card.num_classes == 3 and splits.card.class_names == sorted(splits.card.class_names)
    assert set(splits.validation.labels.tolist()) == set(splits.open_test().labels.tolist()) == {0, 1, 2}
    parts = [splits.train, splits.validation, splits.open_test()]
    everything = [images_of(part) for part in parts]
    whole = [images_of(part) for part in (expected.train, expected.validation, expected.open_test())]
    assert everything[0] | everything[1] | everything[2] == whole[0] | whole[1] | whole[2]
    assert everything[0].isdisjoint(everything[1]) and everything[2].isdisjoint(everything[0] | everything[1])
    if name != "flat_folder":
        assert everything[2] == whole[2]
    again = opened(root, name)
    assert again.card == splits.card and again.warnings == splits.warnings[1:]
    streamed = opened(root, memory_limit_gb=1e-9)
    assert isinstance(streamed.train.images, FileImages)
    for (one, labels), (other, others) in zip(splits.train.batches(5), streamed.train.batches(5), strict=True):
        assert torch.equal(one, other) and torch.equal(labels, others)
    # What the evaluator reads is the same split, in the same order of classes.
    written = splits.test_folder
    if written is None:
        write_image_folder(parts[2], splits.card.class_names, written := tmp_path / "written")
    data = list_test_data(written)
    assert data.listing.classes == splits.card.class_names
    read = {(decode_image(path, splits.card.preprocessing).tobytes(), int(label))
            for path, label in zip(data.paths, data.labels, strict=True)}
    assert read == everything[2]


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_picture_is_noticed(name: str, folder: Path, tmp_path: Path) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    before = opened(FORMATS[name](folder, tmp_path / "before")).card
    assert opened(FORMATS[name](folder, tmp_path / "same")).card.content == before.content
    changed = folder / "train" / "class_001" / "3.png"
    changed.write_bytes((folder / "train" / "class_001" / "2.png").read_bytes() + b"\0")
    after = opened(FORMATS[name](folder, tmp_path / "after")).card
    assert after.fingerprint != before.fingerprint
    assert any(before.class_names[1] in text for text in content_changes(before.content, after.content))


@pytest.mark.parametrize("stated", ["schema", "card", "labels"])
def test_class_names_of_parquet(stated: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    splits = opened(write_parquet(folder, tmp_path / "set", stated))
    assert splits.card.class_names == ["class_000", "class_001", "class_002"]
    assert images_of(splits.open_test()) == images_of(opened(folder).open_test())


def test_labels_of_webdataset_in_json_and_shards_by_pattern(folder: Path, tmp_path: Path) -> None:
    write_webdataset(folder, tmp_path / "set", "json")
    whole = opened(tmp_path / "set")
    for pattern in ("{train,test}-{0000..0001}.tar", "*-000?.tar"):
        assert opened(tmp_path / "set" / pattern).card.content == whole.card.content
    half = opened(tmp_path / "set" / "train-{0000..0001}.tar")
    with pytest.raises(UserError, match=r"more than 100,000 files"):
        opened(tmp_path / ("{a,b}" * 40 + ".tar"))
    assert "there is no test split" in half.warnings[1] and "of 24 images are held out" in half.warnings[1]
    with pytest.raises(UserError, match=r"there is no file .*train-0002\.tar"):
        opened(tmp_path / "set" / "{train,test}-{0000..0002}.tar")
    with pytest.raises(UserError, match="counts 1000000000 files"):
        opened(tmp_path / "set" / "train-{0..999999999}.tar")


@pytest.mark.parametrize("spelled", [("Training", "Testing", None), ("TRAIN", "Test", "Valid"),
                                     ("train", "testing", "val")])
def test_splits_are_read_as_people_spell_them(spelled: tuple[str, str, str | None], tmp_path: Path) -> None:
    parts = ("train", "test", "val") if spelled[2] else ("train", "test")
    root = draw_folder(tmp_path / "set", 2, 6, splits=parts)
    expected = opened(root).card
    renamed(root, [(old, f"{new}_") for old, new in zip(parts, spelled, strict=False)])
    renamed(root, [(f"{new}_", str(new)) for new in spelled if new])
    splits = opened(root)
    assert splits.card.content == expected.content
    assert splits.test_folder == root / spelled[1]
    assert f"{spelled[1]} for test" in splits.warnings[0]
    with pytest.raises(UserError, match="its folders are splits"):
        list_images(root)
    (root / "tEsT").mkdir()
    if spelled[1] == "testing":
        with pytest.raises(UserError, match="tEsT and testing may both be the test split"):
            opened(root)


def test_a_second_folder_of_a_split_is_said(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "set", 2, 6, splits=("train", "test"))
    assert not opened(root).warnings
    draw_folder(tmp_path / "more", 2, 6, splits=("train", "test"))
    (tmp_path / "more" / "train").rename(root / "Training")
    assert opened(root).warnings[0].startswith(f"data.root {root}: left out: Training, beside train, test")


def test_what_may_be_two_formats_is_asked(folder: Path, tmp_path: Path) -> None:
    root = write_flat(folder, tmp_path / "set")
    lines = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.glob("*/*"))]
    (root / "labels.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"may be read as csv \(.*\) or as flat_folder \(.*\); pass data\.name=csv or"):
        opened(root)
    assert opened(root, "csv").card.content == opened(root, "flat_folder").card.content
    splits = root.rename(tmp_path / "other")  # beside folders of splits, a table is not asked about
    assert opened(splits, "csv").card.num_classes == 3
    (folder / "labels.csv").write_text("a.png,b\n")
    assert opened(folder).card.name == "image_folder" and not opened(folder).warnings


def test_tiny_imagenet_is_read_as_it_is_distributed(folder: Path, tmp_path: Path) -> None:
    root = write_tiny_imagenet(folder, tmp_path / "set")
    splits = load(Request(name="image_folder", root=root))
    assert splits.card.input_shape == (3, 64, 64) and splits.test_folder == root / "val"
    assert splits.card.class_names == ["n00000000", "n00000001", "n00000002"]
    assert splits.warnings == [f"data.root {root}: read as tiny_imagenet: val/val_annotations.txt has the classes of the "
                               "test split; the first class is n00000000, goldfish"]
    annotations = root / "val" / "val_annotations.txt"
    text = annotations.read_text()
    for wrong, said in (("../x.JPEG\tn00000000", "expected the name of one image"), ("x.JPEG\tn00000000", "are not in"),
                        ("x.JPEG n00000000", "a tab and its class"), (text.splitlines()[0], "once"),
                        ("", None), ("x.JPEG\tn00000009", "are not in")):
        annotations.write_text(text + wrong)
        if said:
            with pytest.raises(UserError, match=said) as caught:
                load(Request(name="tiny_imagenet", root=root))
            assert "\n" not in str(caught.value)
    annotations.write_text(text)
    (root / "wnids.txt").write_text("n00000000\nn00000001")
    with pytest.raises(UserError, match=r"2 classes, 3 folders in .*not in both: n00000002"):
        load(Request(name="tiny_imagenet", root=root))


def test_pictures_in_other_files_survive_a_process_border_and_a_change(folder: Path, tmp_path: Path) -> None:
    root = write_webdataset(folder, tmp_path / "set")
    splits = opened(root, memory_limit_gb=1e-9)
    picture = (splits.train.paths or [])[0]
    assert isinstance(picture, Packed) and picture.suffix == ".png" and pickle.loads(pickle.dumps(picture)) == picture
    with picture.file.open("r+b") as file:
        file.truncate(picture.offset + 5)
    with pytest.raises(UserError, match=r"000\d+\.png: .* bytes expected, 5 found"):
        picture.read()
    spool = Spool(10)
    assert spool.read(spool.add(b"abc"), 3) == b"abc" and spool.read(spool.add(b"de"), 2) == b"de"
    with pytest.raises(UserError, match="set TMPDIR"):
        Spool(2**60)


def test_columns_and_root_of_a_table(folder: Path, tmp_path: Path) -> None:
    root = write_csv(folder, tmp_path / "set")
    expected = opened(root).card.content
    moved = (root / "labels.csv").rename(tmp_path / "labels.csv")
    with pytest.raises(UserError, match=r"labels\.csv:2: .* no such file \(48 of 48 .*data\.image_root=DIR"):
        opened(moved)
    assert opened(moved, image_root=root).card.content == expected
    for columns in (["file", "label", "split"], ["1", "2", "3"]):
        assert opened(moved, image_root=root, columns=columns).card.content == expected
    with pytest.raises(UserError, match=r"no column 'lable'; did you mean 'label'\?"):
        opened(moved, image_root=root, columns=["file", "lable"])
    request = Request(name="csv", root=moved, image_root=root, preprocessing=SIZE)
    assert load(replace(request, test_fraction=0.5, columns=["file", "label"])).card.content != expected


def test_a_class_without_test_images_is_named_and_a_validation_split_alone_is_the_test_split(folder: Path,
                                                                                               tmp_path: Path) -> None:
    for path in (folder / "test" / "class_002").iterdir():
        path.unlink()
    table = write_csv(folder, tmp_path / "set") / "labels.csv"
    for split in ("test", "val"):
        table.write_text(table.read_text().replace(",test", f",{split}"))
        splits = opened(table.parent)
        assert any("no test images of 1 of the 3 classes: class_002" in text for text in splits.warnings)
        assert set(splits.open_test().labels.tolist()) == {0, 1} and len(splits.validation)


def test_the_commands_take_the_formats(folder: Path, tmp_path: Path, compress: Compress) -> None:
    """`export_data` writes the split that a pipeline tests on; `train` and a recipe name their own settings."""
    root = write_flat(folder, tmp_path / "set")
    expected = images_of(load(Request(name="flat_folder", root=root, test_fraction=0.4)).open_test())
    done = compress("export_data", "image_folder", "--root", root, "--test_fraction", "0.4", "--out", tmp_path / "test")
    assert done.returncode == 0 and "3 folders of pictures are the classes" in " ".join(done.stdout.split())
    listing = list_images(tmp_path / "test")
    settings = load(Request(name="flat_folder", root=root)).card.preprocessing
    assert {(decode_image(path, settings).tobytes(), label) for path, label in listing.images} == expected
    (write_csv(folder, tmp_path / "table") / "labels.csv").rename(tmp_path / "a.csv")
    for command, where in ((["train", "--dataset", "csv", "--data_root", tmp_path / "a.csv", "--log_dir", tmp_path / "log"],
                            "pass --image_root DIR for another, or --skip_unreadable"),
                           (["plan", "slim_resnet18_digits", "data.name=csv", f"data.root={tmp_path / 'a.csv'}"],
                            "pass data.image_root=DIR for another, or data.skip_unreadable=true")):
        assert_one_line_error(compress(*command), "48 of 48 images are missing", where)
    assert_one_line_error(compress("plan", "slim_resnet18_digits", "data.test_fraction=1"), "test_fraction", "less than 1")


def test_the_evaluator_says_how_to_get_a_folder(folder: Path, tmp_path: Path) -> None:
    write_webdataset(folder, tmp_path / "tars")
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "test.parquet").write_bytes(b"")
    for root in (tmp_path / "tars", tmp_path / "tars" / "test-0000.tar", tmp_path / "set"):
        with pytest.raises(UserError, match=r"compress export_data` writes the test split of a CSV, of tars or of Parquet"):
            list_test_data(root)
