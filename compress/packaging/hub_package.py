"""The submission folder as a model repository: safetensors, config.json, a model card with front matter, an example.

The names and the front matter are those of the Hugging Face Hub. The folder stays a submission: the evaluator scores it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from safetensors.torch import save

from compress.packaging.package import TorchPackage
from metadata.files import write_atomically, write_json
from metadata.schemas import ARCHITECTURE_FILE

EXAMPLE = '''"""Classify images: python example.py IMAGE ... Nothing is downloaded."""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin

from model import {kind}
from model_loader import Preprocessing, read_images

FOLDER = Path(__file__).resolve().parent


class {kind}FromHub({kind}, PyTorchModelHubMixin):
    """The network with from_pretrained, which takes this folder, or the name of a repository with its files."""


def main() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    model = {kind}FromHub.from_pretrained(str(FOLDER), strict=True)
    paths = [Path(name) for name in sys.argv[1:]]
    images = torch.from_numpy(read_images(paths, Preprocessing(**config["preprocessing"])))
    with torch.inference_mode():
        shares = model(images).softmax(1)
    for path, row in zip(paths, shares):
        print(f"{{path}}: {{config['class_names'][int(row.argmax())]}} ({{float(row.max()):.1%}})")


if __name__ == "__main__":
    main()
'''


@dataclass(frozen=True, kw_only=True)
class HubPackage(TorchPackage):
    """The submission folder of a PyTorch model in the layout "hub".

    Args:
        license: as the Hub spells licenses, such as "apache-2.0".
        base_model: the Hub's name of the model that this one was made from, or None.
    """

    license: str = "unknown"
    base_model: str | None = None
    MORE_REQUIREMENTS: ClassVar[str] = "huggingface_hub>=0.24\nsafetensors>=0.4\n"

    @property
    def weights_file(self) -> str:
        return "model.safetensors"

    def _write_files(self, folder: Path) -> None:
        write_json(folder / "config.json", {
            "model_type": self.architecture.model_type, "num_classes": self.card.num_classes,
            "class_names": self.card.class_names, "input_shape": list(self.architecture.input_shape),
            "preprocessing": self.card.preprocessing.model_dump(mode="json"), "architecture": self.architecture.to_json()})
        write_atomically(folder / "example.py", EXAMPLE.format(kind=self.architecture.model_type).encode())
        super()._write_files(folder)

    def _weights(self) -> bytes:
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in self.model.state_dict().items()}
        content: bytes = save(tensors, metadata={"format": "pt"})  # "pt" is what other libraries look for
        return content

    def _front_matter(self) -> str:
        steps = [step.replace("_", "-") for step in self.architecture.compression_steps]
        content: dict[str, Any] = {
            "license": self.license, "library_name": "pytorch", "pipeline_tag": "image-classification",
            "tags": ["image-classification", "model-compression", *steps, "pytorch_model_hub_mixin", "model_hub_mixin"],
            "metrics": ["accuracy"]} | ({"base_model": self.base_model} if self.base_model else {})
        content["model-index"] = [{"name": self.architecture.model_type, "results": [{
            "task": {"type": "image-classification"},
            "dataset": {"name": self.card.name, "type": self.card.name, "split": "validation"},
            "metrics": [{"type": "accuracy", "name": "validation accuracy",
                         "value": round(self.measured["accuracy"], 6)}]}]}]
        return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n\n"

    def _use(self) -> str:
        kind = self.architecture.model_type
        return f"""Use it. `example.py` classifies images; `config.json` has the classes, the preprocessing and the
architecture (as `{ARCHITECTURE_FILE}` does):

    from huggingface_hub import PyTorchModelHubMixin
    from model import {kind}

    class {kind}FromHub({kind}, PyTorchModelHubMixin):
        pass

    model = {kind}FromHub.from_pretrained(".")  # this folder; nothing is downloaded

or with the evaluator, which checks every tensor against the architecture first:

    from model_loader import load_model
    model = load_model("{self.weights_file}")
"""
