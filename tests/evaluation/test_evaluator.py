"""The evaluator: measuring, and submissions that lie, leave their folder or try to run code."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model_loader
from architectures.build import build
from architectures.architecture import Architecture
from compress.evaluation.measure import measure_latency
from compress.evaluation.score import RESULT_KEYS
from compress.evaluation.runtimes import load_model
from metadata.errors import UserError, VerificationError
from tests.helpers.architectures import layer, tiny
from tests.helpers.submissions import edit_json, edit_weights, rename_weights, restate, weights_of


# --------------------------------------------------------------------------------------------------- architectures


def test_a_network_that_would_take_for_ever_is_not_run(tmp_path: Path) -> None:
    slow = tiny(input_shape=[4096, 224, 224])
    slow["layers"][0].update(in_channels=4096, out_channels=4096, kernel_size=[7, 7])
    slow["layers"][3].update(in_features=4096)
    (tmp_path / ARCH).write_text(json.dumps(slow))
    (tmp_path / "w.pth").write_bytes(b"never read")
    with pytest.raises(VerificationError, match="multiply-adds an image are over the limit"):
        load_model(tmp_path / "w.pth")


# ------------------------------------------------------------------------------------------------------ measuring


def test_latency_counts_runs_and_orders_percentiles() -> None:
    model = build(Architecture.model_validate(tiny())).eval()
    before = torch.get_num_threads()
    latency = measure_latency(model, (3, 8, 8), runs=30, warmup=3, threads=1)
    assert (latency.runs, latency.warmup, latency.threads) == (30, 3, 1)
    assert 0 < latency.p5_ms <= latency.median_ms <= latency.p95_ms
    assert torch.get_num_threads() == before


def test_model_output_that_is_no_logits_is_refused() -> None:
    from compress.evaluation.measure import measure_accuracy
    from metadata.schemas import Preprocessing
    images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    nan = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    torch.nn.init.constant_(nan[1].bias, float("nan"))
    with pytest.raises(VerificationError, match="finite logits"):
        measure_accuracy(nan, iter([(images, labels)]), Preprocessing(), 4)


# ------------------------------------------------------------------------------------- broken and hostile packages


@pytest.fixture
def copy(submission: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(submission, tmp_path / "submission"))


def compressed_members(folder: Path) -> None:
    """The same weights in a deflated archive, which could unpack to a thousand times its size."""
    path = weights_of(folder)
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.namelist():
            new.writestr(item, old.read(item))


def code_in_a_pickle(folder: Path) -> None:
    """A .pth whose pickle would run a command when opened without weights_only."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    evil = b"cos\nsystem\n(S'touch " + str(folder / "executed").encode() + b"'\ntR."
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as old, zipfile.ZipFile(weights_of(folder), "w") as new:
        for item in old.namelist():
            new.writestr(item, evil if item.endswith("data.pkl") else old.read(item))


ARCH, META = "trained_pruned_architecture.json", "model_metadata.json"
ATTACKS: dict[str, tuple[Callable[[Path], Any], bool, str]] = {
    "weights missing": (lambda f: weights_of(f).unlink(), False, "is not there"),
    "weights empty": (lambda f: weights_of(f).write_bytes(b""), True, "the file is empty"),
    "weights cut short": (lambda f: weights_of(f).write_bytes(weights_of(f).read_bytes()[:2000]), True,
                          "cut short"),
    "weights swapped unstated": (lambda f: edit_weights(f, lambda w: w["fc.bias"].add_(1)), False,
                                 "its bytes are not those"),
    "pickle with code": (code_in_a_pickle, True, "not a PyTorch state dict"),
    "tensor missing": (lambda f: edit_weights(f, lambda w: w.pop("fc.bias")), True, "tensor fc.bias is missing"),
    "tensor extra": (lambda f: edit_weights(f, lambda w: w.update(hidden=torch.zeros(9))), True, "tensor hidden"),
    "tensor misshapen": (lambda f: edit_weights(f, lambda w: w.update({"fc.bias": torch.zeros(9)})), True,
                         "tensor fc.bias is [9]"),
    "tensor of another dtype": (lambda f: edit_weights(f, lambda w: w.update(
        {"fc.weight": w["fc.weight"].float()})), True, "expected torch.int8"),
    "NaN": (lambda f: edit_weights(f, lambda w: w["fc.bias"].fill_(float("nan"))), True, "NaN"),
    "infinite": (lambda f: edit_weights(f, lambda w: w["fc.weight_scale"].fill_(float("inf"))), True, "infinite"),
    "tensor sparse": (lambda f: edit_weights(f, lambda w: w.update({"fc.bias": w["fc.bias"].to_sparse()})), True,
                      "no plain dense tensor"),
    "tensor without numbers": (lambda f: edit_weights(f, lambda w: w.update({"fc.bias": w["fc.bias"].to("meta")})), True,
                               "fc.bias"),
    "key that is no name": (lambda f: edit_weights(f, lambda w: w.update({7: torch.zeros(1)})), True,
                            "expected a state dict"),
    "architecture a pipe": (lambda f: ((f / ARCH).unlink(), os.mkfifo(f / ARCH)), False, "not a plain file"),
    "a link to itself": (lambda f: os.symlink(f / "x", f / "x"), False, "cannot be resolved"),
    "not a state dict": (lambda f: torch.save([1, 2], weights_of(f)), True, "expected a state dict"),
    "architecture missing": (lambda f: (f / ARCH).unlink(), False, "is not there"),
    "architecture no JSON": (lambda f: (f / ARCH).write_text("{"), True, "not valid JSON"),
    "pruning info lies": (lambda f: edit_json(f, ARCH, lambda a: a["layers"][0]["pruning_info"].update(
        remaining_channels=1)), True, "remaining_channels is 1"),
    "channels lie": (lambda f: edit_json(f, ARCH, lambda a: (
        a["layers"][0].update(out_channels=64), a["layers"][0]["pruning_info"].update(remaining_channels=64))), True,
        "does not fit its inputs"),
    "architecture huge": (lambda f: os.truncate(f / ARCH, 2**25), True, "over JSON's limit"),
    "architecture with a cycle": (lambda f: edit_json(f, ARCH, lambda a: a["layers"][1].update(
        inputs=[a["layers"][2]["name"]])), True, "is no earlier layer"),
    "weights padded": (lambda f: os.truncate(weights_of(f), 2**24), True, "its tensors need"),
    "weights huge": (lambda f: edit_json(f, META, lambda m: m["files"][m["weights_file"]].update(bytes=2**40)), False,
                     "over the limit"),
    "metadata missing": (lambda f: (f / META).unlink(), False, "there is neither"),
    "metadata no JSON": (lambda f: (f / META).write_text("nonsense"), False, "not valid JSON"),
    "metadata is a list": (lambda f: (f / META).write_text("[]"), False, "model_metadata.json"),
    "unknown schema": (lambda f: edit_json(f, META, lambda m: m.update(schema=2)), False, "schema"),
    "unknown format": (lambda f: edit_json(f, META, lambda m: m.update(model_format="tflite")), False, "model_format"),
    "wrong types": (lambda f: edit_json(f, META, lambda m: m.update(input_shape="large")), False, "input_shape"),
    "path out of the folder": (lambda f: rename_weights(f, "../w.pth"), False, "weights_file"),
    "path out, later": (lambda f: rename_weights(f, "a/../../w.pth"), False, "outside the submission"),
    "absolute path": (lambda f: edit_json(f, META, lambda m: m.update(architecture_file="/etc/passwd")), False,
                      "architecture_file"),
    "null in a name": (lambda f: rename_weights(f, "w\0.pth"), False, "weights_file"),
    "surrogate in a name": (lambda f: rename_weights(f, "w\ud800.pth"), False, "weights_file"),
    "endless name": (lambda f: rename_weights(f, "w" * 300), False, "weights_file"),
    "hash not stated": (lambda f: edit_json(f, META, lambda m: m.update(files={})), False, "does not state the hash"),
    "zip bomb": (compressed_members, True, "members are compressed"),
    "four odd bytes": (lambda f: weights_of(f).write_bytes(b"\x80\x02\x58\x01"), True, "not a PyTorch state dict"),
    "parameters lie": (lambda f: edit_json(f, META, lambda m: m.update(parameters=1)), False, "states 1 parameters"),
    "macs lie": (lambda f: edit_json(f, META, lambda m: m.update(macs=1)), False, "states 1 macs"),
    "type lies": (lambda f: edit_json(f, META, lambda m: m.update(architecture="GPT")), False, "the architecture is GPT"),
    "quantization lies": (lambda f: edit_json(f, META, lambda m: m["quantization"]["layers"].update(
        conv1="float32: so they say")), False, "quantization"),
    "scheme lies": (lambda f: edit_json(f, META, lambda m: m["quantization"].update(scheme="none")), False,
                    "quantization"),
    "link out of the folder": (lambda f: (weights_of(f).rename(f.parent / "w.pth"), os.symlink(
        f.parent / "w.pth", f / "compressed_slimresnet18.pth")), False, "outside the submission"),
    "other classes": (lambda f: edit_json(f, META, lambda m: m.update(class_names=[str(i) for i in range(1, 11)])),
                      False, "does not know 1 of the 10 classes here: 0; it knows 1, 10, 2, 3, 4 and 5 more"),
    "classes contradict": (lambda f: edit_json(f, META, lambda m: m.update(num_classes=9)), False, "class_names has 10"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_broken_submissions_score_zero_in_one_line(attack: str, copy: Path, few: Path, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    damage, restated, said = ATTACKS[attack]
    damage(copy)
    if restated:
        restate(copy)
    output = tmp_path / "results.json"
    code = model_loader.main(["--submission_dir", str(copy), "--data_dir", str(few), "--output_file", str(output)])
    error = capsys.readouterr().err
    assert code == 1 and said in error and len(error.strip().splitlines()) == 1, error
    result = json.loads(output.read_text())
    assert all(result[key] == 0 for key in RESULT_KEYS)
    assert result["details"]["status"].startswith("failed: ") and said in result["details"]["status"]
    assert not (copy / "executed").exists()


@pytest.mark.parametrize(("change", "said"), [
    (lambda a: a.update({"--submission_dir": "/nowhere"}), "no such folder"),
    (lambda a: a.update({"--data_dir": "/nowhere"}), "no such data folder"),
    (lambda a: a.update({"--output_file": "/nowhere/results.json"}), "there is no folder"),
    (lambda a: a.update({"--baseline_size": "0"}), "--baseline_size: expected a positive number"),
    (lambda a: a.update({"--baseline_accuracy": "nan"}), "--baseline_accuracy: expected a positive number"),
    (lambda a: a.update({"--runs": "0"}), "--runs: expected 1 to"),
    (lambda a: a.update({"--threads": "0"}), "--threads: expected 1 to"),
    (lambda a: a.update({"--threads": "99999999999"}), "--threads: expected 1 to"),
    (lambda a: a.update({"--memory_limit_mb": "9" * 13}), "--memory_limit_mb: expected 256 to"),
    (lambda a: a.update({"--baseline_size": "1e308"}), "--baseline_size: expected a positive number"),
    (lambda a: a.update({"--submission_dir": "x" * 5000}), "File name too long"),
    (lambda a: a.update({"--min_accuracy": "101"}), "--min_accuracy: expected a percentage"),
    (lambda a: a.update({"--time_limit_s": "inf"}), "--time_limit_s: expected a positive number"),
    (lambda a: a.update({"--backend": "onnxruntime"}), "runs on torch"),
    (lambda a: a.update({"--compare": "/nowhere"}), "no such folder"),
])
def test_users_mistakes_exit_2_and_score_zero(change: Callable[[dict[str, str]], None], said: str, submission: Path,
                                              few: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"--submission_dir": str(submission), "--data_dir": str(few),
                 "--output_file": str(tmp_path / "results.json")}
    change(arguments)
    assert model_loader.main([word for pair in arguments.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    if (output := Path(arguments["--output_file"])).parent.is_dir():
        result = json.loads(output.read_text())
        assert result["total_score"] == 0 and said in result["details"]["status"]


def test_damaged_test_image_is_named(submission: Path, few: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(few, tmp_path / "data")
    victim = sorted((data / "3").iterdir())[0]
    victim.write_bytes(b"no image")
    assert model_loader.main(["--submission_dir", str(submission), "--data_dir", str(data), "--output_file",
                              str(tmp_path / "r.json")]) == 2
    assert str(victim) in capsys.readouterr().err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["total_score"] == 0 and "not a readable image" in result["details"]["status"]


def test_names_that_are_not_unicode_do_not_stop_the_result(submission: Path, few: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(submission, tmp_path / "folder"))
    (folder / "n\udcff.txt").write_text("")
    output = tmp_path / "r.json"
    assert model_loader.main(["--submission_dir", str(folder), "--data_dir", str(few), "--output_file",
                              str(output)]) == 0
    assert "n\udcff.txt" in json.loads(output.read_text())["details"]["bytes"]["files"]


def test_what_nobody_foresaw_ends_in_one_line_and_a_result(submission: Path, few: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    def broken(options: argparse.Namespace) -> dict[str, Any]:
        raise ArithmeticError("two\nlines")

    arguments = ["--submission_dir", str(submission), "--data_dir", str(few), "--output_file",
                 str(tmp_path / "r.json")]
    assert model_loader.main(arguments, broken) == 1
    error = capsys.readouterr().err
    assert "ArithmeticError: two" in error and "--debug" in error and len(error.strip().splitlines()) == 1
    assert "broke down" in json.loads((tmp_path / "r.json").read_text())["details"]["status"]
    with pytest.raises(ArithmeticError):
        model_loader.main([*arguments, "--debug"], broken)


def test_output_must_be_a_plain_file(submission: Path, few: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path / "pipe", tmp_path):
        assert model_loader.main(["--submission_dir", str(submission), "--data_dir", str(few), "--output_file",
                                  str(output)]) == 2
        assert "not a plain file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def test_architecture_without_weights_is_refused(tmp_path: Path) -> None:
    content = tiny(num_classes=3, output_shape=[3], layers=[layer("pool", "Mean", ["input"], dim=[2, 3])])
    (tmp_path / ARCH).write_text(json.dumps(content))
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(VerificationError, match="no layer with weights"):
        load_model(tmp_path / "w.pth")


def test_load_model_takes_the_file_or_the_folder(submission: Path) -> None:
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32))
    by_file, by_folder = load_model(str(weights_of(submission))), load_model(submission)
    assert not by_file.training and torch.equal(by_file(images), by_folder(images))
    with pytest.raises(UserError, match="no such file"):
        load_model(submission / "nothing.pth")
