"""A stage's identity: a key that changes when the stage would give another result, so that the stage runs again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from compress.packaging.import_graph import ROOT, import_closure, module_file
from compress.pipeline.config import RunConfig
from compress.pipeline.stage import Stage
from metadata.records import DatasetCard

SHOW_ONLY = {"compress.training.trackers", "compress.training.loggers"}  # they cannot change a stage's result
FOUND_BY_NAME = (ROOT / "architectures" / "families", ROOT / "loaders" / "sets")


def data_key(card: DatasetCard, config: RunConfig) -> str:
    """Return the key that the first stage starts from: the data, the split and the seed."""
    return _hash({"card": card.model_dump(mode="json"), "seed": config.seed,
                  "validation_fraction": config.data.validation_fraction})


def stage_key(parent: str, name: str, stage: Stage) -> str:
    """Return the key of a stage: the key of its input, its settings and its source code."""
    return _hash({"parent": parent, "stage": name, "config": stage.model_dump(mode="json"), "source": _source(stage)})


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _source(stage: Stage) -> str:
    """Return a hash of the stage's file and of every project file that it imports, directly or not.

    Model families and data sets are found by name and not imported, so all of them count.
    """
    files = {module_file(name) for name in import_closure(type(stage).__module__) if name not in SHOW_ONLY}
    files |= {path for folder in FOUND_BY_NAME for path in folder.glob("*.py")}
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path):
        digest.update(path.read_bytes())
    return digest.hexdigest()
