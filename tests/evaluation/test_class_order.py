"""Classes are matched by name: another order, another spelling, classes that one side lacks, and no names at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from compress.evaluation.evaluate import evaluate_submission
from compress.evaluation.runtimes import EvaluationSettings
from metadata.errors import UserError, VerificationError
from tests.helpers.submissions import edit_json

COLOURS = ("red", "green", "blue")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six red, six green and six blue pictures, each in a folder of its class."""
    for channel, name in enumerate(COLOURS):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        for index in range(6):
            pixels = np.random.default_rng(index).integers(0, 60, (8, 8, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "data" / "test" / name / f"{index}.png")
    return tmp_path / "data" / "test"


def write(folder: Path, names: list[str] | None, channels: list[int], **stated: Any) -> Path:
    """A foreign ONNX file whose outputs are the means of these channels: it is always right about its colours."""
    folder.mkdir()
    picked = helper.make_tensor("which", TensorProto.INT64, [len(channels)], channels)
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["x"], ["mean"]), helper.make_node("Flatten", ["mean"], ["flat"]),
         helper.make_node("Gather", ["flat", "which"], ["y"], axis=1)], "means",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", len(channels)])], [picked])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), folder / "model.onnx")
    (folder / "metadata.json").write_text(json.dumps({
        "model_format": "onnx", "input_size": [3, 8, 8], **({"class_names": names} if names else {}), **stated,
        "preprocessing": {"resize": 8, "crop": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}}))
    return folder


def score(folder: Path, data: Path, **options: Any) -> dict[str, Any]:
    settings = EvaluationSettings(runs=4, warmup=1, batch_size=options.pop("batch_size", 1))
    return evaluate_submission(folder, data, settings=settings, **options)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_outputs_in_another_order_are_matched_by_name(batch_size: int, pictures: Path, tmp_path: Path) -> None:
    result = score(write(tmp_path / "own", list(COLOURS), [0, 1, 2]), pictures, batch_size=batch_size)
    details = result["details"]
    assert result["accuracy"] == 100 and details["class_order"] == "by name"
    assert details["accuracy"]["per_class"] == {name: {"correct": 6, "total": 6} for name in ("blue", "green", "red")}
    assert not any("class" in warning for warning in details["warnings"])
    # The same answers, whatever the order of the outputs.
    ordered = score(write(tmp_path / "sorted", sorted(COLOURS), [2, 1, 0]), pictures, batch_size=batch_size)
    assert ordered["details"]["accuracy"] == details["accuracy"]


def test_two_orders_are_compared_image_by_image(pictures: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "own", list(COLOURS), [0, 1, 2])
    wider = write(tmp_path / "wider", ["violet", "blue", "green", "red"], [0, 2, 1, 1])  # red is never told from green
    verdict = score(one, pictures, compare=wider)["details"]["compare"]["accuracy"]
    assert (verdict["first"], verdict["second"]) == (1.0, pytest.approx(2 / 3))
    assert (verdict["only_first_right"], verdict["only_second_right"]) == (6, 0)
    assert verdict["flip_rate"] == pytest.approx(1 / 3)  # every red picture, which the second takes for violet
    assert score(wider, pictures, compare=one)["details"]["compare"]["accuracy"]["only_second_right"] == 6


def test_names_that_differ_in_spelling_alone_are_the_same(pictures: Path, tmp_path: Path) -> None:
    (pictures / "red").rename(pictures / "Dark_Red")
    result = score(write(tmp_path / "own", ["dark  red", "green", "Blue"], [0, 1, 2]), pictures)
    assert result["accuracy"] == 100 and set(result["details"]["accuracy"]["per_class"]) == {"Dark_Red", "green", "blue"}
    assert any("spelling alone were taken for the same: dark  red for Dark_Red, Blue for blue" in warning
               for warning in result["details"]["warnings"])
    (pictures / "blue").rename(pictures / "dark-red")  # two folders of one plain spelling: neither is guessed
    with pytest.raises(VerificationError, match="does not know 2 of the 3 classes here: Dark_Red, dark-red"):
        score(tmp_path / "own", pictures)


def test_a_test_set_that_lacks_classes_is_scored_over_the_others(pictures: Path, tmp_path: Path) -> None:
    for path in (pictures / "green").iterdir():
        path.unlink()
    known = ["red", "green", "blue", "violet"]
    result = score(write(tmp_path / "own", known, [0, 1, 2, 1]), pictures)
    details = result["details"]
    assert (details["accuracy"]["correct"], details["accuracy"]["total"], details["chance"]) == (12, 12, 0.5)
    assert details["accuracy"]["worst_class"]["total"] == 6
    assert [details["accuracy"]["per_class"][name] for name in ("green", "violet")] == [{"correct": 0, "total": 0}] * 2
    assert f"{pictures}: no images of 2 of the 4 classes that the submission knows: green, violet; the accuracy is that " \
        "of the images which are there" in details["warnings"]
    # An answer of a class that the test set lacks is a wrong answer.
    assert score(write(tmp_path / "wrong", known, [1, 1, 1, 0]), pictures)["accuracy"] < 60


def test_a_class_that_the_submission_does_not_know_is_refused_by_name(pictures: Path, tmp_path: Path) -> None:
    (pictures / "violet").mkdir()
    own = write(tmp_path / "own", list(COLOURS), [0, 1, 2])
    result = score(own, pictures)
    assert result["accuracy"] == 100
    assert any("class folders without images, unknown to the submission: violet" in text
               for text in result["details"]["warnings"])
    Image.new("RGB", (8, 8)).save(pictures / "violet" / "0.png")
    with pytest.raises(VerificationError, match="does not know 1 of the 4 classes here: violet; it knows blue, green, red"):
        score(own, pictures)


def test_without_names_the_assumed_order_is_said(pictures: Path, tmp_path: Path) -> None:
    for path in (pictures / "green").iterdir():  # an empty folder keeps its place
        path.unlink()
    result = score(write(tmp_path / "own", None, [2, 1, 0]), pictures)
    assert result["accuracy"] == 100 and result["details"]["class_order"] == "assumed: the sorted names of the folders"
    assert "the submission states no class_names: its outputs were taken for the class folders in sorted order: blue, " \
        "green, red" in result["details"]["warnings"]
    assert f"{pictures}: class folders without images, which keep their place: green" in result["details"]["warnings"]
    (pictures / "green").rmdir()
    with pytest.raises(VerificationError, match="2 class folders, the submission has 3 classes and states no names"):
        score(write(tmp_path / "counted", None, [2, 1, 0], num_classes=3), pictures)
    with pytest.raises(VerificationError, match=r"is \[1, 3\], expected finite logits \[1, 2\] for 2 classes"):
        score(tmp_path / "own", pictures)


@pytest.mark.parametrize(("names", "stated", "said"), [
    (list(COLOURS), {"num_classes": 5}, r"class_names in metadata\.json has 3 names, num_classes is 5"),
    (["red", "green", "red"], {}, r"class_names in metadata\.json has 'red' more than once")])
def test_names_that_contradict_themselves_are_refused(names: list[str], stated: dict[str, int], said: str, pictures: Path,
                                                      tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=said):
        score(write(tmp_path / "own", names, [0, 1, 2], **stated), pictures)


def test_what_is_left_out_is_in_the_result(pictures: Path, tmp_path: Path) -> None:
    (pictures / "red" / "notes.txt").write_text("six pictures")
    (pictures / "Thumbs.db").write_bytes(b"")
    (pictures / "__MACOSX").mkdir()
    result = score(write(tmp_path / "own", list(COLOURS), [0, 1, 2]), pictures)
    notes = pictures / "red" / "notes.txt"
    assert result["details"]["warnings"][0] == f"{pictures}: left out: .txt (1); the first is {notes}"


def test_a_folder_of_splits_is_not_taken_for_classes(pictures: Path, tmp_path: Path) -> None:
    (pictures.parent / "train").mkdir()
    with pytest.raises(UserError, match=rf"its folders are splits \(test, train\), expected classes; pass .*{pictures}"):
        score(write(tmp_path / "own", list(COLOURS), [0, 1, 2]), pictures.parent)


def test_an_orientation_that_is_not_applied_is_said(pictures: Path, tmp_path: Path) -> None:
    """A foreign submission takes pictures as they are stored, as torchvision does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8), (0, 0, 200)).save(pictures / "blue" / "camera.jpg", exif=exif)
    details = score(write(tmp_path / "own", list(COLOURS), [0, 1, 2]), pictures)["details"]
    assert details["preprocessing"]["exif_orientation"] is False
    assert "1 of 19 test images carry an EXIF orientation that the submission's preprocessing does not apply, such as " \
        f"{pictures}/blue/camera.jpg" in details["warnings"]


def test_grey_of_more_than_8_bits_is_said_to_be_scaled(pictures: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(pictures / "blue" / "microscope.png")
    details = score(write(tmp_path / "own", list(COLOURS), [0, 1, 2]), pictures)["details"]
    assert any(warning.startswith("1 of 19 test images are grey with more than 8 bits") and
               warning.endswith(f"{pictures}/blue/microscope.png") for warning in details["warnings"]), details["warnings"]


def test_a_package_with_other_names_in_another_order_keeps_its_score(submission: Path, few: Path, tmp_path: Path) -> None:
    """Through the file in the package, which must match by name as the toolkit does."""
    plain = score(submission, few)["details"]
    package, renamed = tmp_path / "package", tmp_path / "renamed"
    shutil.copytree(submission, package)
    names = [f"digit {(number + 3) % 10}" for number in range(10)]
    edit_json(package, "model_metadata.json", lambda metadata: metadata.update(class_names=names))
    shutil.copytree(few, renamed)
    for number, name in enumerate(names):
        (renamed / str(number)).rename(renamed / name)
    done = subprocess.run([sys.executable, "-I", package / "model_loader.py", "--submission_dir", package, "--data_dir",
                           renamed, "--output_file", tmp_path / "results.json", "--runs", "4", "--warmup", "1"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    details = json.loads((tmp_path / "results.json").read_text())["details"]
    assert details["accuracy"]["correct"] == plain["accuracy"]["correct"] and details["class_order"] == "by name"
    assert details["accuracy"]["per_class"] == {
        name: plain["accuracy"]["per_class"][str(number)] for number, name in enumerate(names)}


def test_a_package_of_version_0_1_means_what_it_meant(submission: Path, few: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(submission, package)

    def forget(metadata: dict[str, Any]) -> None:
        del metadata["preprocessing"]["interpolation"], metadata["preprocessing"]["exif_orientation"]

    edit_json(package, "model_metadata.json", forget)
    old, new = score(package, few)["details"], score(submission, few)["details"]
    assert old["accuracy"] == new["accuracy"]
    stated = {"interpolation": "bilinear", "exif_orientation": False, "stated_by": "model_metadata.json"}
    assert old["preprocessing"] == new["preprocessing"] | stated and new["preprocessing"]["exif_orientation"]
