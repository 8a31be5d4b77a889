"""RunPlan, run and resume a pipeline: stages transform, this measures, and the ledger says what each stage was worth."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from compress.packaging.bundle import ROOT, import_order, module_file
from compress.pipeline import report
from compress.pipeline.config import RunConfig
from compress.pipeline.ledger import evaluation_row, ledger_row, served
from compress.pipeline.plan import RunPlan, make_plan, parse_stages, threads
from compress.pipeline.stage import (Artifact, CompressingStage, Context, Evaluation, OnnxModel, Stage,
                                     TorchModel, signature, stage_class)
from compress.settings import settings_error
from compress.training.assessment import times_in_turns
from compress.training.trackers import Tracker
from metadata.errors import UserError, VerificationError
from metadata.files import read_json, write_json
from metadata.formats import write_csv
from metadata.locks import locked
from metadata.machine import machine, versions
from metadata.records import DatasetCard, LedgerRow, StageRecord

SLOWER = 1.05  # times as slow, and it is no accident
SHOW_ONLY = {"compress.training.trackers", "compress.training.loggers"}  # they cannot change a stage's result


# ---------------------------------------------------------------------------------------------------------- plan


# ----------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class RunOutcome:
    """A finished run."""

    folder: Path
    rows: list[LedgerRow]
    results: dict[str, Any] | None
    warnings: list[str]


def run_pipeline(config: RunConfig, console: Console, update: bool = False) -> RunOutcome:
    """Runs a pipeline, or what is left of it.

    Args:
        config: what to do.
        console: where progress goes.
        update: allow a folder that holds a run of other settings; stages whose settings are the same are kept.

    Raises:
        UserError: a mistake of the user's; nothing was lost, and the same command continues after mending it.
        VerificationError: the packaged model is not what it should be.
    """
    torch.set_num_threads(threads(config))
    tracker = Tracker(console)
    plan = make_plan(config, tracker)
    folder = config.run_dir / config.name
    with _claimed(folder, config, update, tracker):
        return _Run(plan, folder, tracker).run()


@contextmanager
def _claimed(folder: Path, config: RunConfig, update: bool, tracker: Tracker) -> Iterator[None]:
    """The folder, for this process alone and for this configuration."""
    settings = folder / "run.json"
    if settings.is_file():
        before = _settings_of(folder)
        difference = config.difference(before)
        if difference and not update:
            raise UserError(f"{folder} already holds another run ({', '.join(difference[:4])}"
                            f"{', ...' if len(difference) > 4 else ''}); choose name=OTHER, or pass --update to redo "
                            "only the stages that this changes")
        if (threads(before), before.device) != (threads(config), config.device):
            tracker.warn(f"this run began on {threads(before)} threads, device {before.device}: a training that goes on "
                         f"with {threads(config)}, device {config.device}, does not end with the same bits")
    elif folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise UserError(f"{folder}: already there and not a run's folder; choose name=OTHER or run_dir=DIR")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "choose name=OTHER"):
        write_json(settings, {"schema": 1, "config": config.model_dump(mode="json"), "machine": machine(),
                              "versions": versions()})
        yield


def _settings_of(folder: Path) -> RunConfig:
    """The configuration of the run in a folder."""
    path = folder / "run.json"
    try:
        return RunConfig.model_validate(json.loads(path.read_text())["config"])
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a run's folder (no run.json in it)") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not a run's settings; move the folder away, or choose name=OTHER") from error


class _Run:
    """The state of one run: which stages are done, and what they gave."""

    def __init__(self, plan: RunPlan, folder: Path, tracker: Tracker) -> None:
        self.plan, self.folder, self.tracker = plan, folder, tracker
        self.config, self.splits = plan.config, plan.splits
        cuda = self.config.device == "cuda" or (self.config.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.rows: list[LedgerRow] = []
        self.outputs: list[Artifact] = []
        self.warnings = list(self.splits.warnings)
        self.latest: LedgerRow | None = None  # of the model that the next stage gets

    def run(self) -> RunOutcome:
        for text in self.splits.warnings:
            self.tracker.warn(text)
        card = self.splits.card
        write_json(self.folder / "card.json", card.model_dump(mode="json"))
        self._remove_stages_after(0, keep={name for name, _ in self.plan.stages})
        key = _hash({"card": card.model_dump(mode="json"), "seed": self.config.seed,
                     "validation_fraction": self.config.data.validation_fraction})
        for number, (name, stage) in enumerate(self.plan.stages, start=1):
            key = _hash({"parent": key, "stage": name, "config": stage.model_dump(mode="json"), "source": _source(stage)})
            title = f"[{number}/{len(self.plan.stages)}] {name.partition('-')[2]}"
            record = self._finished(name, key)
            if record:
                self.tracker.say(f"{title}: finished before, skipped")
                self._load_output(stage, name)
            else:
                self.tracker.say(f"{title}: {self.plan.sketch.lines[number - 1]}")
                record = self._run_stage(stage, name, key)
            self.rows += record.rows
            self.latest = record.rows[0]
            self.warnings += record.warnings
            write_csv(self.folder / "ledger.csv", [row.model_dump() for row in self.rows])
        last = self.outputs[-1]
        results = last.results if isinstance(last, Evaluation) else None
        if results:
            write_json(self.folder / "results.json", results)
        report.write_report(self.folder, self.config.name, self.rows, self.warnings, results)
        return RunOutcome(self.folder, self.rows, results, self.warnings)

    def _finished(self, name: str, key: str) -> StageRecord | None:
        path = self.folder / name / "stage.json"
        if not path.is_file():
            return None
        record: StageRecord = read_json(path, StageRecord)
        return record if record.key == key else None

    def _remove_stages_after(self, number: int, keep: Collection[str] = ()) -> None:
        """Removes stages with a higher number, but for those to keep: nothing stale may be reported or handed on."""
        stale = [path for path in self.folder.glob("[0-9][0-9]-*")
                 if int(path.name[:2]) > number and path.name not in keep]
        for path in stale:
            shutil.rmtree(path)
            if path.name.endswith("-package"):
                shutil.rmtree(self.folder / "submission", ignore_errors=True)
        if stale:
            for name in ("results.json", "report.md", "plot.png"):
                (self.folder / name).unlink(missing_ok=True)

    def _load_output(self, stage: Stage, name: str) -> None:
        _, gives = signature(type(stage))
        self.outputs.append(gives.load(self.folder / name))

    def _run_stage(self, stage: Stage, name: str, key: str) -> StageRecord:
        folder = self.folder / name
        started = folder / "stage.key"
        if not started.is_file() or started.read_text() != key:
            self._remove_stages_after(int(name[:2]) - 1)  # of other settings, and what was made from them
            folder.mkdir()
            started.write_text(key)
        for leftover in folder.glob(".*.part"):  # of a write that SIGKILL cut short
            leftover.unlink()
        latest = self.latest.model_dump() if self.latest else {}
        context = Context(self.splits, self.device, self.config.seed, folder, self.folder,
                          dataclasses.replace(self.tracker, folder=folder), self.outputs, latest)
        begin = time.monotonic()
        produced = stage.run(self.outputs[-1] if self.outputs else None, context)
        produced.save(folder)
        self._load_output(stage, name)  # as a resumed run would, so that both go on from the same
        seconds_of_extras = sum(extra_seconds for _, extra_seconds in context.extra_models.values())
        seconds = max(time.monotonic() - begin - seconds_of_extras, context.training_seconds)
        rows = [self._measure(self.outputs[-1], folder, name.partition("-")[2], seconds)]
        if isinstance(stage, CompressingStage) and not stage.allow_slower and self.latest:
            self._refuse_slower(name, rows[0], self.latest)
        for label, (extra, extra_seconds) in context.extra_models.items():
            (folder / label).mkdir(exist_ok=True)
            extra.save(folder / label)
            rows.append(self._measure(TorchModel.load(folder / label), folder / label,
                                      f"{name.partition('-')[2]} ({label})", extra_seconds))
        record = StageRecord(stage=name, key=key, config=stage.model_dump(mode="json"), notes=context.notes,
                             warnings=context.warnings, rows=rows)
        write_json(folder / "stage.json", record.model_dump(mode="json"))
        for checkpoint in folder.glob("checkpoint*.pth"):
            checkpoint.unlink()
        row = rows[0]
        self.tracker.say(f"  {row.parameters:,} parameters, {row.size_bytes / 2**20:.3f} MB, {row.latency_ms:.2f} ms, "
                         f"{row.split} accuracy {row.accuracy:.2%} ({row.correct}/{row.images}), {seconds:.1f} s")
        return record

    def _measure(self, artifact: Artifact, folder: Path, stage: str, seconds: float) -> LedgerRow:
        """The ledger's row for what a stage left."""
        if isinstance(artifact, Evaluation):
            return evaluation_row(artifact.results, stage, seconds)
        model = served(artifact, folder, self.splits.card)
        return ledger_row(model, stage, seconds, self.splits, self.device, self.tracker)

    def _refuse_slower(self, name: str, row: LedgerRow, before: LedgerRow) -> None:
        """Raises VerificationError where a stage made the model slower and not smaller, measured in turns."""
        if row.size_bytes < before.size_bytes:
            return
        names = [title for title, _ in self.plan.stages]
        folders = [self.folder / names[names.index(name) - 1], self.folder / name]
        pair = [served(artifact, folder, self.splits.card).answer
                for artifact, folder in zip(self.outputs[-2:], folders, strict=True)]
        earlier, now = times_in_turns(pair, self.splits.card.input_shape)
        if now > SLOWER * earlier:
            (self.folder / name / "stage.key").unlink()  # it runs again once its settings have changed, or by another luck
            raise VerificationError(
                f"stage {name}: its result is slower, {now:.3f} ms against {earlier:.3f} ms, and not smaller, "
                f"{row.size_bytes:,} bytes against {before.size_bytes:,}; take the stage out, or set "
                f"{name.partition('-')[2]}.allow_slower=true")


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _source(stage: Stage) -> str:
    """A hash of the stage's file and of all that it imports: a stage whose code changed runs again.

    Model families and data sets are found by name, not imported, so all of them count.
    """
    files = {module_file(name) for name in import_order(type(stage).__module__) if name not in SHOW_ONLY}
    found_by_name = [ROOT / "architectures" / "families", ROOT / "loaders" / "sets"]
    digest = hashlib.sha256()
    files |= {path for folder in found_by_name for path in folder.glob("*.py")}
    for path in sorted(path for path in files if path):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- package


def package_run(folder: Path, out: Path, settings: dict[str, Any]) -> None:
    """Packages the last model of a finished or unfinished run into another folder.

    Raises:
        UserError: no such run, no model in it yet, a setting out of range, or a target that exists.
    """
    found: tuple[TorchModel | OnnxModel, LedgerRow] | None = None
    for name, stage in parse_stages(_settings_of(folder)):
        if name.endswith("-package"):
            settings = stage.model_dump() | settings
        gives = signature(type(stage))[1]
        if gives in (TorchModel, OnnxModel) and (folder / name / "stage.json").is_file():
            record: StageRecord = read_json(folder / name / "stage.json", StageRecord)
            found = gives.load(folder / name), record.rows[0]
    if found is None:
        raise UserError(f"{folder}: no stage of this run has left a student yet; let it run on first")
    kind = stage_class("package")
    try:
        stage = kind.model_validate(settings)
    except ValidationError as error:
        raise settings_error("package", error, kind.model_fields) from error
    card: DatasetCard = read_json(folder / "card.json", DatasetCard)
    assert isinstance(stage, kind)
    stage.contents(found[0], card, found[1].model_dump()).write(out)  # type: ignore[attr-defined]
