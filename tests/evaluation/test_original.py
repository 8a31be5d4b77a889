"""Folders of the original style: entries that the panel does not read never refuse, and a damaged file gets a true line."""

from __future__ import annotations

import json
import struct
import sys
import time
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from compress.evaluation import panel
from compress.evaluation.class_order import class_order
from compress.evaluation.original import file_kind, takes_no_path
from compress.evaluation.runtime import Runtime
from compress.evaluation.serve import ask
from compress.evaluation.facts import facts_of
from compress.evaluation.submission import read_submission
from loaders.listing import list_images
from metadata.errors import VerificationError
from tests.helpers import panel_folders

IGNORED = "not the name of a weights file in the folder; this is ignored, model.pth was taken"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state dict in model.pth, and metadata that say so."""
    folder = tmp_path / "folder"
    panel_folders.write(folder)
    torch.save({"w": torch.ones(2)}, folder / "model.pth")
    return folder


def state(folder: Path, **entries: Any) -> Path:
    (folder / "metadata.json").write_text(json.dumps({"model_format": "pytorch"} | entries))
    return folder


# ------------------------------------------------------------------------------------------------------ damaged files


def overwrite(path: Path, before: bytes, after: bytes) -> None:
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))


def encrypt(path: Path) -> None:
    """Set the flag of an encrypted member in both of its headers."""
    content = bytearray(path.read_bytes())
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.index(magic) + place
        content[start:start + 2] = struct.pack("<H", struct.unpack("<H", content[start:start + 2])[0] | 1)
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Any, str]] = {
    "half of it": (lambda path: path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2]), "the file is cut short"),
    "a member's header": (lambda path: overwrite(path, b"PK\x03\x04", b"PK\x03\x05"),
                          "header of member .*data.pkl.* is not what the directory says"),
    "the directory": (lambda path: overwrite(path, b"PK\x01\x02", b"PK\x01\x03"), "directory is damaged"),
    "the pickle": (lambda path: overwrite(path, b"_rebuild_tensor", b"_rebuilt_tensor"), "Bad CRC-32"),
    "a password": (encrypt, "is encrypted"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_told_in_one_line(damage: str, folder: Path) -> None:
    change, said = DAMAGE[damage]
    change(folder / "model.pth")
    with pytest.raises(VerificationError, match=said) as caught:
        read_submission(folder)
    assert str(caught.value).startswith(f"{folder / 'model.pth'}: ") and "\n" not in str(caught.value)


def test_a_file_without_its_end_is_told_by_the_standard_way_too(folder: Path) -> None:
    torch.save({f"layer{index}": torch.ones(9999) for index in range(9)}, folder / "model.pth")
    whole = (folder / "model.pth").read_bytes()
    for content in (whole[:len(whole) // 2], whole[:len(whole) - 90], b"hello" * 99):
        (folder / "model.pth").write_bytes(content)
        with pytest.raises(panel.LoadingError, match=r"model\.pth is (cut short or|not what torch\.save writes)"):
            panel.by_standard(folder, {"weights": "model.pth"})
    assert file_kind(folder / "model.pth") == ("unknown", "")


# ----------------------------------------------------------------------------------- entries that the panel ignores


@pytest.mark.parametrize(("entries", "said"), [
    ({"weights": "IMAGENET1K_V1"}, f"weights 'IMAGENET1K_V1': {IGNORED}"),
    ({"checkpoint": 90}, f"checkpoint '90': {IGNORED}"),
    ({"weights": {"dtype": "int8"}}, IGNORED), ({"weights": "model"}, "weights 'model' was taken to be model.pth"),
    ({"model_path": "submission/model.pth"}, "'submission/model.pth' was taken to be model.pth"),
    ({"model_path": "../other.pth"}, IGNORED), ({"weights": "metadata.json"}, IGNORED), ({"weights": "a\u0000b"}, IGNORED),
    ({"weights": "n" * 999}, IGNORED), ({"checkpoint": "model.onnx"}, IGNORED),
    ({"weights": "DEFAULT", "checkpoint": "model.pth"}, f"weights 'DEFAULT': {IGNORED}"),
    ({"architecture_file": "../arch.json"}, "'../arch.json' lies outside the submission; this entry is ignored"),
    ({"framework": "tensorflow"}, None), ({"model_format": None, "framework": "keras"}, None),
    ({"model_format": None, "format": "tflite"}, None),
])
def test_an_entry_that_the_panel_does_not_read_never_refuses(entries: dict[str, Any], said: str | None, folder: Path
                                                             ) -> None:
    (folder.parent / "other.pth").touch()
    (folder / "model.onnx").touch()
    files = read_submission(state(folder, **entries))
    assert files.weights == folder / "model.pth" and files.kind == "code" and files.architecture_path is None
    assert said is None or any(said in note for note in files.notes), files.notes


def test_a_name_of_the_weights_is_tried_as_it_is_given(folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / "model.pth").rename(folder / "weights" / "best.pth")
    for name in ("./weights/best.pth", "weights/best.pth", "weights\\best.pth", "weights/../weights/best",
                 "weights//best.pth"):
        files = read_submission(state(folder, model_path=name))
        assert files.weights == folder / "weights" / "best.pth", name
    torch.save({"w": torch.ones(1)}, folder / "best.pth")
    assert read_submission(state(folder, model_path="./weights/best.pth")).weights.parent.name == "weights"
    assert read_submission(state(folder, model_path="/content/best.pth")).weights == folder / "best.pth"
    with pytest.raises(VerificationError, match="names weights 'V1', which it does not hold, and 2 files end in"):
        read_submission(state(folder, weights="V1"))


@pytest.mark.parametrize(("text", "onnx_there", "kind"), [
    ("PyTorch, also exported to ONNX", False, "code"), ("PyTorch, also exported to ONNX", True, "code"),
    ("timm tf_efficientnet_lite0", False, "code"), ("onnx", True, "onnx"),
])
def test_a_format_that_names_two_kinds(text: str, onnx_there: bool, kind: str, folder: Path) -> None:
    if onnx_there:
        onnx.save(onnx.ModelProto(producer_name="nobody"), folder / "model.onnx")
    assert read_submission(state(folder, model_format=text)).kind == kind
    if text.startswith("PyTorch") and onnx_there:  # it is the author's only file
        (folder / "model.pth").unlink()
        assert read_submission(folder).kind == "onnx"


# ----------------------------------------------------------------------------------------------------------- the sizes


@pytest.mark.parametrize(("stated", "resize", "crop", "said"), [
    ({"resize": 64}, 64, 64, "resize 64 and no crop: the crop was taken to be 64"),
    ({"resize": [64, 64]}, 64, 64, "squeezes a picture to a square"),
    ({"resize": [224, 224]}, 224, 224, "the centre of 224 is cropped"), ({"resize": 256}, 256, 224, "taken to be 224"),
    ({"resize": [256, 256]}, 256, 256, "taken to be 256"), ({"crop": 299}, 299, 299, "the resize was taken to be 299"),
    ({"crop": 200}, 256, 200, "the resize was taken to be 256"),
    ({"resize": 64, "crop": 96}, 256, 224, "a crop of 96 beyond the resize of 64; this entry is ignored"),
    ({"resize": 80, "crop": 64}, 80, 64, None), ({"mean": [0, 0, 0]}, 256, 224, None),
])
def test_a_crop_fits_into_the_resize_and_what_is_filled_in_is_said(stated: dict[str, Any], resize: int, crop: int,
                                                                   said: str | None, folder: Path) -> None:
    files = read_submission(state(folder, preprocessing=stated))
    assert (files.preprocessing.resize, files.preprocessing.crop) == (resize, crop)
    assert files.input_shape == (3, crop, crop)
    assert any(said in note for note in files.notes) if said else files.notes == ()


@pytest.mark.parametrize(("entries", "said"), [
    ({"preprocessing": {"value_range": [0, 1], "gamma": 2.2}}, "gamma"),
    ({"preprocessing": {"mean": [0, 0]}}, "preprocessing"), ({"preprocessing": {"std": [0, 1, 1]}}, "std"),
    ({"preprocessing": {"value_range": [1, 0]}}, "the value_range '[1, 0]', not two numbers, the lower one first"),
    ({"preprocessing": {"interpolation": "magic"}}, "interpolation"), ({"preprocessing": {"crop": -1}}, "crop"),
    ({"preprocessing": [1, 2]}, "preprocessing"), ({"preprocessing": {"resize": 64, "crop": 96}}, "a crop of 96 beyond"),
    ({"input_shape": "3x8x8"}, "input_shape"), ({"layout": "CHWN"}, "layout"),
    ({"weights_file": "nope.onnx"}, "weights_file 'nope.onnx': not the name of a weights file in the folder; name model."),
    ({"model_path": "/etc/passwd"}, "model_path '/etc/passwd': not the name")])
def test_entries_of_a_file_of_another_tool_are_not_guessed(entries: dict[str, Any], said: str, folder: Path) -> None:
    (folder / "model.pth").unlink()
    onnx.save(onnx.ModelProto(producer_name="nobody"), folder / "model.onnx")
    read_submission(state(folder, model_format="onnx", weights="IMAGENET1K_V1"))
    with pytest.raises(VerificationError) as caught:
        read_submission(state(folder, model_format="onnx", **entries))
    assert said in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_one_size_rules(folder: Path) -> None:
    files = read_submission(state(folder, input_size=64))  # the panel serves code with 224 pixels
    assert files.input_shape == (3, 224, 224) and files.preprocessing.crop == 224
    assert "input_shape of [3, 64, 64], images are served as [3, 224, 224], as the panel does" in files.notes[0]
    files = read_submission(state(folder, input_size=64, preprocessing={"resize": 40, "crop": 32}))
    assert files.input_shape == (3, 32, 32) and "served as [3, 32, 32]; state a preprocessing" in files.notes[0]
    (folder / "model.pth").unlink()
    onnx.save(onnx.ModelProto(producer_name="nobody"), folder / "model.onnx")
    files = read_submission(state(folder, model_format="onnx", input_shape=[64, 64, 3]))
    assert files.input_shape == (3, 64, 64) and (files.preprocessing.resize, files.preprocessing.crop) == (64, 64)
    assert "no preprocessing: pictures are resized and cropped to 64" in files.notes[0]
    files = read_submission(state(folder, model_format="onnx", input_shape=[3, 32, 64]))  # no square: refused by the file
    assert files.input_shape == (3, 224, 224) and "[3, 32, 64], images are served as [3, 224, 224]" in files.notes[0]


# ----------------------------------------------------------------------------------------------------- what loads them


@pytest.mark.parametrize(("text", "expected"), [
    ("def load_model():\n    ...", True), ("def load_model( # none\n ):\n    ...", True),
    ("def load_model(path): ...", False),
    ("class A:\n    def load_model(): ...", False), ("'''\ndef load_model():\n'''", False), ("def load_model(", False),
    ("if x:\n  a\n b", False), ("def load_model(): ...\ndef load_model(path): ...", False),
])
def test_a_load_model_without_arguments_is_remarked(text: str, expected: bool, folder: Path) -> None:
    assert takes_no_path(text) == expected
    (folder / "model_loader.py").write_text(text)
    assert any("load_model takes no arguments" in note for note in read_submission(folder).notes) == expected


def test_an_imported_load_model_is_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model_loader.py").write_text("from star_net import *\n")
    (folder / "star_net.py").write_text("from torch import nn\ndef load_model(path): return nn.Linear(1, 2)\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))  # foreign files are registered there
    model, _ = panel.by_loader(folder, {"weights": "model.pth"})
    assert isinstance(model, nn.Linear) and read_submission(folder).ways == ("loader", "standard")


def test_a_class_pickled_in_a_notebook_is_found_in_folders_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`code` is a module of Python itself; its neighbours are in reach; a package keeps its relative imports."""
    for name in ("code", "package"):
        (folder / name).mkdir()
    (folder / "code" / "net.py").write_text("from blocks_of_net import SIZE\nclass Net: size = SIZE\n")
    (folder / "code" / "blocks_of_net.py").write_text("SIZE = 3\n")
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "net.py").write_text("from .parts import SIZE\nclass Other: size = SIZE\n")
    (folder / "package" / "parts.py").write_text("SIZE = 4\n")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))  # foreign files are registered there
    assert (panel.from_folder(folder, "Net").size, panel.from_folder(folder, "Other").size) == (3, 4)
    with pytest.raises(AttributeError, match="no file of the folder defines Third"):
        panel.from_folder(folder, "Third")
    assert isinstance(sys.modules["package.net"], types.ModuleType)


# ----------------------------------------------------------------------------------------------------------- the classes


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of four classes."""
    panel_folders.draw_photos(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.mark.parametrize(("entries", "said"), [
    ({"num_classes": 200}, "4 class folders, num_classes in metadata.json is 200, which the panel does not read"),
    ({"class_names": ["goldfish", "b", "c", "d"]}, "are ignored, and the outputs taken for the class folders in sorted"),
    ({"class_names": ["a", "a"]}, "has 'a' more than once"),
    ({"class_names": ["class0", "b"], "num_classes": 4}, "class_names in metadata.json has 2 names, num_classes is 4"),
])
def test_classes_that_the_panel_does_not_read_never_refuse_code(entries: dict[str, Any], said: str, folder: Path,
                                                                photos: Path) -> None:
    order = class_order(facts_of(read_submission(state(folder, **entries)), "torch"), list_images(photos))
    assert order.names == ["class0", "class1", "class2", "class3"] and order.matched.startswith("assumed")
    assert any(said in warning for warning in order.warnings), order.warnings
    assert not any("states no class_names" in warning for warning in order.warnings if "class_names" in entries)
    assert order.numbering_warnings(None) == []
    assert "every number behind such a class is shifted" in order.numbering_warnings(200)[0]


def test_too_many_outputs_are_told_with_their_limit() -> None:
    class Wide(Runtime):
        max_outputs = 1024

        def __call__(self, images: np.ndarray) -> np.ndarray:
            return np.zeros((1, 2000), np.float32)

    with pytest.raises(VerificationError, match=r"\[1, 2000\], expected .* for 4 classes, or up to 1,024 outputs"):
        ask(Wide("torch", {}, None), np.zeros((1, 3, 8, 8), np.float32), 4)


def test_hostile_texts_are_searched_in_a_moment(folder: Path) -> None:
    """Patterns that looked at every text once for each of its characters took half a minute for 64 kB."""
    with zipfile.ZipFile(folder / "model.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"c" * 2**16)
    (folder / "metadata.json").write_text('{"model_format": "pth", "a": ' + '"\\' * 4_000_000)
    start = time.process_time()
    assert file_kind(folder / "model.pth") == ("state dict", "")
    with pytest.raises(VerificationError, match="not valid JSON"):
        read_submission(folder)
    assert time.process_time() - start < 3
