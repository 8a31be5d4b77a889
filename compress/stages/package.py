"""Stage `package`: write the submission folder."""

from __future__ import annotations

import shutil
from typing import Any, Literal

from pydantic import Field

from compress.packaging import Package as Contents
from compress.stage import Context, Sketch, Stage, Submission, TorchModel
from metadata.schemas import DatasetCard


class Package(Stage):
    """A folder that evaluates anywhere, in the user's layout or the public challenge's."""

    layout: Literal["toolkit", "challenge"] = Field("toolkit", description="challenge: for the harness of the public "
                                                                          "ResNet18 compression challenge")
    weights_name: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$", description="compressed_<this>.pth; the model's "
                                                                                   "type unless given")
    username: str = Field("", description="challenge layout: for its metadata.json")
    teamname: str = Field("", description="challenge layout: for its metadata.json")

    def check(self, sketch: Sketch) -> None:
        sketch.lines.append(f"{self.layout} layout, in the run's folder submission/")

    def run(self, model: TorchModel, context: Context) -> Submission:
        folder = context.run_folder / "submission"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier try at this very stage
        self.contents(model, context.splits.card, context.measurements).write(folder)
        return Submission(folder)

    def contents(self, model: TorchModel, card: DatasetCard, measured: dict[str, Any]) -> Contents:
        """What the folder will hold."""
        name = self.weights_name or model.architecture.model_type.lower()
        challenge = {"username": self.username, "teamname": self.teamname, "model_format": "pytorch"}
        return Contents(model.module.cpu().eval(), model.architecture, card, name, measured, self.layout, challenge)
