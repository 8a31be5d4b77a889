"""Packages and ONNX files with random faults: the evaluator ends in time with a result, and no fault is one nobody foresaw.

FUZZ_EXAMPLES sets how many faults of each kind are tried; FUZZ_SEED draws others than the fixed ones.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import model_loader
from tests.attacks.conftest import alarm
from tests.helpers.sharing import shared_folder
from tests.helpers.submissions import restate, weights_of

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "80"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
FLAGS = ["--runs", "2", "--warmup", "1", "--time_limit_s", "10", "--memory_limit_mb", "1024"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**63, -2**63, 10**30, 0.5, -0.0, 1e-300, 1e308, float("nan"),
    float("inf"), "", "a", "input", "../x", "/etc/passwd", "a" * 10_000, "\0", "\ud800", "Conv2d", "Linear", "__class__",
    [], [[]], {}, [0], [1, 1], [-1, -1], [4000, 4000], [2**40], {"": 0}, [None] * 1000]

KEYS = ["schema", "dtype", "inputs", "groups", "dilation", "x", "bias", "type"]
ARCHIVE_MARKS = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"data.pkl", b"\x80\x02", b"ctorch")
ONNX_MARKS = (b"kernel_shape", b"strides", b"pads", b"group", b"dilations", b"Conv", b"Gemm", b"image", b"Relu", b"axis")


@pytest.fixture(scope="session")
def ten(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One test image of each digit."""
    def copy_one(folder: Path) -> None:
        for source in sorted(few.iterdir()):
            (folder / source.name).mkdir()
            shutil.copy(min(source.iterdir()), folder / source.name)

    return shared_folder(tmp_path_factory, "ten", copy_one)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*path, key)
        yield from places(each, (*path, key))


def at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def mutate_json(content: Any, rng: random.Random) -> Any:
    """Replace, remove, move, repeat or add values, one to three times."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        known = list(places(content))
        if not known:
            break
        *above, key = rng.choice(known)
        holder, way = at(content, tuple(above)), rng.randrange(6)
        if way == 0:
            del holder[key]
        elif way == 1:
            holder[key] = copy.deepcopy(at(content, rng.choice(known)))
        elif way == 2 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif way == 3 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = rng.choice(VALUES)
        elif way == 4 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = rng.choice([holder[key] * 1000, -holder[key], holder[key] + 1, holder[key] / 3])
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return content


def mutate_bytes(content: bytes, rng: random.Random, marks: tuple[bytes, ...]) -> bytes:
    """Change, cut, repeat or insert bytes, most of them near what gives a file its structure."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        found = [place for mark in marks for place in (changed.rfind(mark), changed.find(mark)) if place >= 0]
        start = (rng.choice(found) + rng.randrange(64) if found and rng.random() < 0.8 else rng.randrange(len(changed) + 1))
        start = min(start, len(changed))
        way, length = rng.randrange(5), rng.choice([1, 1, 2, 4, 8])
        if way <= 1:
            changed[start:start + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
        elif way == 2:
            del changed[start:start + rng.choice([1, 4, 100, 10_000])]
        elif way == 3:
            changed[start:start] = changed[start:start + rng.choice([1, 46, 1000])]
        else:
            changed[start:start] = rng.randbytes(length)
    return bytes(changed)


def mutate_file(name: str, stated: bool) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        path = folder / name
        path.write_text(json.dumps(mutate_json(json.loads(path.read_text()), rng)))
        if stated:
            restate(folder)
    return change


def mutate_archive(folder: Path, rng: random.Random) -> None:
    path = weights_of(folder)
    path.write_bytes(mutate_bytes(path.read_bytes(), rng, ARCHIVE_MARKS))
    restate(folder)


def mutate_nodes(folder: Path, rng: random.Random) -> None:
    """Change attributes, sizes, names and the order of an ONNX file's nodes, so that it stays a valid message."""
    import onnx
    path = folder / "model.onnx"
    model = onnx.load(str(path))
    graph = model.graph
    for _ in range(rng.randint(1, 3)):
        node, tensor, way = rng.choice(graph.node), rng.choice(graph.initializer), rng.randrange(8)
        number = rng.choice([0, 1, -1, 2, 3, 100, 4000, 2**31 - 1, 2**31, 2**62, -2**63])
        if way <= 2 and node.attribute:
            attribute = rng.choice(node.attribute)
            if attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = number
            else:
                attribute.i, attribute.f = number, rng.choice([0.0, -1.0, 1e30, float("nan"), float("inf")])
        elif way == 3 and tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = number
        elif way == 4:
            node.input[rng.randrange(len(node.input))] = rng.choice(["", "image", "x", *rng.choice(graph.node).output])
        elif way == 5:
            node.op_type = rng.choice(["Conv", "MaxPool", "Resize", "Expand", "Tile", "ConstantOfShape", "Loop", "If",
                                       "Pad", "Softmax", "Gemm", "MatMul", "Reshape", "Gather", "Range", "TopK", "x"])
        elif way == 6:
            del graph.node[rng.randrange(len(graph.node))]
        else:
            graph.input[0].type.tensor_type.shape.dim[rng.randrange(4)].dim_value = number
    path.write_bytes(model.SerializeToString())


def mutate_onnx(folder: Path, rng: random.Random) -> None:
    path = folder / "model.onnx"
    path.write_bytes(mutate_bytes(path.read_bytes(), rng, ONNX_MARKS))


KINDS: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "architecture": ("submission", mutate_file("trained_pruned_architecture.json", True)),
    "metadata": ("submission", mutate_file("model_metadata.json", False)),
    "archive": ("submission", mutate_archive),
    "ONNX": ("onnx_submission", mutate_onnx),
    "ONNX nodes": ("onnx_submission", mutate_nodes),
    "loose metadata": ("onnx_submission", mutate_file("model_metadata.json", False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_fault_ends_in_a_result(kind: str, ten: Path, request: pytest.FixtureRequest,
                                         tmp_path_factory: pytest.TempPathFactory) -> None:
    base, change = KINDS[kind]
    source, work = request.getfixturevalue(base), tmp_path_factory.mktemp("fuzz")
    output = work / "results.json"

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # a smaller seed is no simpler fault
    @given(st.integers(0, 2**32 - 1))
    def ends(drawn: int) -> None:
        shutil.rmtree(work / "s", ignore_errors=True)
        shutil.copytree(source, work / "s")
        output.unlink(missing_ok=True)
        rng = random.Random(drawn + SEED)
        change(work / "s", rng)
        with alarm(60):
            code = model_loader.main(["--submission_dir", str(work / "s"), "--data_dir", str(ten), "--output_file",
                                      str(output), *FLAGS])
        status = json.loads(output.read_text())["details"]["status"]
        asks = "it runs only with --allow_code" in status  # metadata without `schema` make a folder of code of a package
        assert code == (0 if status == "ok" else 2 if asks else 1), (code, status)  # 2: the user's mistake
        assert "broke down" not in status and "signal" not in status, status

    ends()
