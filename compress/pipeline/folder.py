"""A run's folder: claimed by one process, read back, and cleared of stages that are to be made again.

Nothing that a run has finished is removed unless the user says `--update`. What would be redone is named, with the reason.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from compress.pipeline.config import RunConfig
from compress.pipeline.identity import StageIdentity
from compress.pipeline.plan import RunPlan, threads
from compress.training.trackers import Tracker
from loaders.content import write_hashes
from metadata.errors import UserError, VerificationError, some_of
from metadata.files import read_json, write_json
from metadata.locks import locked
from metadata.machine import machine, versions
from metadata.records import StageRecord

RUN, CARD, STAGE, KEY, SUBMISSION = "run.json", "card.json", "stage.json", "stage.key", "submission"
RESULTS, REPORT, PLOT, PAGE = "results.json", "report.md", "plot.png", "report.html"  # what a finished run adds
WORK = ("*.pth", "*.onnx")  # of an interrupted stage: checkpoints, cached outputs of a teacher, candidates of a search


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """How far a stage of a run has come.

    Args:
        name: of the stage's folder.
        state: "finished"; "begun" and to be continued; "open", with nothing to lose; "stale": finished or begun, and to
            be redone; or "dropped": of a stage that the recipe has no more, and to be removed.
        reasons: why a stale stage is; none beside those of a stage before it, from whose result it is made.
        record: of a finished stage.
    """

    name: str
    state: Literal["finished", "begun", "open", "stale", "dropped"]
    reasons: list[str] = field(default_factory=list)
    record: StageRecord | None = None


def survey(folder: Path, plan: RunPlan) -> list[StageStatus]:
    """Return how far each stage of a plan has come in a run's folder, and then what is left of other stages."""
    found: list[StageStatus] = []
    to_make = ""  # the first stage that has not finished: what follows it is made from its result
    said: set[str] = set()  # reasons that were given for an earlier stage
    for (name, _), identity in zip(plan.stages, plan.identities, strict=True):
        status = _status(folder / name, identity, to_make)
        if status.state == "finished" and name.endswith("-package") and not (folder / SUBMISSION).is_dir():
            status = StageStatus(name=name, state="stale", reasons=[f"its {SUBMISSION}/ is gone"])
        if status.state == "stale" and not status.reasons and not said:
            status = replace(status, reasons=[f"{to_make} before it is not finished"])
        found.append(replace(status, reasons=[reason for reason in status.reasons if reason not in said]))
        said |= set(status.reasons)
        to_make = to_make or ("" if status.state == "finished" else name)
    planned = {name for name, _ in plan.stages}
    return found + [StageStatus(name=path.name, state="dropped") for path in sorted(folder.glob("[0-9][0-9]-*"))
                    if path.name not in planned and _has_work(path)]


def _status(own: Path, identity: StageIdentity, to_make: str) -> StageStatus:
    if (own / STAGE).is_file():
        try:
            record: StageRecord = read_json(own / STAGE, StageRecord)
        except VerificationError as error:
            return StageStatus(name=own.name, state="stale", reasons=[str(error)])
        if record.key == identity.key and not to_make:
            return StageStatus(name=own.name, state="finished", record=record)
        return StageStatus(name=own.name, state="stale", reasons=identity.changes(record.made_from))
    if (own / KEY).is_file():
        key, made_from = _begun_with(own / KEY)
        if key == identity.key and not to_make:
            return StageStatus(name=own.name, state="begun")
        if work := _work(own):
            reasons = [*identity.changes(made_from), f"it has begun: {work[0]}"]
            return StageStatus(name=own.name, state="stale", reasons=reasons)
    return StageStatus(name=own.name, state="open")


def _work(own: Path) -> list[str]:
    """Return the files of an interrupted stage that took long to make."""
    return sorted(path.name for pattern in WORK for path in own.glob(pattern))


def _has_work(own: Path) -> bool:
    return (own / STAGE).is_file() or ((own / KEY).is_file() and bool(_work(own)))


def _begun_with(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the key of a stage that has begun, and what from; earlier versions wrote the key alone."""
    text = path.read_text()
    try:
        content = json.loads(text)
        return str(content["key"]), dict(content["made_from"])
    except (ValueError, LookupError, TypeError):
        return text, {}


def to_redo(found: Sequence[StageStatus]) -> str:
    """Return the stages that are to be redone, with their reasons, in words; "" if there are none."""
    stale = [status for status in found if status.state == "stale"]
    named = [f"{status.name} ({some_of(status.reasons, 3, '; ')})" for status in stale if status.reasons]
    following = [status.name for status in stale if not status.reasons]
    return some_of(named, 4) + (f" and what follows it ({', '.join(following)})" if following else "")


def to_remove(found: Sequence[StageStatus]) -> str:
    """Return the stages that the recipe has no more and what was made from them, in words; "" if there are none."""
    names = [status.name for status in found if status.state == "dropped"]
    return f"{', '.join(names)} (not in the recipe any more), with the results and the report" if names else ""


def standing(plan: RunPlan) -> list[str]:
    """Return a line on what the run's folder already holds of a plan, and one on what would be redone."""
    folder = plan.config.run_dir / plan.config.name
    found = survey(folder, plan) if (folder / RUN).is_file() else []
    words = {"finished": "finished before", "begun": "begun"}
    lines = [f"{folder}: {words[state]}: {', '.join(names)}" for state in words
             if (names := [status.name for status in found if status.state == state])]
    lines += [f"{folder}: would be redone, with --update: {redo}"] if (redo := to_redo(found)) else []
    return lines + ([f"{folder}: would be removed, with --update: {removed}"] if (removed := to_remove(found)) else [])


@contextmanager
def claimed(folder: Path, plan: RunPlan, update: bool, tracker: Tracker) -> Iterator[list[StageStatus]]:
    """Hold the folder for this process. Yield how far the stages have come.

    Raises:
        UserError: the folder holds something else, or another process has it; or, without `update`, something that is
            finished would be redone. Nothing in the folder was changed then.
    """
    before = None
    if (folder / RUN).is_file():
        before = read_config(folder)
    elif folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise UserError(f"{folder}: already there and not a run's folder; choose name=OTHER or run_dir=DIR")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "choose name=OTHER"):
        found = survey(folder, plan)
        losses = [f"{what}: {named}" for what, named in (("redone", to_redo(found)), ("removed", to_remove(found)))
                  if named]
        if losses:
            if not update:
                for status in found:
                    if status.state == "stale":
                        why = "; ".join(status.reasons) or "what it is made from would be"
                        place = f"[{int(status.name[:2])}/{len(plan.stages)}] {status.name[3:]}"
                        tracker.say(f"{place}: would be redone: {why}")
                raise UserError(f"{folder} holds work that would be {', and work that would be '.join(losses)}; nothing "
                                "was changed; pass --update to do so, or choose name=OTHER")
            for text in losses:
                tracker.say(text)
        if before and any(status.state == "begun" for status in found):
            _warn_of_bits(before, plan.config, tracker)
        write_json(folder / RUN, {"schema": 1, "config": plan.config.model_dump(mode="json"), "machine": machine(),
                                  "versions": versions()})
        write_hashes(folder, plan.hashes)
        yield found


def _warn_of_bits(before: RunConfig, config: RunConfig, tracker: Tracker) -> None:
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


def open_stage(folder: Path, status: StageStatus, identity: StageIdentity) -> Path:
    """Return the stage's folder, ready to run in: what an interrupted run of the same stage left there is kept."""
    own = folder / status.name
    if status.state != "begun":
        remove_stages(folder, from_number=int(status.name[:2]))  # made from something else, and so is what follows them
        own.mkdir(exist_ok=True)
        write_json(own / KEY, {"key": identity.key, "made_from": identity.made_from})
    for leftover in own.glob(".*.part"):  # SIGKILL cut the write short
        leftover.unlink()
    return own


def remove_stages(folder: Path, from_number: int = 1, keep: Collection[str] = ()) -> None:
    """Remove stages from a number on, except those to keep, so that nothing stale is reported or handed on."""
    stale = [path for path in folder.glob("[0-9][0-9]-*") if int(path.name[:2]) >= from_number and path.name not in keep
             and ((path / STAGE).is_file() or (path / KEY).is_file())]  # another folder is the user's own
    for path in stale:
        shutil.rmtree(path)
        if path.name.endswith("-package"):
            shutil.rmtree(folder / SUBMISSION, ignore_errors=True)
    if stale:
        for name in (RESULTS, REPORT, PLOT, PAGE):
            (folder / name).unlink(missing_ok=True)
