"""The submission folder of an ONNX model: the file, its metadata with what is int8 and where that holds, a model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from architectures.onnx_files import read_onnx
from compress.packaging.package import SubmissionContents
from metadata.files import write_atomically, write_json
from metadata.schemas import ARCHITECTURE_FILE, METADATA_FILE

REQUIREMENTS = "onnx>=1.17\nonnxruntime>=1.20\ntorch>=2.4\nnumpy>=1.26\npydantic>=2.7\npillow>=10\n"


@dataclass(frozen=True, kw_only=True)
class OnnxPackage(SubmissionContents):
    """The submission folder of an ONNX model.

    Args:
        architecture: the float network that the file was exported from. It is for the reader; no program needs it.
        content: the bytes of the ONNX file.
        scheme, layers: which layers are int8.
        backend: the runtime that the model was measured on.
        portability: whether the accuracy holds on CPUs whose int8 products saturate; None if that was not checked.
    """

    content: bytes
    scheme: str = "none"
    layers: dict[str, str] = field(default_factory=dict)
    backend: str = "onnxruntime"
    portability: dict[str, Any] | None = None
    SUFFIX: ClassVar[str] = ".onnx"

    def _write_files(self, folder: Path) -> None:
        write_atomically(folder / self.weights_file, self.content)
        file = read_onnx(folder / self.weights_file, self.architecture.input_shape)
        requirements = REQUIREMENTS + ("openvino>=2024.6\n" if self.backend == "openvino" else "")
        write_atomically(folder / "requirements.txt", requirements.encode())
        card = self._model_card(len(self.content), file.parameters, file.macs or 0, self._use(file.input_name),
                                f"| runtime | {self.backend} |\n" + int8_notes(self.scheme, self.layers, self.portability))
        write_atomically(folder / "README.md", card.encode())
        write_json(folder / METADATA_FILE, self._metadata(
            folder, model_format="onnx", architecture_file=None, parameters=file.parameters, macs=file.macs or 0,
            runtime=self.backend, portability=self.portability,
            quantization={"scheme": self.scheme, "layers": self.layers}))

    def _use(self, input_name: str) -> str:
        return f"""Use it (`load_model` checks the files' hashes first, and gives a module that calls the runtime):

    from model_loader import load_model
    model = load_model("{self.weights_file}")

or on ONNX Runtime or any other runtime of ONNX files. `{ARCHITECTURE_FILE}` describes the float network
that the file was exported from; no program needs it:

    import onnxruntime
    session = onnxruntime.InferenceSession("{self.weights_file}")
    logits = session.run(None, {{"{input_name}": images}})[0]  # (N, C, H, W) float32, preprocessed, to (N, classes)
"""


def int8_notes(scheme: str, layers: dict[str, str], portability: dict[str, Any] | None) -> str:
    """Return the rows of a model card on static int8: how many layers are int8, and where the accuracy holds."""
    rows = ""
    if scheme != "none":
        int8 = sum(text.startswith("int8") for text in layers.values())
        rows += f"| int8 | {int8} of {len(layers)} layers with weights (`quantization` in {METADATA_FILE}) |\n"
    if portability:
        rows += f"| on CPUs without VNNI | {portability['verdict']} |\n"
    return rows
