"""Packages whose author lies, hides numbers, or wants the evaluator never to end."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model_loader
from compress.evaluation.evaluate import evaluate_submission
from compress.evaluation.runtimes import EvaluationSettings
from metadata.errors import UserError, VerificationError
from tests.helpers import archives
from tests.helpers.marks import slow_but
from tests.helpers.submissions import edit_json, edit_weights, restate, weights_of, write_package
from tests.helpers.verdicts import Evaluate, assert_refused


ARCHITECTURE, METADATA = "trained_pruned_architecture.json", "model_metadata.json"


def refused(outcome: tuple[int, dict[str, Any], str], said: str = "") -> None:
    """The package was refused for what it is, and not because the evaluator broke down."""
    assert_refused(outcome, said)
    assert "broke down" not in outcome[2], outcome[2]


# ------------------------------------------------------------------------------------------ numbers that nobody counts


ARCHIVES = {forge.__name__: forge for forge in (
    archives.two_directories, archives.end_record_in_the_comment, archives.local_headers_that_disagree,
    archives.member_twice, archives.behind_other_bytes)}


@pytest.mark.parametrize("forge", ARCHIVES)
def test_archives_that_two_readers_read_differently(forge: str, package: Path, attacked: Evaluate) -> None:
    path = weights_of(package)
    path.write_bytes(ARCHIVES[forge](path.read_bytes()))
    restate(package)
    refused(attacked(package), path.name)


class Lie:
    """Pickles as a tensor that states something else of itself than its storage holds."""

    def __init__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.state


def stored(tensor: torch.Tensor) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)


def rebuilt(tensor: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[Any, ...]:
    """Return what the pickle of a tensor calls to rebuild it."""
    return (torch._utils._rebuild_tensor_v2, (stored(tensor), 0, shape, stride, False, collections.OrderedDict()))


def attribute_in_the_way(weights: dict[str, Any]) -> None:
    """A tensor whose attribute `is_floating_point` stands in the way of the method: nobody would search it for NaN."""
    bias = weights["fc.bias"].clone()
    bias[9] = float("-inf")
    function, arguments = rebuilt(bias, tuple(bias.shape), tuple(bias.stride()))
    in_the_way = {"is_floating_point": collections.OrderedDict, "numel": collections.OrderedDict}
    weights["fc.bias"] = Lie((torch._tensor._rebuild_from_type_v2, (function, torch.Tensor, arguments, in_the_way)))


def with_numbers_in_an_attribute(weights: dict[str, Any]) -> None:
    bias = weights["fc.bias"]
    function, arguments = rebuilt(bias, tuple(bias.shape), tuple(bias.stride()))
    weights["fc.bias"] = Lie((torch._tensor._rebuild_from_type_v2,
                              (function, torch.Tensor, arguments, {"hidden": torch.randn(1000)})))


def beyond_its_storage(weights: dict[str, Any]) -> None:
    name = max(weights, key=lambda name: int(weights[name].numel()))
    weights[name] = Lie(rebuilt(torch.zeros(1, dtype=weights[name].dtype), tuple(weights[name].shape),
                                tuple(weights[name].stride())))


def of_stride_0(weights: dict[str, Any]) -> None:
    for number in range(4000):
        weights[f"more{number}"] = Lie(rebuilt(torch.zeros(1), (2**20, 2**10), (0, 0)))


TENSORS = {lie.__name__: lie for lie in (attribute_in_the_way, with_numbers_in_an_attribute, beyond_its_storage,
                                         of_stride_0)}


@pytest.mark.parametrize("lie", TENSORS)
def test_tensors_that_are_not_what_they_state(lie: str, package: Path, attacked: Evaluate) -> None:
    edit_weights(package, TENSORS[lie])
    restate(package)
    refused(attacked(package, "--time_limit_s", "20"))


SIZES = [(height, width) for height in range(1, 9) for width in range(1, 9)]


def slopes(coefficients: np.ndarray) -> list[dict[str, Any]]:
    """A linear classifier whose 640 weights are slopes: all pixels are negative, so each layer is a multiplication."""
    layers: list[dict[str, Any]] = [dict(name="grey", type="Conv2d", inputs=["input"], in_channels=1, out_channels=1,
                                         kernel_size=[1, 1])]
    layers += [dict(name=f"p{index}", type="AvgPool2d", inputs=["grey"], kernel_size=list(size), stride=[8, 8])
               for index, size in enumerate(SIZES)]
    outputs = []
    for label, row in enumerate(coefficients):
        terms = [dict(name=f"m{label}x{index}", type="LeakyReLU", inputs=[f"p{index}"], negative_slope=float(value))
                 for index, value in enumerate(row)]
        layers += terms
        last = terms[0]["name"]
        for index, term in enumerate(terms[1:], 1):
            layers.append(dict(name=f"s{label}x{index}", type="Add", inputs=[last, term["name"]]))
            last = f"s{label}x{index}"
        outputs.append(last)
    return [*layers, dict(name="all", type="Concat", inputs=outputs, dim=1), dict(name="y", type="Flatten", inputs=["all"])]


def test_weights_in_the_architecture_are_counted(tmp_path: Path, attacked: Evaluate) -> None:
    from sklearn.datasets import load_digits
    digits = load_digits()
    pixels = digits.images / 16 - 1
    features = np.stack([pixels[:, :height, :width].mean((1, 2)) for height, width in SIZES], 1) * 8
    targets = np.eye(10)[digits.target] * 2 - 1
    coefficients = np.linalg.lstsq(features, targets, rcond=None)[0].T * 8
    folder = write_package(tmp_path / "slopes", slopes(coefficients.astype(np.float32)),
                           {"grey.weight": torch.ones(1, 1, 1, 1), "grey.bias": torch.zeros(1)}, 64, (1, 8, 8), classes=10,
                           preprocessing=dict(mode="L", resize=8, crop=8, mean=[1.0], std=[1.0]))
    code, result, error = attacked(folder)
    assert code == 0, error
    assert result["accuracy"] > 60  # else this test shows nothing
    assert result["model_size"] * 2**20 >= weights_of(folder).stat().st_size + 4 * coefficients.size


# ------------------------------------------------------------------------------------------------- work without an end


POOL = dict(kernel_size=[4000, 4000], stride=[1, 1])
CLASSIFIER = {"fc.weight": torch.ones(10, 1), "fc.bias": torch.zeros(10)}


def widened(*middle: dict[str, Any], channels: int = 1) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], int]:
    """A network that makes 8,008 times 8,008 pixels of an image, does something with them, and takes their mean."""
    layers = [dict(name="conv", type="Conv2d", inputs=["input"], in_channels=3, out_channels=channels, kernel_size=[1, 1],
                   padding=[4000, 4000]), *middle,
              dict(name="mean", type="Mean", inputs=[middle[-1]["name"]], dim=[2, 3]),
              dict(name="fc", type="Linear", inputs=["mean"], in_features=channels, out_features=10)]
    weights = {"conv.weight": torch.ones(channels, 3, 1, 1), "conv.bias": torch.zeros(channels), **CLASSIFIER}
    return layers, weights, 3 * channels * 8008**2 + 10 * channels


def pooled(kind: str) -> dict[str, Any]:
    return dict(name="pool", type=kind, inputs=["conv"], **POOL)


CHAIN = [dict(name=f"r{index}", type="ReLU", inputs=[f"r{index - 1}" if index else "conv"]) for index in range(30)]
WORK = {"average pooling": widened(pooled("AvgPool2d")), "max pooling": widened(pooled("MaxPool2d")),
        "adaptive pooling": widened(dict(name="pool", type="AdaptiveAvgPool2d", inputs=["conv"], output_size=[4000, 4000])),
        "thirty activations": widened(*CHAIN)}


@pytest.mark.parametrize("work", slow_but(WORK, ["average pooling"]))
def test_layers_whose_work_has_no_end(work: str, tmp_path: Path, attacked: Evaluate) -> None:
    refused(attacked(write_package(tmp_path / "package", *WORK[work]), "--time_limit_s", "5"))


def sparse(name: str, size: int) -> Callable[[Path], Any]:
    """Put a file beside the weights that takes no room on the disk and hours to read."""
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        os.truncate(folder / name, size)
    return change


def one_file_under_many_names(folder: Path) -> None:
    sparse("a/b", 2**30)(folder)
    digest = hashlib.sha256()
    for _ in range(2**10):
        digest.update(bytes(2**20))
    spelled = {"a" + "/." * count + "/b": {"sha256": digest.hexdigest(), "bytes": 2**30} for count in range(60)}
    edit_json(folder, METADATA, lambda content: content["files"].update(spelled))


def one_file_linked_many_times(folder: Path) -> None:
    sparse("a", 2**30)(folder)
    for number in range(60):
        os.link(folder / "a", folder / f"b{number}")


def one_file_symlinked_many_times(folder: Path) -> None:
    sparse("a", 2**30)(folder)
    for number in range(60):
        os.symlink("a", folder / f"b{number}")


def many_files(folder: Path) -> None:
    for number in range(30_000):
        (folder / f"{number}").touch()


def many_folders(folder: Path) -> None:
    for number in range(20_000):
        (folder / f"{number}").mkdir()


def names_for_everything(folder: Path, entries: str) -> None:
    """Put millions of wrong entries into class_names."""
    path = folder / METADATA
    content = json.loads(path.read_text()) | {"class_names": "HERE"}
    path.write_text(json.dumps(content).replace('"HERE"', entries))


JSON = {
    "a million integers": lambda folder: names_for_everything(folder, "[" + ",".join(["1"] * 1_000_000) + "]"),
    "a million lists": lambda folder: names_for_everything(folder, "[" + ",".join(["[]"] * 1_000_000) + "]"),
    "deep lists": lambda folder: names_for_everything(folder, "[" * 1_000_000 + "]" * 1_000_000),
    "a long number": lambda folder: names_for_everything(folder, "9" * 4_000_000),
    "a long text": lambda folder: names_for_everything(folder, '["' + "x" * 8_000_000 + '"]'),
    "a surrogate": lambda folder: names_for_everything(folder, '["\\ud800"' + ',"x"' * 9 + "]"),
    "many layers": lambda folder: edit_json(folder, ARCHITECTURE, lambda content: content.update(layers=[1] * 1_000_000)),
    "many files": lambda folder: edit_json(folder, METADATA, lambda content: content.update(
        files={str(number): {"sha256": "0" * 64, "bytes": 1} for number in range(100_000)})),
}


@pytest.mark.parametrize("content", slow_but(JSON, JSON.keys() - {"a million lists"}))
def test_json_without_measure(content: str, package: Path, attacked: Evaluate) -> None:
    JSON[content](package)
    refused(attacked(package, "--memory_limit_mb", "512"))


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "a sparse file of 4 TB": sparse("notes.bin", 2**42), "sparse weights": sparse("more.pth", 2**32 - 1),
    **{change.__name__: change for change in (one_file_under_many_names, one_file_linked_many_times,
                                              one_file_symlinked_many_times, many_files, many_folders)}}


@pytest.mark.parametrize("change", slow_but(FOLDERS, FOLDERS.keys() - {"many_files", "many_folders"}))
def test_folders_that_take_hours_to_read(change: str, package: Path, attacked: Evaluate) -> None:
    FOLDERS[change](package)
    refused(attacked(package, "--time_limit_s", "5"))


def preprocess(**stated: Any) -> Callable[[Path], Any]:
    return lambda folder: edit_json(folder, METADATA, lambda content: content["preprocessing"].update(stated))


PREPROCESSING = {"vast": preprocess(resize=1_048_576), "large": preprocess(resize=12_000),
                 "sides": preprocess(resize=[12_000, 12_000]), "crop": preprocess(resize=None, crop=224)}


@pytest.mark.parametrize("stated", PREPROCESSING)
def test_preprocessing_that_makes_images_vast(stated: str, package: Path, attacked: Evaluate) -> None:
    PREPROCESSING[stated](package)
    refused(attacked(package, "--time_limit_s", "5"))


# ------------------------------------------------------------------------------------------- errors that nobody foresaw


def broken_directory(folder: Path) -> None:
    content = bytearray(weights_of(folder).read_bytes())
    at = content.rfind(b"PK\1\2")
    content[at:at + 4] = b"junk"
    weights_of(folder).write_bytes(content)
    restate(folder)


def number_beyond_64_bits(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        layer = next(layer for layer in content["layers"] if layer["type"] in ("Flatten", "Mean"))
        layer.update({"start_dim": 10**30} if layer["type"] == "Flatten" else {"dim": [10**30]})
    edit_json(folder, ARCHITECTURE, change)
    restate(folder)


def deep(folder: Path) -> None:
    """Folders in folders, deeper than Python's recursion and than any path may be long. `remove_deep` removes them."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(1200):
            os.mkdir("dddd")
            os.chdir("dddd")
    finally:
        os.chdir(here)


def odd_names(folder: Path) -> None:
    """Names that are no text, hold a line's end, or name a file that is not there."""
    for name in (b"\xff\xfe", b"two\nlines", b"tab\tbed"):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).touch()


def link_to_nothing(folder: Path) -> None:
    os.symlink("nowhere", folder / "link")


def socket_beside(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def name_with_a_zero(folder: Path) -> None:
    edit_json(folder, METADATA, lambda content: content.update(weights_file="a\0b"))


def name_too_long(folder: Path) -> None:
    edit_json(folder, METADATA, lambda content: content.update(weights_file="a" * 5000))


UNFORESEEN = {change.__name__: change for change in (
    broken_directory, number_beyond_64_bits, deep, link_to_nothing, socket_beside, name_with_a_zero, name_too_long)}


@pytest.fixture
def remove_deep(package: Path) -> Any:
    """Remove what pytest's own recursive cleaning would break on."""
    yield
    subprocess.run(["rm", "-rf", str(package)], check=True)


@pytest.mark.parametrize("change", UNFORESEEN)
def test_errors_that_nobody_foresaw(change: str, package: Path, attacked: Evaluate, remove_deep: None) -> None:
    UNFORESEEN[change](package)
    refused(attacked(package))
    with pytest.raises((UserError, VerificationError)):
        model_loader.load_model(package)


def test_a_folder_that_changes_while_it_is_evaluated(package: Path, few: Path) -> None:
    def change(done: int, total: int) -> None:
        (package / "README.md").write_text(f"{done} of {total}")

    with pytest.raises(VerificationError, match="changed while"):
        evaluate_submission(package, few, settings=EvaluationSettings(runs=20, warmup=2), progress=change)


def test_odd_names_score(package: Path, attacked: Evaluate) -> None:
    odd_names(package)
    code, _, error = attacked(package)
    assert code == 0, error
