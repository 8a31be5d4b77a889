"""Stage `package`: write the submission folder."""

from __future__ import annotations

import shutil
from typing import Any, Literal

from pydantic import Field

from compress.packaging.bundle import START
from compress.packaging.format_package import FormatPackage
from compress.packaging.hub_package import HubPackage
from compress.packaging.onnx_package import OnnxPackage
from compress.packaging.package import SubmissionContents, TorchPackage
from compress.pipeline.stage import Context, OnnxModel, Sketch, Stage, Submission, TorchModel
from metadata.errors import UserError
from metadata.records import DatasetCard


class Package(Stage):
    """Write a folder that evaluates anywhere, in the layout of the toolkit, the challenge or the Hugging Face Hub."""

    layout: Literal["toolkit", "challenge", "hub"] = Field(
        "toolkit", description="challenge: for the harness of the public ResNet18 compression challenge; hub: a model "
                               "repository with safetensors, config.json and a model card")
    weights_name: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$", description="compressed_<this>.pth; by "
                                                                                   "default the model's type")
    username: str = Field("", description="challenge layout: for its metadata.json")
    teamname: str = Field("", description="challenge layout: for its metadata.json")

    license: str = Field("unknown", pattern=r"^[A-Za-z0-9._-]+$", description="hub layout: of the weights, as the Hub "
                                                                              "spells it, such as apache-2.0")
    base_model: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$", description="hub layout: the "
                                   "Hub's name of the model that this one was made from")

    def modules(self) -> list[str]:
        return [START]  # of the evaluator, whose sources go into the folder

    def check(self, sketch: Sketch) -> None:
        self._check_layout(sketch.is_onnx, sketch.card)
        sketch.lines.append(f"{self.layout} layout, in the run's folder submission/")

    def _check_layout(self, is_onnx: bool, card: DatasetCard) -> None:
        if self.layout == "hub" and is_onnx:
            raise UserError("package.layout hub: it holds PyTorch weights as safetensors; package a model for another "
                            "runtime in the toolkit layout")
        if self.layout != "challenge":
            return
        if is_onnx:
            raise UserError("package.layout challenge: its harness loads PyTorch weights; package an ONNX model in the "
                            "toolkit layout")
        if card.class_names != sorted(card.class_names):
            raise UserError(f"package.layout challenge: its harness takes outputs for sorted class names, and those of "
                            f"{card.name} are in its own order ({', '.join(card.class_names[:3])}, ...); train on "
                            "data.name=image_folder, or package in the toolkit layout")

    def run(self, model: TorchModel | OnnxModel, context: Context) -> Submission:
        folder = context.run_folder / "submission"
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run of this stage left it
        self.contents(model, context.splits.card, context.measurements).write(folder)
        return Submission(folder)

    def contents(self, model: TorchModel | OnnxModel, card: DatasetCard, measured: dict[str, Any]) -> SubmissionContents:
        """Return what the folder will hold."""
        self._check_layout(isinstance(model, OnnxModel), card)
        name = self.weights_name or model.architecture.model_type.lower()
        if isinstance(model, OnnxModel):
            known = {key: getattr(model.card, key) for key in ("scheme", "layers", "portability")}
            if model.files:
                return FormatPackage(architecture=model.architecture, card=card, name=name, measured=measured,
                                     format=model.card.format, files=model.files, **known)
            return OnnxPackage(architecture=model.architecture, card=card, name=name, measured=measured,
                               content=model.content, backend=model.card.backend, **known)
        module = model.module.cpu().eval()
        if self.layout == "hub":
            return HubPackage(architecture=model.architecture, card=card, name=name, measured=measured, model=module,
                              layout="hub", license=self.license, base_model=self.base_model)
        challenge = {"username": self.username, "teamname": self.teamname, "model_format": "pytorch"}
        return TorchPackage(architecture=model.architecture, card=card, name=name, measured=measured, model=module,
                            layout=self.layout, challenge=challenge)
