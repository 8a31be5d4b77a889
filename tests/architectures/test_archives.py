"""Weights files: archives that two readers read differently, and tensors that are not what they seem, are refused fast."""

from __future__ import annotations

import collections
import io
import json
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from architectures.archives import check_archive
from architectures.architecture import Architecture
from architectures.build import build
from architectures.weights import read_weights
from compress.evaluation.runtimes import load_model
from metadata.errors import VerificationError
from tests.helpers.archives import rewritten, two_directories
from tests.helpers.architectures import tiny

ARCH = "trained_pruned_architecture.json"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of a small network, with its architecture beside them."""
    (tmp_path / ARCH).write_text(json.dumps(tiny()))
    torch.save(build(Architecture.model_validate(tiny())).state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def refused(path: Path, said: str) -> None:
    start = time.process_time()
    with pytest.raises(VerificationError, match=said) as error:
        load_model(path)
    assert time.process_time() - start < 2 and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- archives


def other_name(data: bytes) -> bytes:
    """The first member has another name in its own header than in the directory."""
    return data.replace(b"data.pkl", b"atad.pkl", 1)


def twice(data: bytes) -> bytes:
    buffer = io.BytesIO(rewritten(data))
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0].upper(), b"torch finds names without regard to case")
    return buffer.getvalue()


def smaller_end(data: bytes) -> bytes:
    """The end record states one member less than the record of 64 bits before it."""
    return data[:-14] + struct.pack("<HH", *(count - 1 for count in struct.unpack("<HH", data[-14:-10]))) + data[-10:]


def part_of_several(data: bytes) -> bytes:
    """The record of 64 bits before the end states two disks."""
    return data[:-26] + b"\2\0\0\0" + data[-22:]


FORGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "two directories": (two_directories, "records at its end contradict|directory is not where the end record says"),
    "another name in its own header": (other_name, "the header of member .* is not what the directory says"),
    "a name twice": (twice, "a name occurs twice"),
    "a comment behind the end": (lambda data: data[:-2] + b"\5\0hello", "the end record is not at the very end"),
    "bytes behind the end": (lambda data: data + b"more", "its end is missing|the end record is not at the very end"),
    "bytes before the first member": (lambda data: b"PK\x03\x04" + data, "end contradict|not where the end record says"),
    "counts contradict": (smaller_end, "the records at its end contradict each other"),
    "two archives": (lambda data: data + data, "end contradict|not where the end record says"),
    "one part of several": (part_of_several, "the records at its end contradict each other"),
    "compressed members": (lambda data: rewritten(data, zipfile.ZIP_DEFLATED), "is compressed|are compressed"),
    "a damaged directory": (lambda data: data.replace(b"PK\x01\x02", b"junk"), "its directory is damaged"),
    "no members": (lambda data: b"PK\x05\x06" + bytes(18), "it has no members"),
    "no members behind other bytes": (lambda data: data + b"PK\x05\x06" + bytes(18), "directory is not where|no members")}


@pytest.mark.parametrize("what", FORGED)
def test_an_archive_with_two_readings_is_refused(what: str, weights: Path) -> None:
    forge, said = FORGED[what]
    weights.write_bytes(forge(weights.read_bytes()))
    refused(weights, said)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_bytes_anywhere_end_in_one_kind_of_error(step: int, weights: Path) -> None:
    content = weights.read_bytes()
    for at in [*range(0, len(content), 37 * step), *range(len(content) - 900, len(content), step)]:
        weights.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1:])
        try:
            load_model(weights)  # a weight may have changed to another fine number
        except VerificationError as error:
            assert "\n" not in str(error)
    for length in range(1, len(content), 101):
        weights.write_bytes(content[:length])
        with pytest.raises(VerificationError):
            load_model(weights)


def test_what_torch_and_python_write_passes(weights: Path, tmp_path: Path) -> None:
    check_archive(weights)
    weights.write_bytes(rewritten(weights.read_bytes()))
    load_model(weights)
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive, archive.open("a", "w", force_zip64=True) as member:
        member.write(b"x")  # with sizes of 64 bits, as those of more than 4 GiB
    check_archive(tmp_path / "large.zip")
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.pth")["a"].tolist() == [1, 1, 1]


# --------------------------------------------------------------------------------------------------------- tensors


class Lie:
    """Pickles as a tensor with a storage, sizes, strides and attributes as stated."""

    def __init__(self, values: Tensor, size: tuple[int, ...], stride: tuple[int, ...], state: dict[str, Any] | None = None):
        self.values, self.size, self.stride, self.state = values, size, stride, state

    def __reduce__(self) -> Any:
        storage = torch.storage.TypedStorage(wrap_storage=self.values.untyped_storage(), dtype=self.values.dtype,
                                             _internal=True)
        hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
        arguments = (storage, 0, self.size, self.stride, False, hooks)
        if self.state is None:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._tensor._rebuild_from_type_v2, (torch._utils._rebuild_tensor_v2, torch.Tensor, arguments, self.state)


def lying(weights: Path, **lies: Any) -> None:
    tensors = torch.load(weights, weights_only=True)
    torch.save(tensors | {name.replace("_", "."): lie for name, lie in lies.items()}, weights)


def test_attributes_of_tensors_do_not_stand_in_the_way_of_checks(weights: Path) -> None:
    """One named is_floating_point hid an infinite value from the search for such."""
    values = torch.tensor([0, 0, 0, -float("inf")])
    for name in ("is_floating_point", "numel", "untyped_storage", "size", "anything"):
        lying(weights, fc_bias=Lie(values, (4,), (1,), {name: collections.OrderedDict}))
        refused(weights, f"tensor fc.bias has attributes of its own: {name}")


def test_a_tensor_beyond_its_storage_is_refused(weights: Path) -> None:
    """torch refuses such today, and once made room for it."""
    lying(weights, fc_weight=Lie(torch.zeros(1), (4, 6), (6, 1)))
    refused(weights, "not a PyTorch state dict")


def test_expanded_and_overlapping_tensors_are_refused(weights: Path) -> None:
    for stride in ((0, 0), (0, 1), (1, 1), (5, 1)):
        lying(weights, fc_weight=Lie(torch.zeros(60), (4, 6), stride))
        refused(weights, "uses the same numbers several times")


def test_thousands_of_vast_tensors_of_one_number_are_refused_at_once(weights: Path) -> None:
    one = torch.zeros(1)
    torch.save({f"t{index}": Lie(one, (2**20, 2**10), (0, 0)) for index in range(4000)}, weights)
    with pytest.raises(VerificationError, match="uses the same numbers several times"):
        read_weights(weights)
    row = torch.zeros(2**18)
    torch.save({f"t{index}": row[index:] for index in range(4000)}, weights)
    with pytest.raises(VerificationError, match="bytes up to here, the file has"):
        read_weights(weights)


def test_tied_parameters_transposed_and_sliced_tensors_are_fine(tmp_path: Path) -> None:
    matrix, whole = torch.randn(4, 6), torch.randn(8, 8)
    stored = {"a": matrix, "b": matrix, "t": matrix.T, "s": whole[1:3, ::2], "c": torch.nn.Parameter(matrix.clone()),
              "l": torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last), "e": torch.zeros(0, 3),
              "n": torch.tensor(3)}
    torch.save(stored, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
