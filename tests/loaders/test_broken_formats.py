"""What is hostile or broken in a table, a tar or a Parquet file: one line that says what, where, and what to do."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loaders.catalog import load
from loaders.images import decode_image
from loaders.request import Request
from loaders.splits import Splits
from metadata.errors import UserError
from metadata.schemas import Preprocessing
from tests.helpers.folders import draw_folder
from tests.helpers.formats import FORMATS, add_member, write_csv, write_flat, write_parquet, write_webdataset


def opened(root: Path, name: str = "image_folder", **changes: Any) -> Splits:
    return load(Request(name=name, root=root, preprocessing={"resize": 12, "crop": 12}, **changes))


def assert_refused(said: str, root: Path, name: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=said) as caught:
        opened(root, name, **changes)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(draw_folder(tmp_path_factory.mktemp("table") / "folder", 2, 6),
                     tmp_path_factory.mktemp("table") / "set")


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_webdataset(draw_folder(tmp_path_factory.mktemp("tars") / "folder", 2, 6),
                            tmp_path_factory.mktemp("tars") / "set")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pyarrow")
    return write_parquet(draw_folder(tmp_path_factory.mktemp("tables") / "folder", 2, 3),
                         tmp_path_factory.mktemp("tables") / "set")


def plus(row: str) -> Callable[[str], bytes]:
    return lambda text: (text + row + "\n").encode()


def instead(old: str, new: str, count: int = -1) -> Callable[[str], bytes]:
    return lambda text: text.replace(old, new, count).encode()


CSV: dict[str, tuple[Callable[[str], bytes], str]] = {
    "missing file": (plus("images/no.png,class_000,train"),
                     r"labels\.csv:26: .*no\.png: there is no such file \(1 of 25 .*data\.skip_unreadable=true"),
    "out by dots": (plus("../../x.png,class_000,train"), r"labels\.csv:26: .*leads out of"),
    "absolute": (plus("/etc/passwd,class_000,train"), r"labels\.csv:26: .*leads out of .* to /etc"),
    "no label": (plus("images/0.png,,train"), r"labels\.csv:26: images/0\.png has no label"),
    "no path": (plus(",class_000,train"), r"labels\.csv:26: no path; fill it in"),
    "two splits": (plus("images/0.png,class_000,train"),
                   r"csv:26: images/0\.png has the split 'train', in .*csv:2 'test'; keep"),
    "two labels": (plus("./images/0.png,class_001,test"), r"csv:26: ./images/0\.png has the label 'class_001', in .*csv:2 "
                   "'class_000'; keep one"),
    "latin": (lambda text: text.replace("class_000", "caf\xe9").encode("latin-1"),
              "csv:2: expected UTF-8, got the byte 0xe9"),
    "utf-16": (lambda text: text.encode("utf-16"), r"labels\.csv:1: expected UTF-8, got the byte 0xff"),
    "zero bytes": (instead("class_001", "a\0b", 1), r"labels\.csv:\d+: a zero byte"),
    "open quote": (plus('"images/0.png,class_000,train'), r"not a row of a CSV: .*check the quotes"),
    "a column more": (plus("images/0.png,a,b,c"), r"labels\.csv:26: 4 columns, the first row has 3"),
    "case": (instead("class_001", "Class_000", 1), r"'Class_000' and 'class_000' differ in case"),
    "out of the folder": (instead("class_001", "../../up"),
                          r"class name '\.\.-\.\.-up' cannot be the name of a folder"),
    "hidden": (instead("class_001", ".git"), "cannot be the name of a folder"),
    "long": (instead("class_001", "x" * 300), "cannot be the name of a folder"),
    "unknown split": (instead(",train", ",fit", 1), r"the split 'fit': expected test, testing"),
    "negative": (lambda text: text.replace("class_001", "-1").replace("class_000", "0").encode(), "-1 is out of range"),
    "one number twice": (lambda text: text.replace("class_001", "07").replace("class_000", "7").encode(), "are one number"),
    "one class": (instead("class_001", "class_000"), r"one class only, 'class_000'"),
    "class of the test split": (instead("class_000,test", "new,test", 1), r"classes have no training images: new"),
    "empty": (lambda text: b"", "the table is empty"),
    "header alone": (lambda text: b"file,label\n", "no rows behind the header"),
    "no labels": (lambda text: "\n".join(line.partition(",")[0] for line in text.splitlines()).encode(),
                  r"which column holds the labels\? \(file\); pass data\.columns"),
    "no paths": (lambda text: b"number,label\n1,cat\n2,dog\n", "no column holds paths of images"),
}


@pytest.mark.parametrize("case", CSV)
def test_broken_tables(case: str, table: Path, tmp_path: Path) -> None:
    change, said = CSV[case]
    root = Path(shutil.copytree(table, tmp_path / "set"))
    (root / "labels.csv").write_bytes(change((root / "labels.csv").read_text()))
    assert_refused(said, root, "csv")


def test_tables_as_people_write_them(table: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(table, tmp_path / "set"))
    path = root / "labels.csv"
    text = path.read_text()
    expected = opened(root).card.content
    lines = text.splitlines()
    variants = {
        "byte order mark, CRLF": b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        "semicolons": text.replace(",", ";").encode(), "tabs": text.replace(",", "\t").encode(),
        "quotes": "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in lines).encode(),
        "no header": "\n".join(lines[1:]).encode(), "blank lines": text.replace("\n", "\n\n").encode(),
        "backslashes": text.replace("images/", "images\\").encode(), "no end": text.rstrip().encode(),
        "another order of columns": "\n".join(",".join(reversed(line.split(","))) for line in lines).encode(),
        "spaces": text.replace(",", " , ").encode(),
        "other words": text.replace("file,label,split", "Image Path,Species,Set").encode(),
        "no suffixes": text.replace(".png", "").encode(),
        "twice": (text + lines[1] + "\n").encode()}
    for what, content in variants.items():
        path.write_bytes(content)
        splits = opened(root)
        assert splits.card.content == expected, what
        assert any("name an image again" in text for text in splits.warnings) == (what == "twice")
    path.write_text(text.replace("class_000", "10").replace("class_001", "9"))
    assert opened(root).card.class_names == ["9", "10"]  # by value
    path.write_text(text.replace("class_000", '"a/b, c"'))
    assert opened(root).card.class_names == ["a-b, c", "class_001"]
    path.write_text(text + "images/no.png,class_000,train\n")
    said = "\n".join(opened(root, skip_unreadable=True).warnings)
    assert "1 of 25 images are missing and were left out" in said
    outside = tmp_path / "outside.png"
    outside.write_bytes((root / "images" / "0.png").read_bytes())
    (root / "images" / "link.png").symlink_to(outside)
    path.write_text(text + "images/link.png,class_000,train\n")
    assert_refused(r"link\.png' leads out of .* to .*outside\.png; pass data\.image_root=DIR", root, "csv")


def members(*entries: tuple[str, bytes, dict[str, Any]]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for name, content, changes in entries:
                add_member(tar, name, content, **changes)
    return write


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def compress(path: Path) -> None:
    content = path.parent / "plain"
    path.rename(content)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(content, "x")
    content.unlink()


def claim(path: Path) -> None:
    """A header that claims a member of eight gigabytes."""
    member = tarfile.TarInfo("0.png")
    member.size = 2**33
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


PICTURE = ("0.png", b"x", {})
TARS: dict[str, tuple[Callable[[Path], None], str]] = {
    "absolute": (members(("/etc/0.png", b"x", {})), r"'/etc/0\.png': a path that leads out of the tar"),
    "dots": (members(("a/../../0.png", b"x", {})), "a path that leads out of the tar"),
    "link": (members(("0.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})),
             r"'0\.png': a link, expected files"),
    "hard link": (members(PICTURE, ("1.png", b"", {"type": tarfile.LNKTYPE, "linkname": "0.png"})),
                  "a link, expected files"),
    "device": (members(("0.png", b"", {"type": tarfile.CHRTYPE})), "a special file"),
    "no label": (members(PICTURE), r"0: expected one picture and a label \(\.cls, \.json, \.txt\), got \.png"),
    "no picture": (members(("0.cls", b"1", {})), r"0: expected one picture and a label .*, got \.cls"),
    "two pictures": (members(PICTURE, ("0.jpg", b"x", {}), ("0.cls", b"1", {})), r"got \.cls, \.jpg, \.png"),
    "a name twice": (members(PICTURE, PICTURE, ("0.cls", b"1", {})), "the tar has two members of this name"),
    "json without": (members(PICTURE, ("0.json", b'{"caption": "a cat"}', {})),
                     r"0\.json: expected a number or a name under one of"),
    "damaged json": (members(PICTURE, ("0.json", b'{"label"', {})), r"0\.json: not a label"),
    "deep json": (members(PICTURE, ("0.json", b"[" * 100_000, {})), r"0\.json: not a label"),
    "no text": (members(PICTURE, ("0.cls", b"\xff\xfe", {})), r"0\.cls: not a label"),
    "empty label": (members(PICTURE, ("0.cls", b" ", {})), r"0\.cls: expected a number or a name, got ''"),
    "long label": (members(PICTURE, ("0.cls", b"x" * 2**21, {})), r"a label of 2,097,152 bytes"),
    "negative": (members(PICTURE, ("0.cls", b"-1", {}), ("1.png", b"x", {}), ("1.cls", b"0", {})), "-1 is out of range"),
    "empty": (members(), "the tar is empty"),
    "no tar": (lambda path: path.write_text("no tar") and None, "not a readable tar"),
    "cut short": (cut, "cut short|not a readable tar"),
    "compressed": (compress, "unpack it with gunzip"),
    "huge": (claim, r"8,589,934,592 bytes are over the limit"),
}


@pytest.mark.parametrize("case", TARS)
def test_broken_tars(case: str, tars: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tars, tmp_path / "set"))
    change, said = TARS[case]
    for path in root.glob("*.tar"):
        change(path)
    assert_refused(said, root, "webdataset")


def test_tars_whose_names_are_of_no_split_are_refused_beside_others(tmp_path: Path) -> None:
    root = write_webdataset(draw_folder(tmp_path / "folder", 2, 6), tmp_path / "set")
    shutil.copy(root / "train-0000.tar", root / "more.tar")
    assert_refused(r"more\.tar: its name says no split", root, "webdataset")
    assert_refused("expected tars in it.*there are none", tmp_path / "folder", "webdataset")
    for path in root.glob("*.tar"):
        path.rename(path.with_name(path.name.replace("train", "test").replace("more", "test-9")))
    assert_refused("no tar of the split train", root, "webdataset")


def parquet_file(path: Path, images: list[Any], labels: list[Any], features: Any = None, **columns: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"image": images, "label": labels, **columns})
    if features is not None:
        text = features if isinstance(features, str) else json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    parquet.write_table(table, path)


NAMES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
CELL = {"bytes": b"x", "path": "a.png"}
PARQUET: dict[str, tuple[Callable[[Path], object], str]] = {
    "label above": (lambda path: parquet_file(path, [CELL] * 2, [0, 2], NAMES),
                    "row 1: the label in label is 2, expected 0 to 1"),
    "label below": (lambda path: parquet_file(path, [CELL] * 2, [0, -1], NAMES), "is -1, expected 0 to 1; -1 marks"),
    "no label": (lambda path: parquet_file(path, [CELL] * 2, [0, None], NAMES), "is None, expected 0 to 1"),
    "no picture": (lambda path: parquet_file(path, [CELL, None], [0, 1], NAMES), "row 1: the cell holds no picture"),
    "a path alone": (lambda path: parquet_file(path, [{"bytes": None, "path": "a.png"}] * 2, [0, 1], NAMES),
                     r"row 0: the cell holds no picture, only the path a\.png"),
    "no column": (lambda path: parquet_file(path, ["a"] * 2, [0, 1]), "which columns hold images and labels"),
    "two images": (lambda path: parquet_file(path, [CELL] * 2, [0, 1], None, other=[CELL] * 2),
                   "which columns hold images and labels"),
    "labels are fractions": (lambda path: parquet_file(path, [CELL] * 2, [0.5, 1.5]), "the labels in label are double"),
    "names twice": (lambda path: parquet_file(path, [CELL] * 2, [0, 1], NAMES | {
        "label": {"_type": "ClassLabel", "names": ["cat", "cat"]}}), "'cat' stands for two labels"),
    "names of another kind": (lambda path: parquet_file(path, [CELL] * 2, [0, 1], NAMES | {
        "label": {"_type": "ClassLabel", "names": {"a": 1}}}), "expected a list of class names"),
    "damaged features": (lambda path: parquet_file(path, [CELL] * 2, [0, 1], "{"),
                         "the features in its schema are damaged"),
    "features that are no mapping": (lambda path: parquet_file(path, [CELL] * 2, [0, 1], "[]"),
                                     "features in its schema are damaged"),
    "no rows": (lambda path: parquet_file(path, [CELL][:0], [0][:0], NAMES), "0 rows|which columns"),
    "no parquet": (lambda path: path.write_text("PAR1 no parquet PAR1"), "not a readable Parquet file"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:200]), "not a readable Parquet file"),
    "damaged data": (lambda path: path.write_bytes(path.read_bytes()[:40] + b"\xff" * 60 + path.read_bytes()[100:]),
                     "damaged behind row|not a readable image|no picture"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_broken_parquet_files(case: str, tables: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tables, tmp_path / "set"))
    change, said = PARQUET[case]
    for path in root.glob("data/*"):
        change(path)
    assert_refused(said, root, "parquet")


def test_parquet_needs_its_package_and_one_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    root.mkdir()
    (root / "train.parquet").write_bytes(b"")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_refused(r"pyarrow is not installed; pip install pyarrow, or pip install -e \.\[datasets\]", root, "parquet")


@pytest.mark.parametrize("text", ["---\ndataset_info: {features: [{name: label, dtype: {class_label: {names: {a: b}}}}]}",
                                  "---\na: &a [*a]\n---\n", "---\n[\n---\n", "---\ndataset_info: {features: [1]}\n---\n"])
def test_a_damaged_card_of_a_parquet_set(text: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    root = write_parquet(draw_folder(tmp_path / "folder", 2, 6), tmp_path / "set", "card")
    (root / "README.md").write_text(text)
    assert_refused(r"README\.md: the features in its YAML are damaged", root, "parquet")
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    assert opened(root).card.class_names == ["0", "1"]


@pytest.mark.parametrize("name", FORMATS)
def test_pictures_of_all_kinds_and_broken_ones(name: str, tmp_path: Path) -> None:
    """Grey, 16 bits, turned by EXIF, damaged, and with more pixels than anybody has."""
    if name == "parquet":
        pytest.importorskip("pyarrow")
    folder = draw_folder(tmp_path / "folder", 2, 6)
    place = folder / "train" / "class_000"
    shades = np.arange(144, dtype=np.uint16).reshape(12, 12)
    Image.fromarray(shades.astype(np.uint8)).save(place / "0.png")
    Image.fromarray(shades * 257).save(place / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(shades.astype(np.uint8)).save(place / "2.png", exif=exif)
    splits = opened(FORMATS[name](folder, tmp_path / "set"), name, channels=1)
    assert splits.card.input_shape == (1, 12, 12)
    parts = (splits.train, splits.validation, splits.open_test())
    pixels = [image.numpy().tobytes() for part in parts for image in part.images.batch(torch.arange(len(part)))]
    grey = Preprocessing(mode="L", resize=12, crop=12, mean=[0.5], std=[0.5])
    for number in range(3):
        assert decode_image(place / f"{number}.png", grey).tobytes() in pixels
    broken = folder / "test" / "class_001" / "1.png"
    for content in (b"no picture", broken.read_bytes()[:120], bomb(tmp_path / "bomb.png")):
        broken.write_bytes(content)
        root = FORMATS[name](folder, tmp_path / f"broken {len(content)}")
        assert_refused("not a readable image, or cut short: (?!.*BytesIO)", root, name)
        skipped = opened(root, name, skip_unreadable=True)
        assert any("1 unreadable images were skipped" in text for text in skipped.warnings)


def bomb(path: Path) -> bytes:
    """A PNG of some hundred bytes whose header claims 40,000 x 40,000 pixels."""
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 40_000, 40_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def test_flat_folders_that_are_broken(tmp_path: Path) -> None:
    root = write_flat(draw_folder(tmp_path / "folder", 2, 6), tmp_path / "set")
    (root / "empty").mkdir()
    assert_refused(r"1 of 3 classes have no training images: empty", root, "image_folder")
    (root / "empty").rmdir()
    shutil.copytree(root / "class_000", root / "Class_000")
    assert_refused("'Class_000' and 'class_000' differ in case or spelling alone", root, "image_folder")
    shutil.rmtree(root / "Class_000")
    for name in ("test_fraction", "validation_fraction"):
        assert_refused(rf"data\.{name} 1.5: expected a fraction", root, "flat_folder", **{name: 1.5})
    assert_refused(r"there is no such data folder", tmp_path / "none", "flat_folder")
    for name in ("csv", "flat_folder", "parquet", "tiny_imagenet", "webdataset"):
        with pytest.raises(UserError, match=r"data\.root is not set"):
            load(Request(name=name))
