"""Run and resume a pipeline. A stage transforms the model; the pipeline measures what the stage left."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from compress.pipeline.config import RunConfig
from compress.pipeline.folder import (
    CARD, KEY, PAGE, REPORT, RESULTS, STAGE, StageStatus, claimed, open_stage, remove_stages)
from compress.pipeline.identity import StageIdentity
from compress.pipeline.ledger import evaluation_row, ledger_row, served
from compress.pipeline.page.content import FinishedRun
from compress.pipeline.page.write import write_page
from compress.pipeline.plan import RunPlan, make_plan, threads
from compress.pipeline.repeat import RECIPE, as_recipe
from compress.pipeline.report import write_report
from compress.pipeline.stage import Artifact, CompressingStage, Context, Evaluation, Stage, TorchModel, load_output
from compress.training.assessment import interleaved_times
from compress.training.malloc import keep_freed_memory
from compress.training.trackers import Tracker
from loaders.splits import Split
from metadata.errors import UserError, VerificationError, first_line
from metadata.files import write_atomically, write_json
from metadata.formats import write_csv
from metadata.records import LedgerRow, StageRecord

SLOWER = 1.05  # latency ratio above which a stage's result counts as slower


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """A finished run."""

    folder: Path
    rows: list[LedgerRow]
    results: dict[str, Any] | None
    warnings: list[str]


def run_pipeline(config: RunConfig, console: Console, update: bool = False) -> RunOutcome:
    """Run a pipeline from its first stage that has not finished.

    Args:
        config: the run's settings.
        console: where progress goes.
        update: make finished stages again if what they were made from has changed: settings, data, files or code.

    Raises:
        UserError: the user made a mistake; nothing was lost, and the same command continues once it is mended.
        VerificationError: a stage's result is not what it should be.
    """
    keep_freed_memory()
    torch.set_num_threads(threads(config))
    tracker = Tracker(console)
    plan = make_plan(config, tracker)
    folder = config.run_dir / config.name
    with claimed(folder, plan, update, tracker) as found:
        return PipelineRun(plan=plan, folder=folder, tracker=tracker).complete(found)


@dataclass(kw_only=True)
class PipelineRun:
    """A run in progress: what each stage gave so far."""

    plan: RunPlan
    folder: Path
    tracker: Tracker
    records: list[StageRecord] = field(default_factory=list)
    rows: list[LedgerRow] = field(default_factory=list)
    outputs: list[Artifact] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    latest: LedgerRow | None = None  # of the model that the next stage gets

    @property
    def device(self) -> torch.device:
        """The device that stages train on."""
        chosen = self.plan.config.device
        cuda = chosen == "cuda" or (chosen == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if cuda else "cpu")

    def complete(self, found: list[StageStatus]) -> RunOutcome:
        """Run the stages that have not finished, in order, and write the report; `found` is how far they have come."""
        self._begin()
        stages = self.plan.stages
        for (name, stage), line, identity, status in zip(stages, self.plan.sketch.lines, self.plan.identities,
                                                         found[:len(stages)], strict=True):
            title = f"[{int(name[:2])}/{len(stages)}] {_stage_name(name)}"
            record = status.record
            if record:
                self.tracker.say(f"{title}: finished before, skipped")
                self._load_output(stage, name)
            else:
                self.tracker.say(f"{title}: {line}")
                record = self._run_stage(stage, status, identity)
            self._enter(record)
        return self._end()

    def _begin(self) -> None:
        """Repeat the data's warnings, and remove the stages that the plan no longer has."""
        self.warnings += self.plan.splits.warnings
        for text in self.warnings:
            self.tracker.warn(text)
        write_json(self.folder / CARD, self.plan.splits.card.model_dump(mode="json"))
        write_atomically(self.folder / RECIPE, as_recipe(self.plan.config).encode())
        remove_stages(self.folder, keep={name for name, _ in self.plan.stages})

    def _enter(self, record: StageRecord) -> None:
        """Add a finished stage to the ledger."""
        self.records.append(record)
        self.rows += record.rows
        self.latest = record.rows[0]
        self.warnings += record.warnings
        write_csv(self.folder / "ledger.csv", [row.model_dump() for row in self.rows])

    def _end(self) -> RunOutcome:
        """Write the results and the report."""
        last = self.outputs[-1]
        results = last.results if isinstance(last, Evaluation) else None
        if results:
            write_json(self.folder / RESULTS, results)
        self._write_reports(results)
        return RunOutcome(folder=self.folder, rows=self.rows, results=results, warnings=self.warnings)

    def _write_reports(self, results: dict[str, Any] | None) -> None:
        """Write report.md, plot.png and report.html. The run is done: what fails here is a warning, whatever it is."""
        splits = self.plan.splits
        with self._warned(REPORT):
            write_report(self.folder, self.plan.config.name, self.rows, self.warnings, results)
        with self._warned(PAGE):
            write_page(FinishedRun(folder=self.folder, config=self.plan.config, card=splits.card, records=self.records,
                                   validation=splits.validation, warnings=list(self.warnings), results=results))

    @contextlib.contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        """Turn what fails into a warning, and remove the file of an earlier run, which would tell of other models."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)
            kind = "" if isinstance(error, UserError | OSError) else f"{type(error).__name__}: "
            self.warnings.append(f"{name} could not be written: {kind}{first_line(error)}; once that is mended, the same "
                                 "command writes it")
            self.tracker.warn(self.warnings[-1])

    # --------------------------------------------------------------------------------------------------- one stage

    def _run_stage(self, stage: Stage, status: StageStatus, identity: StageIdentity) -> StageRecord:
        """Run a stage, measure its result, and write its record last."""
        name, folder = status.name, open_stage(self.folder, status, identity)
        context = self._context(stage, folder)
        seconds = self._transform(stage, name, context)
        row = self._measure(self.outputs[-1], folder, _stage_name(name), seconds)
        if isinstance(stage, CompressingStage) and not stage.allow_slower and self.latest:
            self._refuse_slower(name, row, self.latest)
        record = StageRecord(stage=name, key=identity.key, made_from=identity.made_from,
                             config=stage.model_dump(mode="json"), notes=context.notes, warnings=context.warnings,
                             rows=[row, *self._measure_extras(name, context)])
        write_json(folder / STAGE, record.model_dump(mode="json"))
        for path in [*folder.glob("checkpoint*.pth"), *folder.glob("best-*.pth")]:
            path.unlink()
        self.tracker.say(f"  {row.parameters:,} parameters, {row.size_bytes / 2**20:.3f} MB, {row.latency_ms:.2f} ms, "
                         f"{row.split} accuracy {row.accuracy:.2%} ({row.correct}/{row.images}), {seconds:.1f} s")
        return record

    def _context(self, stage: Stage, folder: Path) -> Context:
        splits = self.plan.splits
        if not stage.opens_test:  # its identity does not hold the test images
            splits = dataclasses.replace(splits, open_test=_refuse_test)
        return Context(splits=splits, device=self.device, seed=self.plan.config.seed, folder=folder,
                       run_folder=self.folder, tracker=dataclasses.replace(self.tracker, folder=folder),
                       outputs=self.outputs, measurements=self.latest.model_dump() if self.latest else {})

    def _transform(self, stage: Stage, name: str, context: Context) -> float:
        """Run the stage on the latest output and save what it returns. Return the seconds over all sittings."""
        begin = time.monotonic()
        produced = stage.run(self.outputs[-1] if self.outputs else None, context)
        produced.save(context.folder)
        self._load_output(stage, name)  # as a resumed run would, so that both continue from the same bits
        seconds_of_extras = sum(seconds for _, seconds in context.extra_models.values())
        return max(time.monotonic() - begin - seconds_of_extras, context.training_seconds)

    def _load_output(self, stage: Stage, name: str) -> None:
        self.outputs.append(load_output(type(stage), self.folder / name))

    def _measure(self, artifact: Artifact, folder: Path, stage: str, seconds: float) -> LedgerRow:
        """Return the ledger's row for what a stage left in its folder."""
        if isinstance(artifact, Evaluation):
            return evaluation_row(artifact.results, stage, seconds)
        model = served(artifact, folder, self.plan.splits.card)
        return ledger_row(model, stage, seconds, self.plan.splits, self.device, self.tracker, folder)

    def _measure_extras(self, name: str, context: Context) -> list[LedgerRow]:
        """Save the models that the stage made beside its result, each in a folder below its own, and measure them."""
        rows = []
        for label, (model, seconds) in context.extra_models.items():
            folder = context.folder / label
            folder.mkdir(exist_ok=True)
            model.save(folder)
            rows.append(self._measure(TorchModel.load(folder), folder, f"{_stage_name(name)} ({label})", seconds))
        return rows

    def _refuse_slower(self, name: str, row: LedgerRow, before: LedgerRow) -> None:
        """Raise VerificationError where a stage made the model slower and not smaller, both timed interleaved."""
        if row.size_bytes < before.size_bytes:
            return
        names = [title for title, _ in self.plan.stages]
        folders = [self.folder / names[names.index(name) - 1], self.folder / name]
        card = self.plan.splits.card
        pair = [served(artifact, folder, card).answer
                for artifact, folder in zip(self.outputs[-2:], folders, strict=True)]
        earlier, now = interleaved_times(pair, card.input_shape)
        if now > SLOWER * earlier:
            (self.folder / name / KEY).unlink()  # the stage runs again when its settings or the timing change
            raise VerificationError(
                f"stage {name}: its result is slower, {now:.3f} ms against {earlier:.3f} ms, and not smaller, "
                f"{row.size_bytes:,} bytes against {before.size_bytes:,}; take the stage out, or set "
                f"{_stage_name(name)}.allow_slower=true")


def _refuse_test() -> Split:
    raise AssertionError("a stage that opens the test split says so: opens_test = True")


def _stage_name(folder_name: str) -> str:
    """Return `prune` of `03-prune`."""
    return folder_name.partition("-")[2]
