"""Evaluate a submission: read, verify, serve, score. The result is the content of results.json."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.contestant import Contestant
from compress.evaluation.extras import evaluator_sha256, toolkit
from compress.evaluation.facts import SubmissionFacts
from compress.evaluation.measure import Progress
from compress.evaluation.nursery import check_platform, nursery
from compress.evaluation.pictures import TestData, list_test_data
from compress.evaluation.reader_runtime import BATCH_BYTES
from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.score import RESULT_KEYS, TASK_KEYS, accuracy_details, guarded_score, latency_details, score
from compress.evaluation.serve import Answers, classify, repeats_ratio, serve
from metadata.errors import UserError, VerificationError, first_line, printable
from metadata.machine import machine
from metadata.schemas import Baselines

BASELINES = Baselines()
OTHER_ANSWERS = 0.02  # of the timed calls with --batch_size may name another class than the call of a batch
CACHED = 0.7  # repeated calls that take less than this share of the first call's time were answered from a cache


def evaluate_submission(submission_dir: str | Path, data_dir: str | Path, baseline_size: float = BASELINES.size_mb,
                        baseline_latency: float = BASELINES.latency_ms, baseline_accuracy: float = BASELINES.accuracy,
                        settings: EvaluationSettings | None = None, compare: str | Path | None = None,
                        progress: Progress | None = None) -> dict[str, Any]:
    """Load, verify, measure and score a submission. Return what `results.json` holds.

    Args:
        submission_dir: the submission's folder.
        data_dir: the test images, one folder a class.
        baseline_size: MB (2^20 bytes).
        baseline_latency: milliseconds at batch 1.
        baseline_accuracy: percent.
        settings: how to measure; the defaults unless given.
        compare: another submission. Its calls are interleaved with those of the first; the verdicts are in
            `details.compare`.
        progress: called with the number of images done and their total, while they are read and while they are
            classified.

    Raises:
        UserError: a folder is missing, an image is unreadable, or a setting is out of range.
        VerificationError: the submission's claims do not hold, or its classes are not the data's.
    """
    settings, baselines = settings or EvaluationSettings(), _baselines(baseline_size, baseline_latency, baseline_accuracy)
    settings.check()
    if compare and settings.batch_size != 1:
        raise UserError(f"--batch_size {settings.batch_size}: --compare serves both submissions one image at a time")
    comparing = toolkit("--compare", "compare") if compare else None
    check_platform()
    nursery()  # which imports torch in the time that the next lines take
    for name, folder in (("submission_dir", submission_dir), ("compare", compare)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"--{name} {folder}: there is no such folder")
        if folder and Path(data_dir).resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--data_dir {data_dir}: lies in --{name} {folder}, whose code could read it; move the data "
                            "elsewhere")
    data = list_test_data(data_dir)
    [result], _ = _evaluate([submission_dir], data, baselines, settings, progress)
    if not compare or not comparing:
        return result
    # The first result is complete: whatever the other submission does changes nothing of it.
    details = result["details"]
    try:
        results, served = _evaluate([submission_dir, compare], data, baselines, settings, progress)
        judged = comparing.verdicts([result, results[1]], served, data.labels)
        if judged["latency"]["verdict"] != comparing.SAME:
            again, served = _evaluate([submission_dir, compare], data, baselines, settings, progress)
            judged = comparing.confirmed(judged, comparing.verdicts([result, again[1]], served, data.labels))
        details["compare"] = judged
        details["warnings"] += [f"other: {warning}" for warning in results[1]["details"]["warnings"]
                                if warning not in data.listing.warnings()]
    except Exception as error:  # whatever the other one does, also what nobody foresaw, leaves the first one its result
        details["compare"] = {"status": f"failed: {first_line(error)}"}
        details["warnings"].append(f"there is no comparison: {first_line(error)}")
    return result


def _baselines(size: float, latency: float, accuracy: float) -> Baselines:
    """Return the baselines. Raise UserError for a value that is not positive."""
    for name, value in (("size", size), ("latency", latency), ("accuracy", accuracy)):
        if not 1e-9 <= value <= 1e9:
            raise UserError(f"--baseline_{name}: expected a positive number, got {value}")
    return Baselines(size_mb=size, latency_ms=latency, accuracy=accuracy)


def _evaluate(folders: Sequence[str | Path], data: TestData, baselines: Baselines, settings: EvaluationSettings,
              progress: Progress | None) -> tuple[list[dict[str, Any]], list[Answers]]:
    """Return the results and answers of one submission, or of two whose calls are interleaved."""
    with contextlib.ExitStack() as stack:
        entries = [stack.enter_context(Contestant(folder, settings)) for folder in folders]
        for entry in entries:
            entry.prepare(data, progress if len(entries) == 1 else None)
        for entry in entries:
            entry.open(data)
        if settings.batch_size == 1:
            served = serve([entry.runtime for entry in entries], [entry.pictures for entry in entries],
                           [len(entry.order.names) for entry in entries], settings, [entry.clock for entry in entries],
                           progress)
        else:
            served = [_serve_batches(entries[0], settings, progress)]
        for entry in entries:
            entry.finish()
    # All answers in one order of classes: those of the folder, then those that only a submission knows.
    own = data.listing.classes
    classes = own + sorted({name for entry in entries for name in entry.order.names} - set(own))
    served = [dataclasses.replace(answers, logits=entry.order.arranged(answers.logits, classes))
              for entry, answers in zip(entries, served, strict=True)]
    return [_result(entry, answers, data, classes, baselines, settings)
            for entry, answers in zip(entries, served, strict=True)], served


def _serve_batches(entry: Contestant, settings: EvaluationSettings, progress: Progress | None) -> Answers:
    """Answer all images in batches, then time calls at batch 1. The timed answers must be the same."""
    pictures, classes = entry.pictures, len(entry.order.names)
    if 4 * settings.batch_size * pictures.pixels[0].size > BATCH_BYTES:
        raise UserError(f"--batch_size {settings.batch_size}: so many images of shape {list(pictures.pixels.shape[1:])} "
                        f"take more than {BATCH_BYTES:,} bytes as float32; use a smaller one")
    logits = classify(entry.runtime, pictures, classes, settings, entry.clock, progress)
    some = np.random.default_rng().permutation(len(pictures))[:settings.runs]
    timed = serve([entry.runtime], [pictures.some(some)], [classes], settings, [entry.clock])[0]
    odd = some[logits[some].argmax(1) != timed.logits.argmax(1)]  # what counts of an answer; near ties may differ
    if len(odd) > max(1, OTHER_ANSWERS * len(some)):
        raise VerificationError(f"{pictures.paths[odd[0]]}: the timed run's answer is not the one of the accuracy run, as "
                                f"for {len(odd)} of {len(some)}")
    return dataclasses.replace(timed, logits=logits)


def _result(entry: Contestant, answers: Answers, data: TestData, classes: Sequence[str], baselines: Baselines,
            settings: EvaluationSettings) -> dict[str, Any]:
    """Return a submission's result."""
    facts, runtime = entry.facts, entry.runtime
    ratio = repeats_ratio(answers)
    latency = latency_details(_durations(answers, facts.kind, ratio, settings.runs), settings)
    accuracy = accuracy_details(answers.logits, data.labels, classes, settings.batch_size)
    chance = float(np.bincount(data.labels).max() / len(data.labels))
    plain = score(facts.size_bytes / 2**20, latency["mean_ms"], 100 * accuracy["fraction"], baselines)
    guarded = guarded_score(plain | {"size_score": baselines.size_mb / (facts.needed_bytes / 2**20)},
                            accuracy["fraction"], baselines.accuracy / 100, chance, settings.min_accuracy / 100,
                            accuracy["wilson_95"][0])
    evaluator = evaluator_sha256()
    return {
        "model_size": facts.size_bytes / 2**20, "latency": latency["mean_ms"], "accuracy": 100 * accuracy["fraction"],
        **plain,
        "details": {
            "status": "ok",
            "guarded_score": guarded,
            "warnings": [printable(warning) for warning in (
                *data.listing.warnings(), *entry.order.warnings, *runtime.warnings,
                *entry.order.numbering_warnings(runtime.outputs), *entry.pictures.warnings, *_cache_warnings(ratio),
                *_size_warnings(facts), *_accuracy_warnings(accuracy, chance, settings))],
            "baselines": baselines.model_dump(),
            "chance": chance,
            "kind": facts.kind,
            "backend": runtime.backend,
            "latency": latency | {"repeats_ratio": ratio},
            "accuracy": accuracy,
            "class_order": entry.order.matched,
            "preprocessing": facts.preprocessing.model_dump() | {"stated_by": facts.preprocessing_from},
            "parameters": runtime.parameters,
            "macs": runtime.macs,
            "bytes": {"weights": facts.counted["weights"] + facts.counted["data_beside_the_weights"],
                      "model_size": facts.size_bytes, "needed_at_inference": facts.needed_bytes, "counted": facts.counted,
                      "files": facts.sizes},
            "peak_memory": entry.peak_memory,
            "evaluator_sha256": evaluator,
            "sha256": {"evaluator": evaluator, "submission": facts.combined_hash, **facts.hashes},
            **runtime.details,
            "settings": dataclasses.asdict(settings),
            "machine": machine(), "versions": entry.versions,
        },
    }


def _durations(answers: Answers, kind: str, ratio: float | None, runs: int) -> np.ndarray:
    """Return the milliseconds of up to `runs` timed calls: first calls, then repeated ones where nothing was cached."""
    first = np.random.default_rng().permutation(answers.first_ms)[:runs]
    cached = ratio is not None and ratio < CACHED
    if len(first) == runs or cached or kind == "code":  # foreign code could have kept its answers
        return first
    return np.concatenate([first, [took for _, took in answers.again][:runs - len(first)]])


def _cache_warnings(ratio: float | None) -> list[str]:
    if ratio is None or ratio >= CACHED:
        return []
    return [f"repeated calls with the same image were {1 / ratio:.1f} times faster: answers are cached; only first calls "
            "are counted"]


def _size_warnings(facts: SubmissionFacts) -> list[str]:
    """Return the remarks on files beside the weights."""
    remarks, counted = [], facts.counted
    if beside := counted["data_beside_the_weights"]:
        remarks.append(f"files beside the weights can hold numbers, so model_size counts them: {beside:,} bytes")
    if described := counted["numbers_in_the_architecture"]:
        remarks.append("what describes the layers can hold numbers and is large beside the weights, so model_size counts "
                       f"it: {described:,} bytes")
    if facts.kind == "code" and counted["file_names"] > 2**12:
        remarks.append(f"the names of files can hold numbers, so model_size counts them: {counted['file_names']:,} bytes")
    text, held = counted["source_json_and_prose"], counted["text_compressed"]
    if held:
        remarks.append(f"source, JSON and prose are large beside {counted['weights']:,} bytes of weights: model_size "
                       f"counts {held:,} bytes of them, as they are when compressed, the guarded score all {text:,} "
                       "bytes; remove what the model does not need")
    return remarks


def _accuracy_warnings(accuracy: dict[str, Any], chance: float, settings: EvaluationSettings) -> list[str]:
    remarks = []
    if accuracy["wilson_95"][0] <= chance:
        remarks.append(f"the accuracy cannot be told from that of the best constant answer, {100 * chance:.2f} %")
    if 100 * accuracy["fraction"] < settings.min_accuracy:
        remarks.append(f"the accuracy is below --min_accuracy {settings.min_accuracy:g} %")
    if settings.batch_size > 1:
        remarks.append(f"accuracy was measured at batch {settings.batch_size}, in a random order")
    return remarks


def failed_result(reason: str, task: str | None = None) -> dict[str, Any]:
    """Return the result of a submission that could not be scored: zero everywhere, and the reason."""
    details: dict[str, Any] = {"status": f"failed: {reason}", "warnings": [], "guarded_score": 0.0}
    details |= {"task": task} if task else {}
    return dict.fromkeys(TASK_KEYS if task else RESULT_KEYS, 0.0) | {"details": details}
