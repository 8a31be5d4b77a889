"""The stage `distill`: methods, several teachers, cached outputs of mixed images, and settings that would do nothing."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from compress.pipeline.config import resolve
from compress.pipeline.run import run_pipeline
from compress.pipeline.stage import TorchModel
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.folders import draw_folder


@pytest.fixture(scope="module")
def two_teachers(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe as far as distill, with a second teacher."""
    lines = tiny_recipe.read_text().split("  - prune")[0].splitlines()
    teacher = next(line for line in lines if "teacher:" in line)
    lines.insert(lines.index(teacher), teacher.replace("width: 4", "width: 6"))
    path = tmp_path_factory.mktemp("two") / "two.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def taught(two_teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with both."""
    run_dir = tmp_path_factory.mktemp("runs")
    return run_pipeline(resolve(str(two_teachers), [
        f"run_dir={run_dir}", "distill.teachers=2", "distill.cache_views=2", "distill.method=dist",
        "distill.train.cutmix=1", "distill.train.mixup=0.2"]), Console(file=io.StringIO())).folder


def test_two_teachers_are_cached_together_and_named(taught: Path, two_teachers: Path, tmp_path: Path) -> None:
    cache = torch.load(taught / "03-distill" / "teacher_logits.pth", weights_only=True)
    record = json.loads((taught / "03-distill" / "stage.json").read_text())
    assert list(cache.shape) == record["notes"]["cached_teacher_outputs"] and cache.shape[0] == 2
    details = TorchModel.load(taught / "03-distill").architecture.training_details
    assert details["method"] == "dist" and (details["temperature"], details["alpha"]) == (4.0, 0.5)
    assert details["teacher"] == "slim_resnet18, slim_resnet18"
    one = run_pipeline(resolve(str(two_teachers), [f"run_dir={tmp_path}", "distill.cache_views=2"]),
                       Console(file=io.StringIO())).folder
    latest = torch.load(one / "03-distill" / "teacher_logits.pth", weights_only=True)
    assert latest.shape == cache.shape and not torch.allclose(latest, cache)


@pytest.mark.parametrize("method", ["attention", "features"])
def test_features_are_compared_where_sizes_are_alike(method: str, two_teachers: Path, tmp_path: Path) -> None:
    outcome = run_pipeline(resolve(str(two_teachers), [f"run_dir={tmp_path}", f"distill.method={method}"]),
                           Console(file=io.StringIO()))
    record = json.loads((outcome.folder / "03-distill" / "stage.json").read_text())
    assert list(record["notes"]["compared_features"].values()) == ["layer1", "layer2", "layer3"]  # layer4 has one pixel
    student = TorchModel.load(outcome.folder / "03-distill")
    details = student.architecture.training_details
    assert details["method"] == method and details["alpha"] == 0.5 and "temperature" not in details
    assert not any("projections" in name for name in student.module.state_dict())


OWN = """from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, num_classes))
"""


def test_features_of_a_teacher_of_ones_own(taught: Path, tiny_recipe: Path, compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(OWN)
    (folder := tmp_path / "folder").mkdir()
    for name in ("architecture.json", "weights.pth"):
        shutil.copy(taught / "03-distill" / name, folder)
    for teacher in (f"file:{tmp_path / 'net.py'}:Net", f"folder:{folder}"):
        done = compress("plan", tiny_recipe, f"run_dir={tmp_path}", f"teacher.model={teacher}", "teacher.options={}",
                        "distill.method=attention", *(["teacher.train.epochs=0"] if teacher.startswith("folder") else []))
        assert done.returncode == 0, done.stderr
    (tmp_path / "plain.py").write_text("from torch import nn\nclass Plain(nn.Module):\n    def forward(self, x):\n"
                                       "        return x.mean((2, 3))[:, :1].expand(-1, 4)\n")
    done = compress("plan", tiny_recipe, f"run_dir={tmp_path}", f"teacher.model=file:{tmp_path / 'plain.py'}:Plain",
                    "teacher.options={}", "distill.method=attention")
    assert_one_line_error(done, "distill.method attention: no layer of the student has the height and width")


def test_two_classes_are_too_few_for_dkd(tiny_recipe: Path, tmp_path: Path, compress: Compress) -> None:
    draw_folder(tmp_path / "two", classes=2, images=8, size=8)
    for overrides in (["distill.method=dkd"], ["finetune.method=dkd", "finetune.teacher=true"]):
        done = compress("plan", tiny_recipe, f"run_dir={tmp_path / 'runs'}", f"data.root={tmp_path / 'two'}", *overrides)
        assert_one_line_error(done, f"{overrides[0].partition('.')[0]}.method dkd: it ranks the classes beside the label")


@pytest.mark.parametrize(("overrides", "said"), [
    (["distill.cache_views=1000000000"], ["distill.cache_views 1000000000: the outputs would take", "set fewer views"]),
    (["distill.method=features", "distill.cache_views=2"], ["distill.cache_views", "on every batch"]),
    (["distill.method=features", "distill.teachers=2"], ["distill.teachers", "one teacher"]),
    (["distill.method=attention", "distill.temperature=2"], ["distill.temperature", "without a temperature"]),
    (["distill.method=attention", "distill.train.size_schedule=0:6"], ["distill.train.size_schedule", "height and width"]),
    (["finetune.method=attention", "finetune.teacher=true"], ["finetune"]),
    (["distill.teachers=3"], ["distill.teachers 3", "there are 2 stages teacher"]),
    (["distill.method=fitnets"], ["method", "kd"]),
    (["distill.cache_views=2", "distill.train.views=3"], ["distill.cache_views", "train.views must be 0"]),
    (["distill.temperature=0"], ["temperature"]), (["distill.alpha=1.5"], ["alpha"])])
def test_mistakes_get_one_line(overrides: list[str], said: list[str], two_teachers: Path, compress: Compress,
                               tmp_path: Path) -> None:
    assert_one_line_error(compress("plan", two_teachers, f"run_dir={tmp_path}", *overrides), *said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["temperature=2", "alpha=0.5", "method=dkd"])
def test_settings_of_a_teacher_need_one(setting: str, tiny_recipe: Path, compress: Compress) -> None:
    done = compress("plan", tiny_recipe, "finetune.teacher=false", f"finetune.{setting}")
    assert_one_line_error(done, f"finetune.{setting.partition('=')[0]}: the setting has no effect without teacher: true")
