"""The submission folder of a model for LiteRT, ExecuTorch, OpenVINO or torch.export: its files, metadata, a model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from pathlib import Path

from compress.evaluation.runtimes import open_file
from compress.packaging.formats.base import export_format
from compress.packaging.onnx_package import int8_notes
from compress.packaging.package import SubmissionContents
from metadata.files import write_atomically, write_json
from metadata.schemas import ARCHITECTURE_FILE, METADATA_FILE

REQUIREMENTS_OF_ALL = "torch>=2.6\nnumpy>=1.26\npydantic>=2.7\npillow>=10\n"


@dataclass(frozen=True, kw_only=True)
class FormatPackage(SubmissionContents):
    """The submission folder of a model in a format of `compress/packaging/formats/`.

    Args:
        architecture: the float network that the files were made from. It is for the reader; no program needs it.
        format: the name of the format.
        files: content by suffix; the runtime opens the first.
        scheme, layers: which layers are int8.
        portability: whether the accuracy holds on CPUs whose int8 products saturate; None if that was not checked.
    """

    format: str
    files: dict[str, bytes]
    scheme: str = "none"
    layers: dict[str, str] = field(default_factory=dict)
    portability: dict[str, Any] | None = None

    @property
    def weights_file(self) -> str:
        return f"compressed_{self.name}{next(iter(self.files))}"

    def _write_files(self, folder: Path) -> None:
        kind = export_format(self.format)
        for suffix, content in self.files.items():
            write_atomically(folder / f"compressed_{self.name}{suffix}", content)
        opened = open_file(folder / self.weights_file, self.architecture.input_shape, self.card.preprocessing)
        write_atomically(folder / "requirements.txt", (kind.requirements + REQUIREMENTS_OF_ALL).encode())
        parameters, macs = opened.parameters["all"] or 0, opened.macs or 0
        notes = f"| format | {kind.title} |\n" + int8_notes(self.scheme, self.layers, self.portability)
        text = self._model_card(sum(map(len, self.files.values())), parameters, macs, self._use(kind.usage), notes)
        write_atomically(folder / "README.md", text.encode())
        write_json(folder / METADATA_FILE, self._metadata(
            folder, model_format=self.format, architecture_file=None, parameters=parameters, macs=macs,
            runtime=opened.backend, portability=self.portability,
            quantization={"scheme": self.scheme, "layers": self.layers}))

    def _use(self, usage: str) -> str:
        return f"""Use it (`load_model` checks the files' hashes first, and gives a module that calls the runtime):

    from model_loader import load_model
    model = load_model("{self.weights_file}")

or on the runtime itself. `{ARCHITECTURE_FILE}` describes the float network that the file was made from; no
program needs it:

{usage.format(file=self.weights_file)}"""
