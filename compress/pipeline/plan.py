"""Plan a run: check the recipe's settings, chain its stages and open its data before anything trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from compress.pipeline.config import RunConfig
from compress.pipeline.identity import StageIdentity, identities
from compress.pipeline.stage import KINDS, Sketch, Stage, signature, stage_class
from compress.settings import settings_error
from compress.training.trackers import Tracker
from loaders.catalog import load
from loaders.content import read_hashes
from loaders.request import FileHashes
from loaders.splits import Splits
from metadata.errors import UserError
from metadata.machine import usable_cores


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A checked run: its settings are valid, its stages chain, and its data is there."""

    config: RunConfig
    stages: list[tuple[str, Stage]]  # folder name, stage
    splits: Splits
    sketch: Sketch
    identities: list[StageIdentity]  # of the stages
    hashes: FileHashes  # of the data's files


def parse_stages(config: RunConfig) -> list[tuple[str, Stage]]:
    """Return the stages with their settings, each with the name of its folder.

    Raises:
        UserError: unknown stages or settings (with the closest match), or stages that do not chain; every problem in
            one line.
    """
    problems: list[str] = []
    stages: list[tuple[str, Stage]] = []
    carried: tuple[Any, ...] = (type(None),)  # the kinds of artifact that the stage before may give
    for index, entry in enumerate(config.stages):
        (name, options), = entry.items()
        try:
            kind = stage_class(name)
            takes, gives = signature(kind)
            if not set(carried) <= set(takes):
                problems.append(f"stage {name} takes {_named(takes)}, but the stage before it gives {_named(carried)}")
            carried = gives
            stages.append((f"{index + 1:02d}-{name}", kind.model_validate(options)))
        except ValidationError as error:
            problems.append(str(settings_error(f"stage {name}", error, _keys(kind))))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return stages


def _named(kinds: tuple[Any, ...]) -> str:
    return " or ".join(KINDS[kind] for kind in kinds)


def _keys(kind: type[Stage]) -> list[str]:
    """Return every key below a stage, for the closest match."""
    keys = list(kind.model_fields)
    for info in kind.model_fields.values():
        keys += list(getattr(info.annotation, "model_fields", {}))
    return keys


def make_plan(config: RunConfig, tracker: Tracker) -> RunPlan:
    """Check everything that can be checked before training.

    Raises:
        UserError: everything that is wrong, in one line.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no CUDA device; use device=cpu or auto")
    stages = parse_stages(config)
    with tracker.progress("reading images") as advance:
        hashes = read_hashes(config.run_dir / config.name)
        splits = load(config.data.request(seed=config.seed, workers=threads(config), on_progress=advance, hashes=hashes))
    if not len(splits.validation):
        raise UserError(f"data.validation_fraction {config.data.validation_fraction:g}: nothing is held out, and a "
                        "pipeline measures and chooses by validation images; give a fraction such as 0.05, or an image "
                        "folder with val/ beside train/ and test/")
    sketch = Sketch(card=splits.card, seed=config.seed)
    problems = []
    for _, stage in stages:
        drawn = len(sketch.lines)
        try:
            stage.check(sketch)
        except UserError as error:
            problems.append(str(error))
        if len(sketch.lines) == drawn:
            sketch.lines.append("")
    if problems:
        raise UserError("; ".join(problems))
    return RunPlan(config=config, stages=stages, splits=splits, sketch=sketch, hashes=hashes,
                   identities=identities(stages, splits.card, config))


def threads(config: RunConfig) -> int:
    """Return the number of CPU threads of a run."""
    return config.threads or usable_cores()
