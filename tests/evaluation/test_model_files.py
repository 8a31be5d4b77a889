"""OpenVINO's IR, `.pt2` and `.pte` files that are hostile or damaged are refused in one line, before anything runs them."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.evaluation.executorch_files import read_executorch
from compress.evaluation.openvino_files import MAX_GRAPH_BYTES, read_openvino
from compress.evaluation.runtimes import open_file
from compress.evaluation.torch_programs import program_costs, read_torch_program
from compress.packaging.formats.base import export_format
from metadata.errors import VerificationError
from metadata.schemas import Preprocessing
from tests.helpers.little import little, SHAPE
from tests.helpers.sharing import shared_folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The little network as IR and as a program of torch.export."""
    def write(folder: Path) -> None:
        for name in ("openvino", "torch_export"):
            for suffix, content in export_format(name).convert(little()).items():
                (folder / f"model{suffix}").write_bytes(content)

    return shared_folder(tmp_path_factory, "model_files", write)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "files")
    return tmp_path / "files"


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)
    return change


IR = [
    (replaced("<net", '<!DOCTYPE net [<!ENTITY a "aaaa">]><net'), "no declarations"),
    (lambda text: "\0" + text, "no declarations"),
    (lambda text: "not XML", "not the XML"),
    (replaced("</net>", ""), "not the XML"),
    (lambda text: f"<net version='11'>{'<a>' * 50}{'</a>' * 50}</net>", "deeper inside"),
    (replaced("<net ", f'<net more="{"x" * 20_000}" '), "attributes are longer"),
    (replaced('version="11"', 'version="3"'), "version 10 or 11"),
    (replaced('type="ReLU"', 'type="TensorIterator"'), "operator 'TensorIterator'"),
    (replaced('type="ReLU" version="opset1"', 'type="ReLU" version="extension"'), r"\('extension'\)"),
    (replaced('type="Result"', 'type="ReLU"'), "expected one output"),
    (replaced('type="Parameter"', 'type="ReLU"'), "expected one input, got 0"),
    (replaced('shape="?,3,32,32"', 'shape="?,3,64,64"'), r"the preprocessing makes \[3, 32, 32\]"),
    (replaced('shape="?,3,32,32"', 'shape="..9,3,32,32"'), "expected a shape"),
    (replaced('shape="?,3,32,32" element_type="f32"', 'shape="?,3,32,32" element_type="string"'), "input of float32"),
    (replaced('offset="', 'offset="9999999'), "constant .* its shape"),
    (replaced('offset="', 'offset="-'), "expected numbers in the .bin file"),
    (replaced('id="1"', 'id="0"'), "is not one of those"),
]


@pytest.mark.parametrize(("change", "said"), IR, ids=[said for _, said in IR])
def test_an_ir_that_is_not_plain_is_refused(change: Callable[[str], str], said: str, folder: Path) -> None:
    path = folder / "model.xml"
    path.write_text(change(path.read_text()))
    with pytest.raises(VerificationError, match=said):
        read_openvino(path, SHAPE)


def test_an_ir_of_many_bytes_is_not_read(folder: Path) -> None:
    with (folder / "model.xml").open("ab") as file:
        file.truncate(MAX_GRAPH_BYTES + 1)
    with pytest.raises(VerificationError, match="over the limit"):
        read_openvino(folder / "model.xml", SHAPE)


def test_numbers_of_an_ir_are_finite_and_there(folder: Path) -> None:
    content = bytearray((folder / "model.bin").read_bytes())
    for place in range(0, len(content) - 4, 4):
        content[place:place + 4] = b"\0\0\xc0\x7f"  # NaN
    (folder / "model.bin").write_bytes(content)
    with pytest.raises(VerificationError, match="NaN"):
        read_openvino(folder / "model.xml", SHAPE)
    (folder / "model.bin").write_bytes(content[:100])
    with pytest.raises(VerificationError, match="of 100"):
        read_openvino(folder / "model.xml", SHAPE)


def rewritten(path: Path, member: str, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again with one member changed."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, change(content) if name.endswith(member) else content)
    path.write_bytes(buffer.getvalue())


def of_graph(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        document = json.loads(content)
        change(document["graph_module"])
        return json.dumps(document).encode()
    return apply


def of_first_weight(**changes: Any) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        document = json.loads(content)
        entry = next(iter(document["config"].values()))
        for key, value in changes.items():
            (entry if key in entry else entry["tensor_meta"])[key] = value
        return json.dumps(document).encode()
    return apply


def node(graph_module: Any, name: str) -> Any:
    return next(each for each in graph_module["graph"]["nodes"] if f".{name}." in each["target"])


PROGRAMS: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("model.json", of_graph(lambda found: node(found, "relu").update(target="torch.ops.aten.bernoulli.default")),
     "'torch.ops.aten.bernoulli.default' is not one of those"),
    ("model.json", of_graph(lambda found: node(found, "relu").update(target="_operator.add")), "is not one of those"),
    ("model.json", of_graph(lambda found: node(found, "relu")["inputs"][0].update(arg={"as_expr": "__import__('os')"})),
     "an argument of the kind 'as_expr'"),
    ("model.json", of_graph(lambda found: node(found, "relu")["inputs"][0].update(arg={"as_tensor": {"name": "later"}})),
     "'later' is used before"),
    ("model.json", of_graph(lambda found: found["signature"]["output_specs"].pop()), "one input and one output"),
    ("model.json", lambda content: content[:-1], "not a program of torch.export"),
    ("model.json", lambda content: b"[]", "not as torch.export writes it"),
    ("weights_config.json", of_first_weight(use_pickle=True), "unpickles nothing"),
    ("weights_config.json", of_first_weight(storage_offset={"as_int": 4}), "a view of another"),
    ("weights_config.json", of_first_weight(dtype=8), "needs others"),
    ("weights/weight_0", lambda content: content[:-4] + b"\0\0\xc0\x7f", "NaN"),
]


@pytest.mark.parametrize(("member", "change", "said"), PROGRAMS, ids=[said for *_, said in PROGRAMS])
def test_a_program_that_is_not_plain_is_refused(member: str, change: Callable[[bytes], bytes], said: str, folder: Path
                                                ) -> None:
    path = folder / "model.pt2"
    rewritten(path, "nothing", bytes)
    program_costs(path, read_torch_program(path), SHAPE)  # as it was, written by zipfile
    rewritten(path, member, change)
    with pytest.raises(VerificationError, match=said):
        read_torch_program(path)


def test_a_program_for_other_images_and_a_compressed_one_are_refused(folder: Path) -> None:
    path = folder / "model.pt2"
    with pytest.raises(VerificationError, match="not a program for one image of shape"):
        program_costs(path, read_torch_program(path), (1, 32, 32))
    rewritten(path, "nothing", bytes, zipfile.ZIP_DEFLATED)
    with pytest.raises(VerificationError, match="is compressed"):
        read_torch_program(path)
    path.write_bytes(b"no archive")
    with pytest.raises(VerificationError, match="expected a zip archive"):
        read_torch_program(path)


def flips(content: bytes, count: int) -> list[bytes]:
    """Copies of a file with one byte changed, or cut short."""
    generator, found = random.Random(0), []
    for _ in range(count):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] = generator.randrange(256)
        found.append(bytes(changed if generator.random() < 0.8 else changed[:generator.randrange(len(content))]))
    return found


@pytest.mark.parametrize("name", ["model.xml", "model.pt2"])
def test_a_changed_byte_is_read_or_refused(name: str, folder: Path) -> None:
    path = folder / name
    for content in flips(path.read_bytes(), 60):
        path.write_bytes(content)
        with contextlib.suppress(VerificationError):
            read_openvino(path, SHAPE) if name == "model.xml" else program_costs(path, read_torch_program(path), SHAPE)


@pytest.mark.slow
def test_executorch_files_are_refused_by_what_they_hold(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    path = tmp_path / "model.pte"
    honest = export_format("executorch").convert(little())[".pte"]
    path.write_bytes(honest)
    known = read_executorch(path, SHAPE)
    assert known.batch == 1 and known.macs > 0 and open_file(path, SHAPE, Preprocessing()).macs == known.macs
    with pytest.raises(VerificationError, match="preprocessing makes"):
        read_executorch(path, (3, 16, 16))
    for old, new, said in ((b"XnnpackBackend", b"OpenvinoBacken", "this evaluator runs programs for"),
                           (b"forward", b"onwards", "expected one method"), (b"ET12", b"ET99", "mark"),
                           (b"XN01", b"XN09", "mark")):
        path.write_bytes(honest.replace(old, new))
        with pytest.raises(VerificationError, match=said):
            read_executorch(path, SHAPE)
    for content in flips(honest, 2000):
        path.write_bytes(content)
        with contextlib.suppress(VerificationError):
            read_executorch(path, SHAPE)
