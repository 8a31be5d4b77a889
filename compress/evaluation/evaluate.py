"""Evaluate a submission: read, verify, serve, score. The result is the content of results.json."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.class_order import ClassOrder, class_order
from compress.evaluation.extras import evaluator_sha256, toolkit
from compress.evaluation.measure import Progress
from compress.evaluation.runtimes import EvaluationSettings, Runtime, TorchRuntime, open_runtime
from compress.evaluation.score import RESULT_KEYS, TASK_KEYS, accuracy_details, guarded_score, latency_details, score
from compress.evaluation.serve import Answers, classify, repeats_ratio, same_answer, serve
from compress.evaluation.submission import SubmissionFiles, combined_hash, file_hashes, read_submission
from loaders.images import is_deep_grey, is_turned
from loaders.listing import Listing, list_images
from metadata.errors import UserError, VerificationError, first_line
from metadata.machine import PeakMemory, machine, memory_limit, torch_threads, versions
from metadata.schemas import Baselines

BASELINES = Baselines()
CACHED = 0.7  # repeated calls that take less than this share of the first call's time were answered from a cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestData:
    """The test images: (N,) paths and class indices, in the order of the folder.

    `listing.classes` are the classes of the folder, and those of the labels.
    """

    listing: Listing
    images: list[Path]
    labels: np.ndarray


@dataclasses.dataclass(kw_only=True)
class Contestant:
    """A submission under evaluation: its files, classes and runtime, and the hash of every file before anything ran."""

    files: SubmissionFiles
    order: ClassOrder
    runtime: Runtime
    hashes: dict[str, str]


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
        progress: called with the number of images done and their total.

    Raises:
        UserError: a folder is missing, an image is unreadable, or a setting is out of range.
        VerificationError: the submission's claims do not hold, or its classes are not the data's.
    """
    settings, baselines = settings or EvaluationSettings(), _baselines(baseline_size, baseline_latency, baseline_accuracy)
    settings.check()
    if compare and settings.batch_size != 1:
        raise UserError(f"--batch_size {settings.batch_size}: --compare serves both submissions one image at a time")
    comparing = toolkit("--compare", "compare") if compare else None
    import torch  # noqa: F401 - these imports take far more memory than most models: do them before memory is limited
    from PIL import Image  # noqa: F401
    listing = list_images(data_dir)
    data = TestData(listing=listing, images=[path for path, _ in listing.images],
                    labels=np.array([label for _, label in listing.images]))
    if not compare or not comparing:
        return _evaluate([submission_dir], data, baselines, settings, progress)[0][0]
    try:
        results, served = _evaluate([submission_dir, compare], data, baselines, settings, progress)
    except VerificationError as error:
        # A failure of the other submission must not cost the first one its score: evaluate the first alone.
        result = _evaluate([submission_dir], data, baselines, settings, progress)[0][0]
        result["details"]["compare"] = {"status": f"failed: {first_line(error)}"}
        result["details"]["warnings"].append(f"there is no comparison: {first_line(error)}")
        return result
    results[0]["details"]["compare"] = comparing.verdicts(results, served, data.labels)
    said = results[0]["details"]["warnings"]
    said += [f"other: {warning}" for warning in results[1]["details"]["warnings"] if warning not in listing.warnings()]
    return results[0]


def _baselines(size: float, latency: float, accuracy: float) -> Baselines:
    """Return the baselines. Raise UserError for a value that is not positive."""
    for name, value in (("size", size), ("latency", latency), ("accuracy", accuracy)):
        if not 1e-9 <= value <= 1e9:
            raise UserError(f"--baseline_{name}: expected a positive number, got {value}")
    return Baselines(size_mb=size, latency_ms=latency, accuracy=accuracy)


def _evaluate(folders: Sequence[str | Path], data: TestData, baselines: Baselines, settings: EvaluationSettings,
              progress: Progress | None) -> tuple[list[dict[str, Any]], list[Answers]]:
    """Return the results and answers of one submission, or of two whose calls are interleaved."""
    memory = PeakMemory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_limit(settings.memory_limit_mb))
        entries = []
        for folder in folders:
            files = read_submission(folder)
            order, hashes = class_order(files, data.listing), files.survey.hashes()
            runtime = open_runtime(files, settings, len(order.names), data.listing.folder)
            stack.callback(runtime.close)
            runtime.name = str(files.folder)
            entries.append(Contestant(files=files, order=order, runtime=runtime, hashes=hashes))
        if any(isinstance(entry.runtime, TorchRuntime) for entry in entries):
            stack.enter_context(torch_threads(settings.threads))
        if settings.batch_size == 1:
            served = serve([entry.runtime for entry in entries], [entry.files.preprocessing for entry in entries],
                           data.images, [len(entry.order.names) for entry in entries], settings, progress)
        else:
            served = [_serve_batches(entries[0], data.images, settings, progress)]
        for entry in entries:
            entry.runtime.close()
    peak = memory.details() if len(entries) == 1 else None  # two submissions share one process and its peak
    # All answers in one order of classes: those of the folder, then those that only a submission knows.
    own = data.listing.classes
    classes = own + sorted({name for entry in entries for name in entry.order.names} - set(own))
    served = [dataclasses.replace(answers, logits=entry.order.arranged(answers.logits, classes))
              for entry, answers in zip(entries, served, strict=True)]
    return [_result(entry, answers, data, classes, baselines, settings, peak)
            for entry, answers in zip(entries, served, strict=True)], served


def _serve_batches(entry: Contestant, images: Sequence[Path], settings: EvaluationSettings,
                   progress: Progress | None) -> Answers:
    """Answer all images in batches, then time calls at batch 1. The timed answers must be the same."""
    preprocessing, classes = entry.files.preprocessing, len(entry.order.names)
    logits = classify(entry.runtime, preprocessing, images, classes, settings, progress)
    some = np.random.default_rng().permutation(len(images))[:settings.runs]
    timed = serve([entry.runtime], [preprocessing], [images[index] for index in some], [classes], settings)[0]
    for index, answer in zip(some, timed.logits, strict=True):
        if not same_answer(logits[index], answer, 1e-2):
            raise VerificationError(f"{images[index]}: the timed run's answer is not the one of the accuracy run")
    return dataclasses.replace(timed, logits=logits)


def _result(entry: Contestant, answers: Answers, data: TestData, classes: Sequence[str], baselines: Baselines,
            settings: EvaluationSettings, peak: dict[str, Any] | None) -> dict[str, Any]:
    """Return a submission's result. Raise VerificationError where its folder changed while its model ran."""
    files, runtime = entry.files, entry.runtime
    if file_hashes(files.folder) != entry.hashes:
        raise VerificationError(f"{files.folder}: the folder changed while its model ran")
    ratio = repeats_ratio(answers)
    latency = latency_details(_durations(answers, files.kind, ratio, settings.runs), settings)
    accuracy = accuracy_details(answers.logits, data.labels, classes, settings.batch_size)
    chance = float(np.bincount(data.labels).max() / len(data.labels))
    size_bytes, needed = files.size_bytes(), files.needed_bytes()
    plain = score(size_bytes / 2**20, latency["mean_ms"], 100 * accuracy["fraction"], baselines)
    guarded = guarded_score(plain | {"size_score": baselines.size_mb / (needed / 2**20)}, accuracy["fraction"],
                            baselines.accuracy / 100, chance, settings.min_accuracy / 100, accuracy["wilson_95"][0])
    evaluator = evaluator_sha256()
    return {
        "model_size": size_bytes / 2**20, "latency": latency["mean_ms"], "accuracy": 100 * accuracy["fraction"], **plain,
        "details": {
            "status": "ok",
            "guarded_score": guarded,
            "warnings": [*data.listing.warnings(), *entry.order.warnings, *runtime.warnings,
                         *entry.order.numbering_warnings(runtime.outputs),
                         *_picture_warnings(files, data.images),
                         *_cache_warnings(ratio), *_size_warnings(files, size_bytes, needed),
                         *_accuracy_warnings(accuracy, chance, settings)],
            "baselines": baselines.model_dump(),
            "chance": chance,
            "kind": files.kind,
            "backend": runtime.backend,
            "latency": latency | {"repeats_ratio": ratio},
            "accuracy": accuracy,
            "class_order": entry.order.matched,
            "preprocessing": files.preprocessing.model_dump() | {"stated_by": files.preprocessing_from},
            "parameters": runtime.parameters,
            "macs": runtime.macs,
            "bytes": {"weights": size_bytes, "needed_at_inference": needed, "counted": files.counted(),
                      "files": {name: file.size for name, file in files.survey.files.items()}},
            "peak_memory": peak,
            "evaluator_sha256": evaluator,
            "sha256": {"evaluator": evaluator, "submission": combined_hash(entry.hashes), **entry.hashes},
            **runtime.details,
            "settings": dataclasses.asdict(settings),
            "machine": machine(), "versions": versions(),
        },
    }


def _durations(answers: Answers, kind: str, ratio: float | None, runs: int) -> np.ndarray:
    """Return the milliseconds of up to `runs` timed calls: first calls, then repeated ones where nothing was cached."""
    first = np.random.default_rng().permutation(answers.first_ms)[:runs]
    cached = ratio is not None and ratio < CACHED
    if len(first) == runs or cached or kind == "code":  # foreign code could have kept its answers
        return first
    return np.concatenate([first, [took for _, took in answers.again][:runs - len(first)]])


def _picture_warnings(files: SubmissionFiles, images: Sequence[Path]) -> list[str]:
    """Return how many test pictures the submission may have seen in another way while it was trained."""
    turned = [] if files.preprocessing.exif_orientation else [path for path in images if is_turned(path)]
    deep = [] if files.metadata else [path for path in images if is_deep_grey(path)]
    return [f"{len(found)} of {len(images)} test images {what}, such as {found[0]}" for found, what in (
        (turned, "carry an EXIF orientation that the submission's preprocessing does not apply"),
        (deep, "are grey with more than 8 bits: they are scaled to 8 bits here, Pillow alone would clip them")) if found]


def _cache_warnings(ratio: float | None) -> list[str]:
    if ratio is None or ratio >= CACHED:
        return []
    return [f"repeated calls with the same image were {1 / ratio:.1f} times faster: answers are cached; only first calls "
            "are counted"]


def _size_warnings(files: SubmissionFiles, size_bytes: int, needed: int) -> list[str]:
    """Return the remarks on files beside the weights. `needed` is the bytes of all files that inference needs."""
    remarks, counted = [], files.counted()
    if beside := counted["data_beside_the_weights"]:
        remarks.append(f"files beside the weights can hold numbers, so model_size counts them: {beside:,} bytes")
    if files.kind == "code" and counted["file_names"] > 2**12:
        remarks.append(f"the names of files can hold numbers, so model_size counts them: {counted['file_names']:,} bytes")
    if files.kind == "code" and needed - size_bytes > max(size_bytes // 2, 2**16):
        remarks.append(f"source, JSON and prose take {needed - size_bytes:,} bytes, a lot beside {size_bytes:,} bytes of "
                       "data, and the code can read them; the guarded score counts them, model_size does not")
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
    details: dict[str, Any] = {"status": f"failed: {reason}", "warnings": []}
    details |= {"task": task} if task else {"guarded_score": 0.0}
    return dict.fromkeys(TASK_KEYS if task else RESULT_KEYS, 0.0) | {"details": details}
