"""Folders with code, of any size and with weights stored in any way: they are scored, and what is said of them is true."""

from __future__ import annotations

import pathlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from architectures.weights import all_finite, check_tensors
from compress.evaluation.code_runtime import count_warnings, what_became_of_them
from compress.evaluation.stored_weights import check_stored
from compress.evaluation.original import file_kind
from compress.evaluation import offline, panel, scratch
from compress.evaluation.submission import read_submission
from metadata.errors import VerificationError
from tests.helpers import panel_folders
from tests.helpers.verdicts import Evaluate, assert_refused

ALLOW = "--allow_code"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


def append(folder: Path, code: str) -> None:
    """Adds lines to the end of model.py."""
    with (folder / "model.py").open("a") as file:
        file.write(f"\n{code}\n")


# The sandbox looks into the folder once a second; the code makes it look.
@pytest.mark.parametrize(("code", "said"), [
    pytest.param("import os\nos.remove('one.bin')\nopen('new', 'wb').write(bytes(2**15))", None, marks=pytest.mark.slow),
    ("for i in range(8):\n    open(f'new{i}', 'wb').write(bytes(2**14))", "the code wrote more than"),
    pytest.param("for i in range(20):\n    open(f'new{i}', 'wb').close()", "the code made more than 10 files",
                 marks=pytest.mark.slow),
])
def test_the_copy_of_a_folder_is_not_what_the_code_wrote(code: str, said: str | None, folder: Path, evaluate: Evaluate,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "MAX_SCRATCH_BYTES", 2**16)
    monkeypatch.setattr(scratch, "MAX_SCRATCH_ENTRIES", 10)
    (folder / "one.bin").write_bytes(bytes(2**18))
    (folder / "many").mkdir()
    for index in range(20):
        (folder / "many" / f"{index}.txt").write_text("x")
    append(folder, f"{code}\nimport time\ntime.sleep(1.8)")
    outcome = evaluate(folder, ALLOW)
    if said:
        assert_refused(outcome, said)
    else:
        assert outcome[0] == 0, outcome[2]


# ------------------------------------------------------------------------------------------ how weights may be stored


EYE = torch.eye(4)
FLOAT8 = torch.tensor([1.0, -2.0, 0.5]).to(torch.float8_e4m3fn)
TENSORS: dict[str, tuple[torch.Tensor, int]] = {  # and the numbers that the file holds of it
    "float8": (FLOAT8, 3), "another float8": (FLOAT8.float().to(torch.float8_e5m2), 3), "sparse": (EYE.to_sparse(), 4),
    "meta": (torch.empty(2, 2, device="meta"), 0), "half": (EYE.half(), 16), "complex": (EYE.to(torch.complex64), 16),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_of_any_kind_is_counted_where_a_loader_reads_it(kind: str, tmp_path: Path) -> None:
    tensor, held = TENSORS[kind]
    panel_folders.write(tmp_path, model_loader="def load_model(path): ...")
    torch.save({"a": torch.ones(5), "b": tensor}, tmp_path / "model.pth")
    assert check_stored(read_submission(tmp_path)) == ([], 5 + held)
    if not tensor.is_meta and tensor.is_floating_point():
        spoiled = tensor.to_dense().float()
        spoiled.view(-1)[0] = float("nan")
        torch.save({"a": torch.ones(5), "b": spoiled.to(tensor.dtype)}, tmp_path / "model.pth")
        assert "tensor b holds NaN" in check_stored(read_submission(tmp_path))[0][0]


def test_values_of_compressed_rows_are_judged() -> None:
    with pytest.warns(UserWarning, match="beta state"):
        rows = EYE.to_sparse_csr()
    assert all_finite(rows) and not all_finite(rows * float("inf"))


def test_packages_hold_dense_tensors_alone() -> None:
    assert check_tensors({"a": FLOAT8}, "w.pth") == {"a": FLOAT8}  # an architecture then refuses the type
    with pytest.raises(VerificationError, match="tensor b holds NaN"):
        check_tensors({"b": torch.tensor([float("nan")]).to(torch.float8_e5m2)}, "w.pth")
    for tensor in (EYE.to_sparse(), torch.empty(2, device="meta")):
        with pytest.raises(VerificationError, match="tensor c is no plain dense tensor"):
            check_tensors({"c": tensor}, "w.pth")


NESTED: dict[str, tuple[Any, int]] = {
    "a key of any name": ({"net": {"w": EYE, "b": EYE[0]}}, 20),
    "scales beside": ({"w": {"q": EYE.char(), "s": EYE[0, 0]}}, 17),
    "two numbers a byte": ({"w": (EYE.byte(), [4, 8], EYE[0, 0])}, 17),
    "a list": ({"layers": [{"w": EYE}, {"w": EYE}]}, 32),
    "a checkpoint": ({"model": {"w": EYE}, "optimizer": {"state": {0: {"m": EYE}}}}, 16),
}


@pytest.mark.parametrize("kind", NESTED)
def test_numbers_in_containers_are_counted(kind: str, tmp_path: Path) -> None:
    content, held = NESTED[kind]
    panel_folders.write(tmp_path, model_loader="def load_model(path): ...")
    torch.save(content, tmp_path / "model.pth")
    assert check_stored(read_submission(tmp_path)) == ([], held)


def test_containers_that_hold_themselves_are_counted_once() -> None:
    loop: dict[str, Any] = {"w": EYE}
    loop["again"] = [loop, loop]
    assert panel.tensors_in(loop) == [EYE]


def test_an_explanation_of_numbers_is_given_where_it_is_known() -> None:
    assert count_warnings(100, 90, 100) == [] and count_warnings(None, 5, 900) == [] and count_warnings(9, None, None) == []
    assert "lie in buffers or are frozen" in count_warnings(100, 10, 100)[0]
    assert "buffers" not in count_warnings(100, 10, 10)[0] and "state dict holds 10" in count_warnings(100, 10, 10)[0]
    assert "unpacked from these" in count_warnings(5000, 9000, 9000)[0]


# ------------------------------------------------------------------------------------------- other protocols of pickle


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_file_is_told_in_every_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    for content, kind in (({"a": EYE}, "state dict"), (nn.Linear(1, 1).state_dict(), "state dict"),
                          ({"at": pathlib.PurePosixPath("x"), "a": EYE}, "state dict"),
                          (nn.Linear(1, 1), "pickled module")):
        torch.save(content, tmp_path / "w.pth", pickle_protocol=protocol)
        assert file_kind(tmp_path / "w.pth")[0] == kind
    assert file_kind(tmp_path / "w.pth")[1] == "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize(("protocol", "extra"), [
    pytest.param(4, {}, marks=pytest.mark.slow), (2, {"saved_to": pathlib.PurePosixPath("x")})])
def test_weights_that_only_the_sandbox_can_open_are_loaded_there(protocol: int, extra: dict[str, Any], folder: Path,
                                                                  evaluate: Evaluate) -> None:
    weights = torch.load(folder / "best_weights.pth", weights_only=True)
    torch.save({"state_dict": weights, **extra}, folder / "best_weights.pth", pickle_protocol=protocol)
    code, result, error = evaluate(folder, ALLOW)
    assert code == 0, error
    details = result["details"]
    assert details["loaded_by"] == "model.py: SlimResNet18" and details["parameters"]["all"]
    assert "parameters.all" in details["sandbox"]["stated_by_the_code"]


# ------------------------------------------------------------------------------------ random weights, as far as known


def test_weights_are_overwritten_only_by_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "load_state_dict", nn.Module.load_state_dict)  # is put back
    stand_ins = offline.StandIns()
    stand_ins._patch_loading()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    own = model.state_dict()
    own.update(offline.NoWeights())
    model.load_state_dict(own)  # its own numbers again
    assert stand_ins.origins(model) == {"kept": 0, "weights": 2, "loaded": 0, "loads": False}
    assert "random as far as is known" in what_became_of_them(stand_ins.origins(model))
    stand_ins.asked.append("net.pth")
    model.load_state_dict(offline.NoWeights())
    assert "2 of 2 weight tensors are random" in what_became_of_them(stand_ins.origins(model))
    model.load_state_dict({"0.weight": torch.ones(3, 3)}, strict=False)
    assert "kept them: 1 of 2" in what_became_of_them(stand_ins.origins(model))
    model[1].load_state_dict({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    assert what_became_of_them(stand_ins.origins(model)) == ", which it overwrote"
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert "1 of 2 weight tensors are as loaded" in what_became_of_them(stand_ins.origins(model))


def test_stand_ins_say_what_is_missing() -> None:
    import timm
    with pytest.raises(AttributeError, match="no network here: these pretrained weights were not downloaded"):
        offline.NoWeights()["conv1.weight"].shape  # noqa: B018
    assert offline.timm_architecture("timm/resnet18.a1_in1k") == "resnet18.a1_in1k" and timm.is_model("resnet18")
    assert offline.timm_architecture("timm/of_nobody") is None and offline.timm_architecture("me/resnet18") is None
