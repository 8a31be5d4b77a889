"""JSON of absurd lengths, depths and numbers is refused by its length, before a schema collects millions of errors."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import RootModel

from compress.evaluation.submission import read_submission
from loaders.images import normalize, scale_pixels
from metadata.errors import VerificationError
from metadata.files import MAX_JSON_DEPTH, MAX_JSON_ENTRIES, MAX_JSON_VALUES, parse_json, read_json
from metadata.schemas import Preprocessing, StatedPreprocessing
from tests.helpers.commands import PROJECT
from tests.helpers.submissions import edit_json

# What writes the document, and what is said of it.
LONG = {
    "a list of millions": (lambda: '{"a": [' + ",".join(["1"] * 7_000_000) + "]}", "over 500,000 values"),
    "millions of lists": (lambda: "[" + "[]," * 4_000_000 + "[]]", "over 500,000 values"),
    "an object of millions": (lambda: "{" + ",".join(f'"{i}":1' for i in range(1_200_000)) + "}", "over 500,000 values"),
    "a long list": (lambda: json.dumps({"a": {"b": [1] * (MAX_JSON_ENTRIES + 1)}}), "over 100,000 entries"),
    "a long object": (lambda: json.dumps(dict.fromkeys(map(str, range(MAX_JSON_ENTRIES + 1)))), "over 100,000 entries"),
    "deep lists": (lambda: "[" * 500 + "]" * 500, "over 64 levels deep"),
    "lists that are too deep for the parser": (lambda: "[" * 200_000, "Recursion|recursion"),
    "a text without an end, quotes and commas": (lambda: '"' + '\\",' * 5_000_000, "Unterminated string"),
    "a text that ends in a backslash": (lambda: '{"a": ' + '",\\' * 5_000_000, "Unterminated|Expecting|delimiter"),
    "a number of many digits": (lambda: "9" * 10_000, "digits"),
}


@pytest.mark.parametrize("what", LONG)
def test_long_documents_are_refused_in_a_moment(what: str, tmp_path: Path) -> None:
    document, said = LONG[what]
    path = tmp_path / "x.json"
    path.write_text(document())
    start = time.process_time()
    with pytest.raises(VerificationError, match=said) as error:
        read_json(path, RootModel[dict[str, object]])
    assert time.process_time() - start < 2 and len(str(error.value)) < 600


def test_documents_up_to_the_limits_are_read(tmp_path: Path) -> None:
    for content in ({"a": list(range(MAX_JSON_ENTRIES))}, [[0] * 100] * (MAX_JSON_VALUES // 101 - 1),
                    {"commas, [braces] and: colons": ",[{:" * MAX_JSON_VALUES + '\\"'}, ["ä", "\u20ac"]):
        assert parse_json(json.dumps(content)) == content
    deep: object = 1
    for _ in range(MAX_JSON_DEPTH):
        deep = [deep]
    assert parse_json(json.dumps(deep)) == deep
    (tmp_path / "windows.json").write_bytes(json.dumps({"ä": ["\u20ac"]}, ensure_ascii=False).encode("utf-16"))
    assert read_json(tmp_path / "windows.json", RootModel[dict[str, object]]).root == {"ä": ["\u20ac"]}


@pytest.mark.parametrize(("name", "value"), [
    ("mean", 1e308), ("mean", -1e39), ("mean", float("inf")), ("mean", float("nan")), ("std", 1e-38), ("std", 5e-324),
    ("std", 0), ("std", -1), ("std", 1e300), ("std", float("nan"))])
def test_a_preprocessing_whose_pixels_would_overflow_is_refused(name: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "preprocessing.json"
    path.write_text(json.dumps({name: [0.5, value, 0.5]}))
    for schema in (Preprocessing, RootModel[StatedPreprocessing]):
        with pytest.raises(VerificationError, match=rf"{name}\.1: Input should be .*, got") as error:
            read_json(path, schema)
        assert "\n" not in str(error.value)


def test_the_widest_preprocessing_gives_plain_numbers() -> None:
    pixels = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    for mean, std in itertools.product((-1e6, 0, 123.675, 1e6), (1e-6, 1 / 255, 58.395, 1e6)):
        preprocessing = Preprocessing(mode="L", mean=[mean], std=[std])
        scaled = scale_pixels(pixels, preprocessing)
        assert np.isfinite(scaled).all() and np.allclose(scaled, normalize(torch.from_numpy(pixels), preprocessing))


SCRIPT = """
import resource, sys
from pathlib import Path
from compress.evaluation.submission import read_submission
from metadata.errors import VerificationError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_submission(Path(sys.argv[1]))
except VerificationError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
"""


@pytest.mark.parametrize(("name", "key"), [
    pytest.param("model_metadata.json", "class_names", marks=pytest.mark.slow), ("model_metadata.json", "files"),
    ("trained_pruned_architecture.json", "layers")])
def test_millions_of_wrong_entries_cost_neither_time_nor_memory(name: str, key: str, submission: Path,
                                                                tmp_path: Path) -> None:
    """The evaluator was killed under its memory limit while it collected a million errors."""
    folder = shutil.copytree(submission, tmp_path / "s")
    content = json.loads((submission / name).read_text()) | {key: "HERE"}
    many = "[" + ",".join(["1"] * 7_000_000) + "]"
    if key == "files":
        many = json.dumps(dict.fromkeys(map(str, range(99_000)), 1))
    (folder / name).write_text(json.dumps(content).replace('"HERE"', many))
    if name != "model_metadata.json":
        size = (folder / name).stat().st_size
        edit_json(folder, "model_metadata.json", lambda metadata: metadata["files"][name].update(bytes=size))
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], cwd=PROJECT, capture_output=True, text=True, check=True)
    megabytes, _, said = done.stdout.partition(" ")
    assert int(megabytes) < 150 and f"{name}: " in said and len(said) < 600


def test_one_error_of_a_long_list_is_enough(submission: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(submission, tmp_path / "s")
    edit_json(folder, "model_metadata.json", lambda metadata: metadata.update(class_names=[1] * 90_000))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(VerificationError, match=r"class_names\.0: Input should be a valid string, got 1$"):
        read_submission(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - used < 1
