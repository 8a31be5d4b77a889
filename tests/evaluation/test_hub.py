"""The hub layout: loads offline with huggingface_hub's mixin, its card passes that library, and the evaluator scores it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures.safetensors_files import read_stored_tensors
from architectures.weights import load_tensors
from compress.evaluation.submission import open_submission, read_submission
from compress.pipeline.repackage import package_run
from compress.pipeline.stage import TorchModel
from metadata.errors import VerificationError
from tests.helpers.sharing import shared_folder
from tests.helpers.verdicts import Evaluate

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def repository(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int8 student of the small run, in the hub layout."""
    def write(folder: Path) -> None:
        settings = {"layout": "hub", "license": "mit", "base_model": "timm/resnet18.a1_in1k"}
        package_run(small_run, folder / "repository", settings)

    return shared_folder(tmp_path_factory, "hub", write) / "repository"


def test_it_has_the_files_of_a_repository_and_is_a_submission(repository: Path, small_run: Path, evaluate: Evaluate
                                                              ) -> None:
    assert {path.name for path in repository.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "example.py", "model.py", "model_loader.py", "requirements.txt",
        "trained_pruned_architecture.json", "model_metadata.json"}
    config = json.loads((repository / "config.json").read_text())
    assert config["num_classes"] == 10 and config["input_shape"] == [3, 8, 8]
    assert config["architecture"] == json.loads((repository / "trained_pruned_architecture.json").read_text())
    assert config["preprocessing"]["mode"] == "RGB"
    student = TorchModel.load(small_run / "05-quantize_dynamic").module
    for name, tensor in load_file(repository / "model.safetensors").items():
        assert torch.equal(tensor, student.state_dict()[name]) and tensor.dtype == student.state_dict()[name].dtype
    assert any(tensor.dtype == torch.int8 for tensor in load_file(repository / "model.safetensors").values())
    code, result, error = evaluate(repository)
    assert code == 0, error
    assert result["details"]["bytes"]["weights"] == (repository / "model.safetensors").stat().st_size


def test_its_card_passes_the_hubs_library(repository: Path, small_run: Path) -> None:
    card = hub.ModelCard.load(repository / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "pytorch", "image-classification")
    assert data.base_model == "timm/resnet18.a1_in1k" and data.metrics == ["accuracy"]
    assert {"image-classification", "structured-pruning", "dynamic-quantization"} <= set(data.tags)
    result, = data.eval_results
    assert isinstance(result, hub.EvalResult)
    assert (result.task_type, result.metric_type) == ("image-classification", "accuracy")
    measured = json.loads((repository / "model_metadata.json").read_text())["accuracy"]["fraction"]
    assert result.metric_value == pytest.approx(measured, abs=1e-6)
    again = hub.ModelCardData(model_name=data.model_name, **{key: value for key, value in data.to_dict().items()
                                                            if key != "model-index"}, eval_results=data.eval_results)
    assert again.to_dict() == data.to_dict()
    assert card.text.lstrip().startswith("# SlimResNet18, compressed")


def test_the_example_classifies_offline(repository: Path, few: Path, tmp_path: Path) -> None:
    pictures = sorted(few.rglob("*.png"))[::4]
    guard = "import sys; sys.addaudithook(lambda event, args: (_ for _ in ()).throw(OSError(event)) if event in " \
            "('socket.connect', 'socket.getaddrinfo') else None)"
    (tmp_path / "sitecustomize.py").write_text(guard)
    done = subprocess.run([sys.executable, "-B", repository / "example.py", *pictures], capture_output=True, text=True,
                          check=False, env=os.environ | {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == 0, done.stderr
    model = open_submission(read_submission(repository))
    config = json.loads((repository / "config.json").read_text())
    from loaders.images import read_images
    from metadata.schemas import Preprocessing
    with torch.no_grad():
        expected = model(torch.from_numpy(read_images(pictures, Preprocessing(**config["preprocessing"])))).argmax(1)
    said = [line.rpartition(": ")[2].split(" (")[0] for line in done.stdout.splitlines() if ".png: " in line]
    assert len(pictures) > 3 and said == [config["class_names"][index] for index in expected]


def test_a_changed_tensor_is_refused(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(repository, folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(VerificationError, match="sha256"):
        read_submission(folder)


def test_safetensors_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"b": torch.arange(6, dtype=torch.int8).reshape(2, 3), "a": torch.randn(3, 1, dtype=torch.float64),
               "half": torch.randn(5).to(torch.bfloat16), "none": torch.empty(0, 4), "one": torch.tensor(True)}
    save_file(tensors, path, metadata={"format": "pt"})
    found = load_tensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


@pytest.mark.parametrize(("header", "data"), [
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"1234567"),
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"123456789"),
    ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
     '"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
    ('{"a": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 4]}}', b"1234"),
    ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', b""),
    ('{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
    ('{"a": [1]}', b""), ("[]", b""), ("{", b"")])
def test_damaged_safetensors_are_one_line(header: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    with pytest.raises(VerificationError, match="not a safetensors file"):
        read_stored_tensors(path)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(VerificationError, match="not a safetensors file"):
        read_stored_tensors(path)
