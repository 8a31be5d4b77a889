"""A packaged folder alone: it must evaluate, load and explain itself with nothing else of the project at hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model_loader
from compress.evaluation.evaluate import evaluate_submission
from compress.evaluation.runtimes import EvaluationSettings
from compress.packaging.bundle import bundle
from compress.pipeline.stage import TorchModel
from tests.helpers.commands import Compress, assert_one_line_error

FILES = {"compressed_slimresnet18.pth", "trained_pruned_architecture.json", "model_metadata.json", "model.py",
         "model_loader.py", "requirements.txt", "README.md"}


@pytest.fixture
def alone(submission: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(submission, tmp_path / "elsewhere" / "folder"))


def python(code: str, cwd: Path, *arguments: str) -> str:
    """Runs isolated code with only the folder on its path."""
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{code}", *arguments],
                          cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_folder_holds_what_the_format_says(submission: Path) -> None:
    assert {path.name for path in submission.iterdir()} == FILES
    assert (submission / "model_loader.py").read_bytes() == bundle()
    architecture = json.loads((submission / "trained_pruned_architecture.json").read_text())
    assert architecture["model_type"] == "SlimResNet18" and architecture["pruning_rate"] == 0.4
    assert architecture["compression_steps"] == ["knowledge_distillation", "structured_pruning", "finetuning",
                                                 "dynamic_quantization"]
    assert architecture["training_details"]["teacher"] == "slim_resnet18"
    metadata = json.loads((submission / "model_metadata.json").read_text())
    assert set(metadata["files"]) == FILES - {"model_metadata.json"}
    assert metadata["quantization"]["scheme"] == "dynamic_int8" and len(metadata["quantization"]["layers"]) == 21
    assert metadata["preprocessing"]["mean"] and metadata["class_names"] == [str(digit) for digit in range(10)]
    card = (submission / "README.md").read_text()
    assert "validation accuracy" in card and "| on CPUs without VNNI | holds: " in card and metadata["portability"]["holds"]


def test_remaining_channels_equal_the_tensors_everywhere(submission: Path) -> None:
    architecture = json.loads((submission / "trained_pruned_architecture.json").read_text())
    weights = torch.load(submission / "compressed_slimresnet18.pth", weights_only=True)
    checked = 0
    for layer in architecture["layers"]:
        if "pruning_info" in layer:
            tensor = weights[layer["name"] + ".weight"]
            width = layer.get("out_channels", layer.get("out_features"))
            assert layer["pruning_info"]["remaining_channels"] == width == tensor.shape[0]
            assert tensor.dtype == torch.int8
            checked += 1
    assert checked == 21


@pytest.mark.slow
def test_evaluates_isolated_in_another_folder(alone: Path, digits_test: Path, tmp_path: Path, small_run: Path) -> None:
    output = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, "-I", str(alone / "model_loader.py"), "--submission_dir", str(alone), "--data_dir",
         str(digits_test), "--baseline_size", "50", "--baseline_latency", "10", "--baseline_accuracy", "80",
         "--output_file", str(output)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert list(result) == ["model_size", "latency", "accuracy", "size_score", "latency_score", "accuracy_score",
                            "total_score", "details"]
    earlier = json.loads((small_run / "results.json").read_text())
    assert result["accuracy"] == earlier["accuracy"]
    assert result["details"]["accuracy"]["predictions_sha256"] == earlier["details"]["accuracy"]["predictions_sha256"]
    assert result["model_size"] == (alone / "compressed_slimresnet18.pth").stat().st_size / 2**20
    assert result["details"]["accuracy"]["batch_size"] == 1 and result["details"]["latency"]["runs"] == 130
    assert result["total_score"] == pytest.approx(0.3 * result["size_score"] + 0.3 * result["latency_score"]
                                                  + 0.4 * result["accuracy_score"])


def test_model_py_needs_torch_only_and_gives_the_same_logits(alone: Path) -> None:
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(images, alone / "images.pth")
    torch.save(model_loader.load_model(alone)(images).detach(), alone / "expected.pth")
    python("""
import torch
for name in ("pydantic", "numpy.linalg.nothing", "model_loader"):
    sys.modules[name] = None  # importing these fails now
from model import SlimResNet18
model = SlimResNet18(num_classes=10)
model.load_state_dict(torch.load("compressed_slimresnet18.pth", weights_only=True))
model.eval()
logits = model(torch.load("images.pth", weights_only=True))
assert torch.allclose(logits, torch.load("expected.pth", weights_only=True), atol=1e-5)
assert torch.equal(logits.argmax(1), torch.load("expected.pth", weights_only=True).argmax(1))
""", alone)


@pytest.mark.parametrize("images", ["few", pytest.param("digits_test", marks=pytest.mark.slow)])
def test_model_py_has_the_same_argmax_on_test_images(alone: Path, images: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(images)
    out = python("""
import torch
from pathlib import Path
import model_loader
from model import SlimResNet18
model = SlimResNet18()
model.load_state_dict(torch.load("compressed_slimresnet18.pth", weights_only=True))
model.eval()
files = model_loader.read_submission(".")
images = model_loader.list_images(sys.argv[1]).images
other = model_loader.load_model(".")
pixels = torch.from_numpy(model_loader.read_images([path for path, _ in images], files.preprocessing))
with torch.no_grad():
    assert all(torch.equal(model(one[None]).argmax(1), other(one[None]).argmax(1)) for one in pixels)
print(len(pixels))
""", alone, str(folder))
    assert int(out) == len(list(folder.glob("*/*.png"))) >= 50


def test_challenge_layout_serves_the_public_harness(compress: Compress, small_run: Path, submission: Path, few: Path,
                                                    tmp_path: Path) -> None:
    out = tmp_path / "challenge"
    done = compress("package", small_run, "--out", out, "--layout", "challenge", "--username", "ada", "--teamname",
                        "engines")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {
        "model.pth", "metadata.json", "model_loader.py", "requirements.txt", "trained_pruned_architecture.json",
        "model_metadata.json"}
    assert [path.name for path in out.glob("model.*")] == ["model.pth"]
    assert json.loads((out / "metadata.json").read_text()) == {"username": "ada", "teamname": "engines",
                                                               "model_format": "pytorch"}
    # What that harness does, in a process of its own: one ImageFolder image at a time, cast to the model's dtype.
    correct = python("""
import importlib.util, torch
from pathlib import Path
from torchvision import datasets, transforms
folder = Path(".")
spec = importlib.util.spec_from_file_location("submitted_loader", folder / "model_loader.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = module.load_model(str(next(folder.glob("model.*"))))
model = model.to(torch.device("cpu"))
model.eval()
dtype = next(model.parameters()).dtype
normalize = transforms.Normalize([0.305] * 3, [0.376] * 3)
data = datasets.ImageFolder(sys.argv[1], transforms.Compose([transforms.ToTensor(), normalize]))
loader = torch.utils.data.DataLoader(data, batch_size=1)
with torch.no_grad():
    print(sum(int(model(images.to(dtype)).argmax(1) == labels) for images, labels in loader))
""", out, str(few))
    results = evaluate_submission(submission, few, settings=EvaluationSettings(runs=20, warmup=2))
    assert abs(int(correct) - results["details"]["accuracy"]["correct"]) <= 1  # ToTensor rounds in another order


def test_package_verb_refuses_what_it_cannot_do(compress: Compress, small_run: Path, submission: Path,
                                                tmp_path: Path) -> None:
    assert_one_line_error(compress("package", small_run, "--out", submission), "already there")
    assert_one_line_error(compress("package", tmp_path, "--out", tmp_path / "x"), "not a run's folder")
    assert_one_line_error(compress("package", small_run, "--out", tmp_path / "x", "--layout", "zip"), "layout")
    assert not (tmp_path / "x").exists()


def test_float_package_loads_too(small_run: Path, tmp_path: Path) -> None:
    """A package of the float student: model.py and the loader agree to 1e-5."""
    from compress.packaging.package import TorchPackage
    from metadata.files import read_json
    from metadata.records import DatasetCard

    student = TorchModel.load(small_run / "04-finetune")
    card = read_json(small_run / "card.json", DatasetCard)
    row = json.loads((small_run / "04-finetune" / "stage.json").read_text())["rows"][0]
    TorchPackage(architecture=student.architecture, card=card, name="float", measured=row,
                 model=student.module).write(tmp_path / "float")
    images = torch.randn(3, 3, 8, 8)
    namespace: dict[str, type[torch.nn.Module]] = {}
    exec((tmp_path / "float" / "model.py").read_text(), namespace)
    model = namespace["SlimResNet18"]().eval()
    model.load_state_dict(torch.load(tmp_path / "float" / "compressed_float.pth", weights_only=True))
    assert torch.allclose(model(images), model_loader.load_model(tmp_path / "float")(images), atol=1e-5)
