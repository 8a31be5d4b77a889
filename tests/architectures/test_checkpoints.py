"""Checkpoints of other people's training scripts: what is taken from them, and that none runs code."""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from architectures.checkpoints import Checkpoint, open_checkpoint
from metadata.errors import UserError, first_line


class Net(nn.Module):
    """A small network with a batch norm."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)


MODEL = Net()
STATE = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def refused(path: Path, model: nn.Module = MODEL, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path, model, **options)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path)), text
    for advice in ("weights_only", "safe_globals", "trust", "two options", "\033"):
        assert advice not in text, text
    return text


def assert_is(found: Checkpoint, state: dict[str, Tensor] = STATE) -> None:
    assert list(found.weights) == list(STATE)
    assert all(torch.equal(found.weights[name], state[name]) for name in STATE)


ARGS = argparse.Namespace(lr=0.1, model="resnet18", nested=argparse.Namespace(amp=True))


@pytest.mark.parametrize("content", [
    STATE,
    {"model": STATE, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}, "epoch": 3,
     "lr_scheduler": {"base_lrs": [0.1]}, "args": ARGS},
    {"state_dict": STATE, "arch": "resnet18", "epoch": 3, "args": ARGS, "metric": np.float64(71.2), "version": 2},
    {"state_dict": prefixed("module."), "best_acc1": torch.tensor(71.2), "seen": np.int64(3), "ok": np.bool_(True),
     "name": np.str_("run"), "half": np.float16(1), "when": 0.5},
    {"net": prefixed("module."), "acc": 93.2, "epoch": 199},
    {"network": prefixed("_orig_mod.")},
    {"weights": prefixed("_orig_mod.module.")},
    {"anything": {"inside": prefixed("module._orig_mod.")}},
    {"state_dict": prefixed("model."), "pytorch-lightning_version": "2.2", "hyper_parameters": {"lr": 0.1},
     "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "best_k_models": {}}},
     "loops": {"fit_loop": {"state_dict": {}}}},
    {"state_dict": prefixed("model._orig_mod.")},
    {"model_state": {"conv._orig_mod.weight" if name == "conv.weight" else name: tensor for name, tensor in STATE.items()}},
    prefixed("backbone."),
    {"v1.0.0": {"state_dict": STATE}}, {"a.b": {"c.d": {"e.f": STATE}}},
    AveragedModel(MODEL).state_dict(),
    {**STATE, "epoch": 3},
    {name: tensor for name, tensor in STATE.items() if "num_batches" not in name},
    {"model": {name: nn.Parameter(tensor) if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}},
], ids=lambda content: "-".join(list(content)[:3])[:40])
def test_what_training_scripts_save_is_taken(content: Any, tmp_path: Path) -> None:
    assert_is(open_checkpoint(saved(content, tmp_path / "checkpoint.pth.tar"), MODEL))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".ckpt", ".bin", ".safetensors", ""])
def test_the_content_decides_and_not_the_name(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    torch.save({"net": STATE}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    if suffix != ".safetensors":
        assert_is(open_checkpoint(saved({"net": STATE}, tmp_path / f"one{suffix}"), MODEL))
        assert_is(open_checkpoint((tmp_path / "legacy").rename(tmp_path / f"two{suffix}"), MODEL))
    save_file(prefixed("module."), tmp_path / "three.safetensors")
    assert_is(open_checkpoint((tmp_path / "three.safetensors").rename(tmp_path / f"four{suffix}"), MODEL))


def test_of_several_that_fit_the_weights_as_trained_come_first_and_it_is_said(tmp_path: Path) -> None:
    path = saved({"model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.", OTHER)}, "model": STATE,
                  "best": OTHER, "args": ARGS}, tmp_path / "two.pth")
    found = open_checkpoint(path, MODEL)
    assert_is(found)
    assert found.notes == ["takes the weights under model; best, model_ema.module would fit too"]
    assert_is(open_checkpoint(path, MODEL, key="model_ema"), OTHER)
    assert "no state dict below the key 'ema'; it holds tensors under model_ema, model, best" in refused(path, key="ema")
    student = saved({**prefixed("student."), **prefixed("teacher.", OTHER)}, tmp_path / "pair.pth")
    found = open_checkpoint(student, MODEL)
    assert_is(found)
    assert found.notes[0] == "takes the weights under student; teacher would fit too"
    assert_is(open_checkpoint(student, MODEL, key="teacher"), OTHER)


def test_tensors_of_other_modules_are_left_out_and_named(tmp_path: Path) -> None:
    path = saved({"state_dict": {**prefixed("model."), "criterion.weight": torch.ones(4)}}, tmp_path / "lightning.ckpt")
    found = open_checkpoint(path, MODEL)
    assert_is(found)
    assert found.notes == ["leaves out what is not under state_dict.model: 1 tensors, first criterion.weight"]


def divided(outer: str = "", head: str = "head.", body: str = "backbone.",
            state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    """Return a state dict whose last layer lies behind another prefix, as mmpretrain saves it."""
    return {f"{outer}{head if name.startswith('fc') else body}{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(("outer", "head", "body", "joined"), [
    ("", "head.", "backbone.", "state_dict.backbone, state_dict.head"), ("", "head.", "", "state_dict, state_dict.head"),
    ("module.", "head.", "backbone.", "state_dict.module.backbone, state_dict.module.head"),
    ("", "head.", "model.backbone.", "state_dict.model.backbone, state_dict.head")])
def test_a_backbone_and_its_head_are_joined(outer: str, head: str, body: str, joined: str, tmp_path: Path) -> None:
    state = {**divided(outer, head, body), "neck.strange": torch.ones(1)}
    found = open_checkpoint(saved({"state_dict": state}, tmp_path / "divided.pth"), MODEL)
    assert_is(found)
    assert found.notes == [f"joins the tensors under {joined}",
                           "leaves out what is not of the model: 1 tensors, first neck.strange"]


def test_what_is_not_joined(tmp_path: Path) -> None:
    text = refused(saved(divided(state=Net(1000).state_dict()), tmp_path / "wide.pth"), num_classes=4)
    assert "tensor fc.weight is [1000, 4], expected [4, 4]; the teacher has 1000 classes" in text
    twice = {**divided(), **{f"neck.{name}": STATE[name] for name in ("fc.weight", "fc.bias")}}
    for state, count in ((twice, 4), (divided(head="decoder."), 2)):
        text = refused(saved({"state_dict": state}, tmp_path / "twice.pth"))
        assert "under state_dict.backbone do not fit the model: 2 of the model's 9 missing (first fc.weight)" in text
        assert f"beside them: {count} tensors, first {list(state)[7]}" in text
    whole = {**prefixed("backbone."), **{f"head.{name}": STATE[name] + 1 for name in ("fc.weight", "fc.bias")}}
    found = open_checkpoint(saved(whole, tmp_path / "whole.pth"), MODEL)
    assert_is(found)
    assert found.notes == ["leaves out what is not under backbone: 2 tensors, first head.fc.weight"]


@pytest.mark.parametrize("name", ["folder", "folder.safetensors"])
def test_a_folder_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert "a folder, expected a file of torch.save or of safetensors; name the file in it" in refused(tmp_path / name)
    (tmp_path / name / "__0_0.distcp").touch()
    assert f"format_utils dcp_to_torch {tmp_path / name} FILE" in refused(tmp_path / name)
    assert "there is no such file" in refused(tmp_path / f"no_{name}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_precisions_are_cast(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}
    path = tmp_path / f"half{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    weights = open_checkpoint(path, MODEL).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}
    assert torch.equal(weights["fc.weight"], state["fc.weight"].float())


def test_how_names_and_shapes_differ(tmp_path: Path) -> None:
    strange = {"stem.weight": torch.ones(2), **{name: STATE[name] for name in ("fc.weight", "conv.bias")}}
    text = refused(saved({"model": strange}, tmp_path / "strange.pth"))
    assert ("the tensors under model do not fit the model: 6 of the model's 9 missing (first conv.weight); 1 unknown to "
            "the model (first stem.weight)") in text
    wide = Net(1000).state_dict()
    text = refused(saved(wide, tmp_path / "wide.pth"), num_classes=4)
    assert "tensor fc.weight is [1000, 4], expected [4, 4]; the teacher has 1000 classes, the data has 4" in text
    text = refused(saved({"model": {**STATE, "fc.weight": torch.full((4, 4), torch.nan)}}, tmp_path / "nan.pth"))
    assert "tensor fc.weight holds NaN" in text
    text = refused(saved({**STATE, "conv.weight": STATE["conv.weight"].to(torch.int8)}, tmp_path / "int.pth"))
    assert "conv.weight is torch.int8" in text and "expected dense torch.float32" in text
    assert "got a dict of epoch, args" in refused(saved({"epoch": 3, "args": {}}, tmp_path / "none.pth"))
    assert "got a list" in refused(saved([1, 2], tmp_path / "list.pth"))


def test_the_first_tensor_in_the_models_order_is_named(tmp_path: Path) -> None:
    """Among forty, so that an order by hashes, which differs between processes, would show."""
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(40)])
    path = saved({f"layer{number}.kernel": torch.ones(1) for number in range(40)}, tmp_path / "other.pth")
    text = refused(path, model)
    assert "40 of the model's 40 missing (first 0.weight); 40 unknown to the model (first layer0.kernel)" in text
    path = saved({f"{number}.weight": torch.ones(3, 3) for number in reversed(range(40))}, tmp_path / "shapes.pth")
    assert "40 of another shape, first tensor 0.weight is [3, 3], expected [2, 2]" in refused(path, model)


# ---------------------------------------------------------------------------------------------------- hostile files


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


class Custom:
    """A class of a training script."""


@pytest.mark.parametrize(("entry", "named"), [
    (Call(os.system, "true"), "system"),
    (Call(eval, "1"), "eval"),
    (Custom(), "Custom"),
    (pathlib.PurePosixPath("/tmp"), "PurePosixPath"),
    (np.arange(3), "_reconstruct"),
    (argparse.ArgumentParser, "ArgumentParser"),
    (argparse.Namespace(path=Call(os.system, "true")), "system"),
], ids=["system", "eval", "own-class", "path", "numpy-array", "argparse-class", "in-a-namespace"])
def test_the_object_in_the_way_is_named(entry: Any, named: str, tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"model": STATE, "args": entry}, tmp_path / "objects.pth", _use_new_zipfile_serialization=zipped)
        text = refused(tmp_path / "objects.pth")
        assert "it holds an object of the kind" in text and named in text
        assert text.endswith("; save the tensors alone: torch.save(model.state_dict(), FILE)")


@pytest.mark.parametrize("error", [SystemError("strange"), AssertionError(), ZeroDivisionError(), ImportError("none")])
def test_whatever_the_reader_raises_is_one_line(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise error
    monkeypatch.setattr(torch, "load", fails)
    assert first_line(error) in refused(saved(STATE, tmp_path / "any.pth"))


def test_a_namespace_can_set_nothing_but_entries_of_a_dict(tmp_path: Path) -> None:
    """A hostile state names attributes that Python looks up: the stand-in keeps them as data."""
    hostile = argparse.Namespace()
    vars(hostile).update({"__class__": "os", "update": "x", "items": 3, "__setstate__": None, "__reduce__": "y"})
    assert_is(open_checkpoint(saved({"model": STATE, "args": hostile}, tmp_path / "hostile.pth"), MODEL))


def test_nothing_stays_allowed_after_a_file_was_read(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())  # torch itself may have some
    open_checkpoint(saved({"model": STATE, "args": ARGS}, tmp_path / "one.pth"), MODEL)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(Exception, match="Namespace"):
        torch.load(tmp_path / "one.pth", weights_only=True)


def rewritten(path: Path, data: bytes) -> Path:
    """Put another pickle into a file of torch.save."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, data if member.filename.endswith("data.pkl") else old.read(member))
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize("data", [
    b"\x80\x02cargparse\nNamespace\nX\x01\x00\x00\x00x\x85R.",  # Namespace("x")
    b"\x80\x02cargparse\nNamespace\n)\x81X\x01\x00\x00\x00x\x85b.",  # a state that is no dict
    b"\x80\x02cnumpy\ndtype\n)\x81cargparse\nNamespace\n)\x81b.",
    b"\x80\x02cnumpy.core.multiarray\nscalar\n)R.", b"\x80\x02cnumpy.core.multiarray\nscalar\n(K\x01K\x02K\x03tR.",
    b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.", b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01h\x00s.",
    pickle.dumps({"a": 1}, protocol=5), b"\x80\x02", b"", b"\x80\x02h\xff."])
def test_malformed_pickles_are_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    refused(rewritten(saved({"model": STATE}, tmp_path / "bad.pth"), data))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("content", "said"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46827520\n", "a pointer of Git LFS"),
    (b"\n<!DOCTYPE html><html><title>Quota exceeded</title></html>", "a page of a web site"), (b"", "the file is empty")])
def test_what_a_failed_download_leaves_is_named(content: bytes, said: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert said in refused(path)


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = saved(STATE, tmp_path / "weights.pth")
    path.write_bytes(path.read_bytes()[:1000])
    assert "cut short" in refused(path)


def test_torchscript_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants it no more, but such files are there
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "script.pt"))  # type: ignore[no-untyped-call]
    assert "TorchScript" in refused(tmp_path / "script.pt")


def header(content: dict[str, Any]) -> bytes:
    """Return the start of a safetensors file."""
    return struct.pack("<Q", 200) + json.dumps(content).encode().ljust(200)


@pytest.mark.parametrize("data", [
    struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10**9) + b"{" + b" " * 100, struct.pack("<Q", 2) + b"[]",
    header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}) + b"1234",
    b"nonsense"])
def test_hostile_safetensors_are_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(data)
    assert "not a safetensors file" in refused(tmp_path / "bad.safetensors")


# ------------------------------------------------------------------------------------------------------ class names


@pytest.mark.parametrize("stated", [
    {"class_to_idx": {"dog": 1, "cat": 0, "fox": 2, "emu": 3}}, {"classes": ["cat", "dog", "fox", "emu"]},
    {"class_names": ("cat", "dog", "fox", "emu")}, {"idx_to_class": {"1": "dog", "0": "cat", "2": "fox", "3": "emu"}},
    {"idx_to_class": {1: "dog", 0: "cat", 2: "fox", 3: "emu"}}, {"meta": {"categories": ["cat", "dog", "fox", "emu"]}},
    {"meta": {"CLASSES": ("cat", "dog", "fox", "emu"), "epoch": 3}},
    {"meta": {"dataset_meta": {"classes": ("cat", "dog", "fox", "emu"), "palette": None}}},
    {"hyper_parameters": {"class_names": ["cat", "dog", "fox", "emu"]}},
    {"args": argparse.Namespace(classes=["cat", "dog", "fox", "emu"])},
    {"classes": [np.str_(name) for name in ("cat", "dog", "fox", "emu")]}], ids=lambda stated: next(iter(stated)))
def test_class_names_are_found(stated: dict[str, Any], tmp_path: Path) -> None:
    found = open_checkpoint(saved({"model": STATE, **stated}, tmp_path / "named.pth"), MODEL)
    assert found.class_names == ["cat", "dog", "fox", "emu"]


def test_class_names_in_the_metadata_of_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    save_file(STATE, tmp_path / "named.safetensors", {"class_names": json.dumps(["cat", "dog", "fox", "emu"])})
    assert open_checkpoint(tmp_path / "named.safetensors", MODEL).class_names == ["cat", "dog", "fox", "emu"]


@pytest.mark.parametrize("stated", [{"classes": 4}, {"classes": ["a", "a", "b", "c"]}, {"class_to_idx": {"a": 0, "b": 5}},
                                    {"classes": []}, {"idx_to_class": {"x": "y"}},
                                    {"idx_to_class": {float("inf"): "a"}}, {}])
def test_what_names_no_classes(stated: dict[str, Any], tmp_path: Path) -> None:
    assert open_checkpoint(saved({"model": STATE, **stated}, tmp_path / "unnamed.pth"), MODEL).class_names is None


@pytest.mark.parametrize(("text", "line"), [
    ("Weights only load failed. This file can still be loaded, to do so you have two options, do it only if you trust it"
     "\n\t(1) set weights_only=False\nWeightsUnpickler error: Unsupported global: GLOBAL __main__.Net was not an allowed "
     "global by default.", "it holds an object of the kind __main__.Net, which is no data"),
    ("Weights only load failed. set `weights_only` to `False`\nPlease file an issue ... `weights_only=True` ...\n\n"
     "Unsupported operand 149\n\nCheck the documentation", "Unsupported operand 149"),
    ("Object arrays cannot be loaded when allow_pickle=False", "ValueError"),
    ("a plain message\nwith more", "a plain message")])
def test_a_librarys_advice_to_load_unsafely_is_never_passed_on(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line
