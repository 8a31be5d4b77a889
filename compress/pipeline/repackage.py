"""Package a run's last model again: elsewhere, or in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.pipeline.folder import CARD, STAGE, read_config
from compress.pipeline.plan import parse_stages
from compress.pipeline.stage import OnnxModel, TorchModel, load_output, signature
from compress.pipeline.stages.package import Package
from compress.settings import settings_error
from metadata.errors import UserError
from metadata.files import read_json
from metadata.records import DatasetCard, LedgerRow, StageRecord


def package_run(folder: Path, out: Path, changes: dict[str, Any]) -> None:
    """Package the last model of a finished or unfinished run into another folder.

    Args:
        folder: the run's folder.
        out: the folder to write.
        changes: settings of the stage `package` that replace the recipe's.

    Raises:
        UserError: there is no such run, no student in it yet, a setting is out of range, or `out` exists.
    """
    settings: dict[str, Any] = {}
    last: tuple[TorchModel | OnnxModel, LedgerRow] | None = None
    for name, stage in parse_stages(read_config(folder)):
        if isinstance(stage, Package):
            settings = stage.model_dump()
        _, gives = signature(type(stage))
        if set(gives) <= {TorchModel, OnnxModel} and (folder / name / STAGE).is_file():
            record: StageRecord = read_json(folder / name / STAGE, StageRecord)
            model = load_output(type(stage), folder / name)
            assert isinstance(model, TorchModel | OnnxModel)
            last = model, record.rows[0]
    if last is None:
        raise UserError(f"{folder}: this run has not produced a student yet; continue the run first")
    try:
        package = Package.model_validate(settings | changes)
    except ValidationError as error:
        raise settings_error("package", error, Package.model_fields) from error
    model, row = last
    card: DatasetCard = read_json(folder / CARD, DatasetCard)
    package.contents(model, card, row.model_dump()).write(out)
