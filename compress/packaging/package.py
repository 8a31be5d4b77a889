"""The submission folder: weights, architecture and metadata JSON, readable source, the evaluator and a model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from architectures.architecture import Architecture
from architectures.counting import count_macs, count_parameters
from architectures.int8 import int8_modules
from architectures.kernels import layer_by_layer
from architectures.layers.base import Layer
from architectures.pairs import saturating_pairs
from architectures.source import source
from compress.packaging.bundle import bundle
from metadata.errors import UserError
from metadata.formats import weights_content
from metadata.files import sha256, write_atomically, write_json
from metadata.locks import appearing
from metadata.machine import machine, versions
from metadata.records import DatasetCard
from metadata.schemas import ARCHITECTURE_FILE, METADATA_FILE, ModelMetadata

REQUIREMENTS = "torch>=2.4\nnumpy>=1.26\npydantic>=2.7\npillow>=10\n"
Layout = Literal["toolkit", "challenge", "hub"]


@dataclass(frozen=True, kw_only=True)
class SubmissionContents:
    """The content of a submission folder, in any format.

    Args:
        architecture: the network and its compression history.
        card: the data set that the model was trained on.
        name: the weights file is `compressed_<name>`.
        measured: the latest ledger row of this model.
    """

    architecture: Architecture
    card: DatasetCard
    name: str
    measured: dict[str, Any]
    SUFFIX: ClassVar[str]

    @property
    def weights_file(self) -> str:
        """Return the name of the weights file."""
        return f"compressed_{self.name}{self.SUFFIX}"

    def write(self, folder: Path) -> None:
        """Write the folder. The folder appears when it is complete.

        Raises:
            UserError: the folder is there already.
            OSError: the disk is full or read-only; nothing is left behind.
        """
        if folder.exists():
            raise UserError(f"{folder}: already there; choose another folder, or remove it first")
        with appearing(folder) as partial:
            write_json(partial / ARCHITECTURE_FILE, self.architecture.to_json())
            (partial / "model_loader.py").write_bytes(bundle())
            self._write_files(partial)

    def _write_files(self, folder: Path) -> None:
        """Write the weights and the files of the format. The metadata comes last, with the hashes of the others."""
        raise NotImplementedError

    def _metadata(self, folder: Path, **own: Any) -> dict[str, Any]:
        """Return model_metadata.json. `own` holds the keys that only one format has."""
        files = {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
                 for path in sorted(folder.iterdir()) if path.is_file()}
        metadata = {
            "schema": 1, "architecture": self.architecture.model_type,
            "num_classes": self.card.num_classes, "class_names": self.card.class_names, "weights_file": self.weights_file,
            "input_shape": list(self.architecture.input_shape), "preprocessing": self.card.preprocessing.model_dump(),
            "pruning_rate": self.architecture.pruning_rate, "compression_steps": self.architecture.compression_steps,
            "files": files,
            "accuracy": {"split": "validation", "correct": self.measured["correct"], "images": self.measured["images"],
                         "fraction": self.measured["accuracy"]},
            "latency": {key: self.measured[key] for key in ("latency_ms", "latency_p5_ms", "latency_p95_ms")}
            | {"batch": 1, "threads": 1} | machine(),
            "versions": versions(), **own,
        }
        ModelMetadata.model_validate(metadata)
        return metadata

    def _model_card(self, size_bytes: int, parameters: int, macs: int, use: str, notes: str = "") -> str:
        """Return README.md: a model card with the measured numbers."""
        here, measured, card = machine(), self.measured, self.card
        kind, shape = self.architecture.model_type, " x ".join(map(str, self.architecture.input_shape))
        history = ", ".join(step.replace("_", " ") for step in self.architecture.compression_steps)
        details = "".join(f"- {key}: {value}\n" for key, value in self.architecture.training_details.items())
        return f"""# {kind}, compressed

An image classifier for {card.num_classes} classes ({card.name}), compressed by {history or "training alone"}.

| | |
| --- | --- |
| input | {shape}, {"RGB" if card.preprocessing.mode == "RGB" else "grey"} |
| size of the weights | {size_bytes / 2**20:.3f} MB ({size_bytes:,} bytes) |
| parameters, buffers included | {parameters:,} |
| multiply-adds per image | {macs:,} |
| validation accuracy | {measured["correct"]} of {measured["images"]} ({measured["accuracy"]:.2%}) |
| latency, batch 1, one thread | {measured["latency_ms"]:.2f} ms median ({measured["latency_p5_ms"]:.2f} to """ \
f"""{measured["latency_p95_ms"]:.2f}, p5 to p95) on {here["cpu"]} ({", ".join(here["flags"])}) |
{notes}
The validation images were held out of the training images. Score the folder on your own test set, one folder per class:

    pip install -r requirements.txt
    python model_loader.py --submission_dir . --data_dir TEST_IMAGES

{use}
Preprocess images as `model_metadata.json` says under `preprocessing`. Another size, interpolation, mean or deviation costs
accuracy.

Training:

{details or "- not recorded"}
"""


@dataclass(frozen=True, kw_only=True)
class TorchPackage(SubmissionContents):
    """The submission folder of a PyTorch model.

    Args:
        model: the network that `architecture` describes, on the CPU.
        layout: "toolkit", or "challenge" for the harness of the public ResNet18 compression challenge.
        challenge: the content of metadata.json in the layout "challenge".
    """

    model: nn.Module
    layout: Layout = "toolkit"
    challenge: dict[str, str] = field(default_factory=dict)
    SUFFIX: ClassVar[str] = ".pth"
    MORE_REQUIREMENTS: ClassVar[str] = ""

    @property
    def weights_file(self) -> str:
        return "model.pth" if self.layout == "challenge" else super().weights_file

    def _write_files(self, folder: Path) -> None:
        write_atomically(folder / self.weights_file, self._weights())
        write_atomically(folder / "requirements.txt", (REQUIREMENTS + self.MORE_REQUIREMENTS).encode())
        if self.layout == "challenge":
            write_json(folder / "metadata.json", self.challenge)
        parameters, macs = count_parameters(self.model), count_macs(self.model, self.architecture.input_shape)
        portability = _portability(self.model)
        if self.layout != "challenge":  # its harness takes the first file model.* for the weights
            write_atomically(folder / "model.py", self._checked_source().encode())
            notes = f"| on CPUs without VNNI | {portability['verdict']} |\n" if portability else ""
            text = self._model_card((folder / self.weights_file).stat().st_size, parameters, macs, self._use(), notes)
            write_atomically(folder / "README.md", (self._front_matter() + text).encode())
        layers = {layer.name: _precision(layer, self.architecture.is_int8) for layer in self.architecture.layers
                  if layer.weighted}
        write_json(folder / METADATA_FILE, self._metadata(
            folder, model_format="pytorch", architecture_file=ARCHITECTURE_FILE, parameters=parameters, macs=macs,
            portability=portability,
            quantization={"scheme": "dynamic_int8" if self.architecture.is_int8 else "none", "layers": layers}))

    def _weights(self) -> bytes:
        """Return the content of the weights file."""
        return bytes(weights_content(self.model.state_dict()))

    def _front_matter(self) -> str:
        """Return what stands before the model card."""
        return ""

    def _checked_source(self) -> str:
        """Return the text of model.py, after running it once to check that it is the same network."""
        text = source(self.architecture, self.weights_file)
        namespace: dict[str, Any] = {}
        exec(compile(text, "model.py", "exec"), namespace)
        again = namespace[self.architecture.model_type]().eval()
        again.load_state_dict(self.model.state_dict(), strict=True)
        images = torch.randn(2, *self.architecture.input_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            same = torch.allclose(again(images), layer_by_layer(self.model)(images), rtol=1e-4, atol=1e-5)
        assert same, "model.py computes another network"
        return text

    def _use(self) -> str:
        kind = self.architecture.model_type
        return f"""Use it (`load_model` checks every tensor against the architecture first):

    from model_loader import load_model
    model = load_model("{self.weights_file}")

or with torch alone, through the readable source in `model.py`:

    import torch
    from model import {kind}
    model = {kind}()
    model.load_state_dict(torch.load("{self.weights_file}", weights_only=True))
    model.eval()
"""


def _portability(model: nn.Module) -> dict[str, Any] | None:
    """Return what holds of a model with int8 layers on CPUs without VNNI; None for a float model."""
    layers = int8_modules(model)
    if not layers:
        return None
    pairs = sum(saturating_pairs(layer.weight.numpy()) for layer in layers)
    why = ("where int8 kernels are missing or would saturate, the layers compute the same in float, slower" if pairs else
           "no sum of two products can exceed 16 bits; the int8 kernels are exact with and without VNNI")
    return {"holds": True, "method": "int8 kernels are used only where they are exact for these weights",
            "verdict": f"holds: {why}", "pairs_that_can_saturate": pairs}


def _precision(layer: Layer, int8_model: bool) -> str:
    if layer.int8:
        dynamic = layer.options()["activations"] == "int8"
        activations = "quantized at run time" if dynamic else "stay float32, which is faster"
        return f"int8: weights with one scale per output channel, activations {activations}"
    return "float32: excluded by the recipe" if int8_model else "float32: not quantized"
