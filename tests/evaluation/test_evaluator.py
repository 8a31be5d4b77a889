"""The evaluator: scores, measuring, and submissions that lie, leave their folder or try to run code."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model_loader
from architectures.build import build, check_shapes
from architectures.counting import count_macs, count_parameters
from architectures.architecture import Architecture
from compress.evaluation.measure import measure_latency
from compress.evaluation.score import RESULT_KEYS, guarded_score, score
from compress.evaluation.submission import load_model
from metadata.errors import UserError, VerificationError
from metadata.files import read_json, write_atomically
from metadata.machine import memory_limit
from metadata.schemas import Baselines
from tests.helpers.commands import PROJECT
from tests.helpers.submissions import edit_json, edit_weights, rename_weights, restate, weights_of


def layer(name: str, kind: str, inputs: list[str], **options: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "inputs": inputs, **options}


def tiny(**changes: Any) -> dict[str, Any]:
    """A small architecture as JSON, with changes to its top level."""
    return {"schema": 1, "model_type": "Tiny", "num_classes": 4, "input_shape": [3, 8, 8], "output_shape": [4],
            "layers": [layer("conv", "Conv2d", ["input"], in_channels=3, out_channels=6, kernel_size=[3, 3]),
                       layer("relu", "ReLU", ["conv"]), layer("pool", "Mean", ["relu"], dim=[2, 3]),
                       layer("fc", "Linear", ["pool"], in_features=6, out_features=4)], **changes}


# --------------------------------------------------------------------------------------------------------- scores


def test_score_is_the_users_formula() -> None:
    scores = score(10.0, 5.0, 60.0, Baselines())
    assert scores == {"size_score": 5.0, "latency_score": 2.0, "accuracy_score": 0.75,
                      "total_score": pytest.approx(0.3 * 5 + 0.3 * 2 + 0.4 * 0.75)}


# A public competition with this formula, baselines 44.7 MB, 30 ms, 40 %, 100 classes: MB, ms, %, published total.
# The most accurate entry's latency was not published; it follows from its total.
COMPETITION = Baselines(size_mb=44.7, latency_ms=30.0, accuracy=40.0)
LEADERBOARD = {"winner": (0.31, 4.71, 0.82, 45.31), "second": (0.35, 8.63, 8.38, 39.43),
               "third": (0.43, 2.13, 2.16, 35.36), "best useful": (1.58, 7.0, 18.40, 9.94),
               "baseline ResNet18": (42.91, 30.6, 28.7, 0.90), "most accurate": (21.04, 20.6, 23.60, 1.31)}


def test_guarded_score_ranks_the_useless_last_on_the_public_leaderboard() -> None:
    plain, guarded = {}, {}
    for name, (size, latency, accuracy, published) in LEADERBOARD.items():
        scores = score(size, latency, accuracy, COMPETITION)
        plain[name] = scores["total_score"]
        assert plain[name] == pytest.approx(published, rel=0.03)
        guarded[name] = guarded_score(scores, accuracy / 100, 0.40, 0.01)
    assert max(plain, key=plain.__getitem__) == "winner"
    ranked = sorted(guarded, key=guarded.__getitem__, reverse=True)
    assert ranked[0] == "best useful" and ranked[-2:] == ["third", "winner"] and guarded["winner"] == 0.0
    assert guarded["third"] < guarded["baseline ResNet18"] / 3


def test_guarded_score_is_zero_at_chance_and_capped() -> None:
    useful = score(1.58, 7.0, 18.4, COMPETITION)
    assert 0 < guarded_score(useful, 0.184, 0.4, 0.01) < useful["total_score"]
    assert guarded_score(useful, 0.184, 0.4, 0.01, floor=0.2) == 0.0
    assert guarded_score(useful, 0.184, 0.4, 0.01, lower=0.009) == 0.0
    assert guarded_score(useful, 0.184, 0.4, 0.184) == 0.0
    tiny_and_fast = score(1e-6, 1e-6, 50.0, Baselines())
    skill = (0.5 - 0.1) / (0.8 - 0.1)
    assert guarded_score(tiny_and_fast, 0.5, 0.8, 0.1) == pytest.approx(skill * (3 + 3) + 0.4 * skill)
    # A baseline that guesses is no yardstick: at least a tenth of the way from chance to perfection counts as skill 1.
    assert guarded_score(tiny_and_fast, 0.5, 0.05, 0.1) == pytest.approx(3 + 3 + 0.4 * 0.4 / 0.09)
    assert guarded_score(tiny_and_fast, 0.11, 0.101, 0.1) == pytest.approx(guarded_score(tiny_and_fast, 0.11, 0.1, 0.1))


@given(st.floats(0.11, 1), st.floats(0.11, 1), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_guarded_score_grows_with_accuracy(one: float, two: float, size: float, latency: float) -> None:
    low, high = sorted((one, two))
    scores = score(size, latency, 50.0, Baselines())
    assert guarded_score(scores, low, 0.8, 0.1) <= guarded_score(scores, high, 0.8, 0.1)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0, 100), st.floats(1e-2, 0.9))
def test_smaller_faster_better_never_scores_less(size: float, latency: float, accuracy: float, less: float) -> None:
    worse = score(size, latency, accuracy, Baselines())["total_score"]
    assert score(size * less, latency, accuracy, Baselines())["total_score"] > worse
    assert score(size, latency * less, accuracy, Baselines())["total_score"] > worse
    assert score(size, latency, accuracy + 1, Baselines())["total_score"] > worse


# ------------------------------------------------------------------------------------------- schemas and the table


def test_architecture_round_trips_and_rebuilds() -> None:
    architecture = Architecture.model_validate(tiny())
    assert Architecture.model_validate(architecture.to_json()) == architecture
    assert build(architecture)(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert check_shapes(architecture) == {"conv": (6, 6, 6), "relu": (6, 6, 6), "pool": (6,), "fc": (4,)}


def changed(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["layers"][index].update(changes)
    return change


@pytest.mark.parametrize(("change", "said"), [
    (lambda a: a.update(schema=2), "schema"), (lambda a: a.update(extra=1), "extra"),
    (lambda a: a.pop("num_classes"), "num_classes"), (lambda a: a.update(num_classes="four"), "num_classes"),
    (lambda a: a.update(model_type="X; import os"), "model_type"), (lambda a: a.update(layers=[]), "layers"),
    (lambda a: a.update(output_shape=[5]), "output_shape"), (changed(0, type="Conv3d"), "Conv3d"),
    (changed(0, out_channels=10**9), "out_channels"), (changed(0, out_channels=-1), "out_channels"),
    (changed(0, groups=2), "groups 2 does not divide"), (changed(0, inputs=["fc"]), "is no earlier layer"),
    (changed(0, inputs=["conv"]), "is no earlier layer"), (changed(1, inputs=["nowhere"]), "is no earlier layer"),
    (changed(1, inputs=["conv", "conv"]), "takes 1 to 1 inputs"), (changed(1, name="conv"), "used twice"),
    (changed(1, inputs=["input"]), "nothing uses its output"),
    (changed(0, pruning_info={"num_channels_pruned": 2, "remaining_channels": 5}), "remaining_channels is 5"),
    (changed(0, name='a"), __import__("os").system("true"), ("b'), "name"), (changed(0, name="a..b"), "name"),
    (changed(0, name="_private"), "name"), (changed(0, kernel_size=[3, 3, 3]), "kernel_size"),
])
def test_bad_architectures_are_refused(change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    content = tiny()
    change(content)
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(content))
    with pytest.raises(VerificationError) as caught:
        read_json(path, Architecture)
    message = str(caught.value)
    assert said in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize("name", ["class", "self", "forward", "parameters.0", "training", "state_dict", "layer.keys"])
def test_names_that_torch_keeps_to_itself(name: str) -> None:
    content = tiny()
    content["layers"][0]["name"] = name
    content["layers"][1]["inputs"] = [name]
    with pytest.raises(VerificationError, match="torch modules keep to themselves"):
        build(Architecture.model_validate(content))


def test_layer_inside_a_layer_is_refused() -> None:
    content = tiny()
    content["layers"][1]["name"] = "conv.relu"
    content["layers"][2]["inputs"] = ["conv.relu"]
    with pytest.raises(ValueError, match="layer conv: other layers lie inside it"):
        Architecture.model_validate(content)


@pytest.mark.parametrize("extra", [
    [layer("all", "Mean", ["fc"], dim=[0], keepdim=True), layer("vote", "Add", ["fc", "all"])],
    [layer("all", "Mean", ["fc"], dim=[-2], keepdim=True), layer("vote", "Add", ["fc", "all"])],
    [layer("both", "Concat", ["fc", "fc"], dim=0)], [layer("flat", "Flatten", ["fc"], start_dim=0)],
], ids=["mean", "negative dim", "concat", "flatten"])
def test_layers_that_mix_the_images_of_a_batch_are_refused(extra: list[dict[str, Any]]) -> None:
    """Test images come class by class: a vote over the batch would lift the accuracy."""
    content = tiny()
    content["layers"] += extra
    with pytest.raises(VerificationError, match="mixes the images of a batch"):
        check_shapes(Architecture.model_validate(content))
    content["layers"] = [*tiny()["layers"], layer("bn", "BatchNorm1d", ["fc"], num_features=4, track_running_stats=False)]
    with pytest.raises(ValueError, match="track_running_stats"):
        Architecture.model_validate(content)


def test_shapes_that_do_not_fit_name_the_layer() -> None:
    content = tiny()
    content["layers"][3]["in_features"] = 7
    with pytest.raises(VerificationError, match="layer fc does not fit its inputs"):
        check_shapes(Architecture.model_validate(content))


def test_absurd_sizes_allocate_nothing() -> None:
    wide = tiny()
    wide["layers"][0]["out_channels"] = 2**20
    wide["layers"][1] = layer("relu", "Conv2d", ["conv"], in_channels=2**20, out_channels=2**20, kernel_size=1)
    with pytest.raises(VerificationError, match="are over the limit"):
        check_shapes(Architecture.model_validate(wide))
    tall = tiny()
    tall["layers"][2] = layer("pool", "AdaptiveAvgPool2d", ["relu"], output_size=[2**20, 2**20])
    with pytest.raises(VerificationError, match="elements is over the limit"):
        check_shapes(Architecture.model_validate(tall))


def test_a_network_that_would_take_for_ever_is_not_run(tmp_path: Path) -> None:
    slow = tiny(input_shape=[4096, 224, 224])
    slow["layers"][0].update(in_channels=4096, out_channels=4096, kernel_size=[7, 7])
    slow["layers"][3].update(in_features=4096)
    (tmp_path / ARCH).write_text(json.dumps(slow))
    (tmp_path / "w.pth").write_bytes(b"never read")
    with pytest.raises(VerificationError, match="multiply-adds an image are over the limit"):
        load_model(tmp_path / "w.pth")


def test_memory_limit_holds_inside_and_only_there() -> None:
    import resource
    before = resource.getrlimit(resource.RLIMIT_AS)
    with memory_limit(200):
        torch.zeros(2**20)
    for greedy in (lambda: torch.zeros(2**30), lambda: bytearray(2**32)):
        with pytest.raises(VerificationError, match="more than --memory_limit_mb 200"), memory_limit(200):
            greedy()
    with pytest.raises(RuntimeError, match="shape"), memory_limit(200):
        torch.zeros(2) + torch.zeros(3).reshape(5)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert torch.zeros(2**27).numel() == 2**27


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=12), st.sampled_from(["schema", "layers", "input_shape", "num_classes", "model_type"]))
def test_any_json_is_accepted_or_refused_never_crashes(value: Any, key: str) -> None:
    with contextlib.suppress(ValueError):  # pydantic's ValidationError is one
        Architecture.model_validate(tiny(**{key: value}))


# ------------------------------------------------------------------------------------------------------ measuring


def test_latency_counts_runs_and_orders_percentiles() -> None:
    model = build(Architecture.model_validate(tiny())).eval()
    before = torch.get_num_threads()
    latency = measure_latency(model, (3, 8, 8), runs=30, warmup=3, threads=1)
    assert (latency.runs, latency.warmup, latency.threads) == (30, 3, 1)
    assert 0 < latency.p5_ms <= latency.median_ms <= latency.p95_ms
    assert torch.get_num_threads() == before


def test_counts_include_what_hides_in_buffers() -> None:
    class Hides(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1000))
            self.fc = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(1))  # type: ignore[no-any-return]

    assert count_parameters(Hides()) == 1008
    assert count_macs(Hides(), (3, 1, 1)) == 6
    architecture = Architecture.model_validate(tiny())
    assert count_macs(build(architecture), (3, 8, 8)) == 6 * 6 * 6 * 27 + 24


def test_model_output_that_is_no_logits_is_refused() -> None:
    from compress.evaluation.measure import measure_accuracy
    from metadata.schemas import Preprocessing
    images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    nan = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    torch.nn.init.constant_(nan[1].bias, float("nan"))
    with pytest.raises(VerificationError, match="finite logits"):
        measure_accuracy(nan, iter([(images, labels)]), Preprocessing(), 4)


# -------------------------------------------------------------------------------------------------- atomic writing


def test_write_atomically_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
    assert path.stat().st_mode & 0o044
    script = ("import resource, sys; from pathlib import Path; from metadata.files import write_atomically\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
              "try: write_atomically(Path(sys.argv[1]), bytes(5000))\n"
              "except OSError as error: print(type(error).__name__)")
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=PROJECT,
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OSError" and path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


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
    "weights empty": (lambda f: weights_of(f).write_bytes(b""), True, "not a PyTorch state dict"),
    "weights cut short": (lambda f: weights_of(f).write_bytes(weights_of(f).read_bytes()[:2000]), True,
                          "not a PyTorch state dict"),
    "weights swapped unstated": (lambda f: edit_weights(f, lambda w: w["fc.bias"].add_(1)), False, "sha256"),
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
    "architecture missing": (lambda f: (f / ARCH).unlink(), False, "no such file"),
    "architecture no JSON": (lambda f: (f / ARCH).write_text("{"), False, "not valid JSON"),
    "pruning info lies": (lambda f: edit_json(f, ARCH, lambda a: a["layers"][0]["pruning_info"].update(
        remaining_channels=1)), True, "remaining_channels is 1"),
    "channels lie": (lambda f: edit_json(f, ARCH, lambda a: (
        a["layers"][0].update(out_channels=64), a["layers"][0]["pruning_info"].update(remaining_channels=64))), True,
        "does not fit its inputs"),
    "architecture huge": (lambda f: os.truncate(f / ARCH, 2**25), False, "over JSON's limit"),
    "architecture with a cycle": (lambda f: edit_json(f, ARCH, lambda a: a["layers"][1].update(
        inputs=[a["layers"][2]["name"]])), False, "is no earlier layer"),
    "weights padded": (lambda f: os.truncate(weights_of(f), 2**24), True, "its tensors need"),
    "weights huge": (lambda f: edit_json(f, META, lambda m: m["files"][m["weights_file"]].update(bytes=2**40)), False,
                     "over the limit"),
    "metadata missing": (lambda f: (f / META).unlink(), False, "no such file"),
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
                      False, "not in both: 0, 10"),
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
