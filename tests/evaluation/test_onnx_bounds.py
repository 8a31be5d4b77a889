"""ONNX files whose nodes would take for ever, or whose attributes are absurd, are refused by their shapes alone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from architectures import onnx_files
from architectures.onnx_costs import onnx_macs, onnx_work
from architectures.onnx_files import read_onnx
from metadata.errors import VerificationError
from tests.evaluation.test_foreign_onnx import PLAIN, SIDE, fold, network
from tests.helpers.commands import PROJECT

VAST, WINDOW = 8000, 4000  # pixels of a padded image, one number in 64 million, and of a pool's window


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    """Return a node; its inputs are words, "-" for one left out."""
    return helper.make_node(op, ["" if name == "-" else name for name in inputs.split()], [output], **attributes)


# Nodes from the padded image `vast` to `large`, by the side of the image and of a window.
SLOW: dict[str, Callable[[int, int], list[Any]]] = {
    "average pool": lambda side, window: [node("AveragePool", "vast", "large", kernel_shape=[window, window])],
    "maximum pool": lambda side, window: [node("MaxPool", "vast", "large", kernel_shape=[window, window])],
    "pool with one name for all": lambda side, window: [
        node("AveragePool", "vast", "p", kernel_shape=[window, window], name="same"),
        node("Relu", "p", "large", name="same")],
    "pool of an unknown shape": lambda side, window: [  # onnx infers none for the operators of ONNX Runtime
        node("QuantizeLinear", "vast scale point", "q"),
        node("QLinearAdd", "q scale point q scale point scale point", "r", domain="com.microsoft"),
        node("DequantizeLinear", "r scale point", "d"),
        node("AveragePool", "d", "large", kernel_shape=[window, window])],
    "normalization of many channels": lambda side, window: [node("LRN", "vast", "large", size=window)],
    "resize": lambda side, window: [node("Resize", "vast - - twice", "large", mode="cubic")],
    "sums of products": lambda side, window: [node("Einsum", "vast vast", "p", equation="abcd,abce->abde"),
                                              node("Einsum", "p vast", "large", equation="...cd,...ce->...de")],
}


def built(folder: Path, what: str, side: int, window: int) -> Path:
    """Write a file that pads one channel to `side` pixels, runs nodes on it, and brings it back to what `fc` takes."""
    model = network(["N", 3, SIDE, SIDE], [
        node("Slice", "x zero one axis", "grey"), node("Pad", "grey pads", "vast"), *SLOW[what](side, window),
        node("GlobalAveragePool", "large", "mean"), node("Expand", "mean shape", "image")])
    model.graph.initializer.extend(numpy_helper.from_array(np.array(values), name) for name, values in {
        "zero": [0], "one": [1], "axis": [1], "pads": [0] * 6 + [side - SIDE] * 2, "shape": [1, 3, SIDE, SIDE],
        "twice": [1, 1, 2 * side, 2 * side], "scale": np.float32(1), "point": np.uint8(0)}.items())
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return fold(folder, model) / "model.onnx"


@pytest.mark.parametrize("what", SLOW)
def test_nodes_that_never_end_are_refused(what: str, tmp_path: Path) -> None:
    """The same graph with small sizes passes, so that nothing but its costs can stand in the way."""
    read_onnx(built(tmp_path / "quick", what, 2 * SIDE, 3), (3, SIDE, SIDE))
    start = time.process_time()
    with pytest.raises(VerificationError, match=r"over the limits? of"):
        read_onnx(built(tmp_path / "slow", what, VAST, WINDOW), (3, SIDE, SIDE))
    assert time.process_time() - start < 5


# Rows of numbers, from one number: onnx makes an object of each when it follows what a file computes.
ROWS: dict[str, list[Any]] = {
    "a range of stated length": [node("Range", "nought vast step", "line"), node("Cast", "line", "values", to=1)],
    "a row of computed length": [
        node("Mul", "some vasts", "more"), node("ConstantOfShape", "more", "line"), node("Cast", "line", "values", to=1)],
    "a row joined with itself": [
        node("Unsqueeze", "vast axis", "row0"),
        *(node("Concat", f"row{n} row{n}", f"row{n + 1}", axis=0) for n in range(45)),
        node("Cast", "row45", "values", to=1)],
    "a row of computed length, joined with itself": [
        node("Mul", "some some", "count"), node("ConstantOfShape", "count", "row0"),
        *(node("Concat", f"row{n} row{n}", f"row{n + 1}", axis=0) for n in range(16)),
        node("Cast", "row16", "values", to=1)]}


@pytest.mark.parametrize("what", ROWS)
def test_rows_that_a_file_computes_are_bounded(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "MAX_PROPAGATION_SECONDS", 1)
    monkeypatch.setattr(onnx_files, "MAX_PROPAGATION_BYTES", 2**30)
    model = network(["N", 3, SIDE, SIDE], [
        *ROWS[what], node("ReduceSum", "values", "sum"), node("Add", "x sum", "image")])
    model.opset_import[0].version = 17  # onnx follows more operators in newer versions
    model.graph.initializer.extend(numpy_helper.from_array(np.array(values), name) for name, values in {
        "nought": np.int64(0), "vast": np.int64(2**40), "step": np.int64(1), "axis": [0], "some": [20], "vasts": [2**22],
    }.items())
    start = time.monotonic()
    with pytest.raises(VerificationError, match=r"over the limits of|or 1 GB to find out") as caught:
        read_onnx(fold(tmp_path, model) / "model.onnx", (3, SIDE, SIDE))
    assert time.monotonic() - start < 10 and "\n" not in str(caught.value), caught.value


ABSURD = [0, -1, 2**31, 2**62, -2**63]
NODES = {
    "AveragePool": ("kernel_shape", "pads", "strides", "dilations"), "MaxPool": ("kernel_shape", "pads", "strides"),
    "LRN": ("size",), "Flatten": ("axis",), "Softmax": ("axis",), "Transpose": ("perm",), "DepthToSpace": ("blocksize",),
    "SpaceToDepth": ("blocksize",), "ReduceMean": ("axes",), "Concat": ("axis",), "LeakyRelu": ("alpha",),
    "ArgMax": ("axis",), "Gather": ("axis",), "Split": ("axis",)}


@pytest.mark.parametrize("op", NODES)
def test_absurd_attributes_end_in_one_kind_of_error(op: str, tmp_path: Path) -> None:
    """Or in none, where the value is a fine one: read_onnx runs nothing."""
    for name in NODES[op]:
        for value in ABSURD:
            listed = name in ("kernel_shape", "pads", "strides", "dilations", "perm", "axes")
            count = {"pads": 4, "perm": 4}.get(name, 2)
            usual: dict[str, Any] = {"kernel_shape": [2, 2]} if "Pool" in op else {}
            usual[name] = [value] * count if listed else value
            absurd = node(op, "x x" if op == "Gather" else "x", "image", **usual)
            folder = fold(tmp_path / "s", network(["N", 3, SIDE, SIDE], [absurd]))
            try:
                read_onnx(folder / "model.onnx", (3, SIDE, SIDE))
            except VerificationError as error:
                assert "\n" not in str(error)


def test_work_is_counted_by_node_and_image() -> None:
    shapes = {"x": [4, 3, 8, 8], "p": [4, 3, 7, 7], "a": [4, 10], "b": [10, 1000]}
    nodes = [helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2]),
             helper.make_node("Relu", ["p"], ["r"], name="r"),
             helper.make_node("QGemm", ["a", "s", "z", "b", "s", "z"], ["y"], domain="com.microsoft")]
    work = onnx_work(nodes, shapes, 4)
    assert work == {"MaxPool (0)": 192 + 147 + 4 * 147, "r (1)": 147, "QGemm (2)": (40 + 10_000 + 4 * 10_000 // 100) // 4}
    assert onnx_macs(nodes, shapes) == (0, 0)


EQUATIONS = {
    "...k,ko->...o": ("f w", 192 * 10), "nk,ko": ("f w", 192 * 10), "n...k,...ko->...no": ("f w", 192 * 10),
    "...ij,...jk->...ik": ("a b", 2 * 3 * 4 * 5 * 6), "bi...,...->bi": ("m v", 7 * 8 * 9), "ij,jk->": ("m f", None),
    "k,k": ("f f", None), "nk,ko,o->n": ("f w o", None), "...->...": ("f", 0), "nk,ko->no": ("f unknown", None)}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_an_einsum_counts_what_it_multiplies_or_nothing_is_said(equation: str) -> None:
    shapes = {"f": [1, 192], "w": [192, 10], "o": [10], "a": [2, 1, 4, 5], "b": [3, 5, 6], "m": [7, 8, 9], "v": [9]}
    inputs, macs = EQUATIONS[equation]
    assert onnx_macs([node("Einsum", inputs, "y", equation=equation)], shapes)[0] == macs


def test_a_matrix_product_of_plain_products_and_sums_is_counted() -> None:
    shapes = {"f": [1, 192, 1], "w": [192, 10], "p": [1, 192, 10]}
    nodes = [node("Mul", "f w", "p"), node("ReduceSum", "p axes", "y")]
    assert onnx_macs(nodes, shapes) == (1920, 1920)
    assert onnx_macs(nodes, {}) == (None, 0) and onnx_macs(nodes[:1], shapes) == (0, 0)


def test_sums_and_waves_of_position_encodings_pass(tmp_path: Path) -> None:
    """Operators of timm's EdgeNeXt and XCiT."""
    waves = [node("CumSum", "x axis", "c"), node("Sin", "c", "s"), node("Cos", "s", "image")]
    model = network(["N", 3, SIDE, SIDE], waves)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1), "axis"))
    assert read_onnx(fold(tmp_path / "s", model) / "model.onnx", (3, SIDE, SIDE)).macs == 3 * SIDE * SIDE * 10


LITTLE_MEMORY = """
import re, resource, sys
from pathlib import Path
from compress.evaluation.runtimes import load_model
from metadata.errors import VerificationError
small, large, *spare = sys.argv[1:]
load_model(Path(small))  # imports what it needs
for more in map(int, spare):
    held = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 2**10
    resource.setrlimit(resource.RLIMIT_AS, (held + more * 2**20, resource.RLIM_INFINITY))
    try:
        load_model(Path(large))
        print("loaded")
    except VerificationError as error:
        print("memory" if "more memory than there is" in str(error) else error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded as Linux does it")
@pytest.mark.slow
def test_a_file_that_does_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    """Reading, parsing, checking and shape inference run out of it in turn, as the limit rises."""
    large = onnx.ModelProto()
    large.CopyFrom(PLAIN)
    large.graph.initializer.append(numpy_helper.from_array(np.ones(10 * 2**20, np.float32), "large"))
    files = [fold(tmp_path / name, model) / "model.onnx" for name, model in (("small", PLAIN), ("large", large))]
    spare = [5, 50, 90, 110, 150, 2000]  # MiB
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, *map(str, [*files, *spare])], cwd=PROJECT,
                          capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()
    assert done.returncode == 0 and said[0] == "memory" and said[-1] == "loaded" and set(said) == {"memory", "loaded"}, done


def test_honest_files_pass(tmp_path: Path) -> None:
    folder = fold(tmp_path / "s", PLAIN)
    weight = numpy_helper.to_array(PLAIN.graph.initializer[0])
    assert read_onnx(folder / "model.onnx", (3, SIDE, SIDE)).macs == np.prod(weight.shape)
