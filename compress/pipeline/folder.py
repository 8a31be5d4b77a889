"""A run's folder: claimed by one process and one configuration, read back, and cleared of stale stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.pipeline.config import RunConfig
from compress.pipeline.plan import threads
from compress.training.trackers import Tracker
from metadata.errors import UserError
from metadata.files import read_json, write_json
from metadata.locks import locked
from metadata.machine import machine, versions
from metadata.records import StageRecord

RUN, CARD, STAGE, KEY, SUBMISSION = "run.json", "card.json", "stage.json", "stage.key", "submission"
RESULTS, REPORT, PLOT = "results.json", "report.md", "plot.png"  # what a finished run adds


@contextmanager
def claimed(folder: Path, config: RunConfig, update: bool, tracker: Tracker) -> Iterator[None]:
    """Hold the folder for this process and this configuration.

    Raises:
        UserError: the folder holds something else, a run of other settings (without `update`), or another process has
            the folder.
    """
    if (folder / RUN).is_file():
        _check_same(folder, config, update, tracker)
    elif folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise UserError(f"{folder}: already there and not a run's folder; choose name=OTHER or run_dir=DIR")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "choose name=OTHER"):
        write_json(folder / RUN, {"schema": 1, "config": config.model_dump(mode="json"), "machine": machine(),
                                  "versions": versions()})
        yield


def _check_same(folder: Path, config: RunConfig, update: bool, tracker: Tracker) -> None:
    """Raise UserError where the folder holds a run of other settings; warn of other threads and another device."""
    before = read_config(folder)
    difference = config.difference(before)
    if difference and not update:
        raise UserError(f"{folder} already holds another run ({', '.join(difference[:4])}"
                        f"{', ...' if len(difference) > 4 else ''}); choose name=OTHER, or pass --update to redo "
                        "only the stages that this changes")
    if (threads(before), before.device) != (threads(config), config.device):
        tracker.warn(f"this run began on {threads(before)} threads, device {before.device}; a training that continues "
                     f"on {threads(config)} threads, device {config.device}, does not end with the same bits")


def read_config(folder: Path) -> RunConfig:
    """Return the configuration of the run in a folder.

    Raises:
        UserError: the folder holds no run, or its settings cannot be read.
    """
    path = folder / RUN
    try:
        return RunConfig.model_validate(json.loads(path.read_text())["config"])
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a run's folder (no {RUN} in it)") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not a run's settings; move the folder away, or choose name=OTHER") from error


def finished(folder: Path, name: str, key: str) -> StageRecord | None:
    """Return the record of a stage that has finished with this key, or None."""
    path = folder / name / STAGE
    if not path.is_file():
        return None
    record: StageRecord = read_json(path, StageRecord)
    return record if record.key == key else None


def open_stage(folder: Path, name: str, key: str) -> Path:
    """Return the stage's folder, ready to run in: what an interrupted run with the same key left there is kept."""
    own = folder / name
    started = own / KEY
    if not started.is_file() or started.read_text() != key:
        remove_stages(folder, from_number=int(name[:2]))  # other settings made them, and what follows them
        own.mkdir()
        started.write_text(key)
    for leftover in own.glob(".*.part"):  # SIGKILL cut the write short
        leftover.unlink()
    return own


def remove_stages(folder: Path, from_number: int = 1, keep: Collection[str] = ()) -> None:
    """Remove stages from a number on, except those to keep, so that nothing stale is reported or handed on."""
    stale = [path for path in folder.glob("[0-9][0-9]-*") if int(path.name[:2]) >= from_number and path.name not in keep]
    for path in stale:
        shutil.rmtree(path)
        if path.name.endswith("-package"):
            shutil.rmtree(folder / SUBMISSION, ignore_errors=True)
    if stale:
        for name in (RESULTS, REPORT, PLOT):
            (folder / name).unlink(missing_ok=True)
