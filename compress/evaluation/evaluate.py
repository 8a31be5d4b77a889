"""Evaluating a submission: read, verify, serve, score; the content of results.json."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.extras import evaluator_sha256, toolkit
from compress.evaluation.measure import Progress
from compress.evaluation.runtimes import Runtime, EvaluationSettings, TorchRuntime, open_runtime
from compress.evaluation.score import RESULT_KEYS, TASK_KEYS, accuracy_details, guarded_score, latency_details, score
from compress.evaluation.serve import Answers, _same, classify, repeats_ratio, serve
from compress.evaluation.submission import SubmissionFiles, combined_hash, file_hashes, read_submission
from loaders.images import list_images
from metadata.errors import UserError, VerificationError, first_line
from metadata.machine import PeakMemory, machine, memory_limit, torch_threads, versions


@dataclasses.dataclass(frozen=True)
class Baselines:
    """What a submission is compared with: MB (2^20 bytes), milliseconds at batch 1, percent."""

    size: float = 50.0
    latency: float = 10.0
    accuracy: float = 80.0

    def check(self) -> None:
        """Raises UserError for what is not positive."""
        for name, value in dataclasses.asdict(self).items():
            if not 1e-9 <= value <= 1e9:
                raise UserError(f"--baseline_{name}: expected a positive number, got {value}")


@dataclasses.dataclass(frozen=True)
class TestData:
    """The test images: (N,) paths and class indices, in the order of the folder."""

    folder: Path
    classes: list[str]
    images: list[Path]
    labels: np.ndarray


@dataclasses.dataclass
class Contestant:
    """A submission under evaluation: what was read, what runs, what it was when it came."""

    files: SubmissionFiles
    runtime: Runtime
    hashes: dict[str, str]


def evaluate_submission(submission_dir: str | Path, data_dir: str | Path, baseline_size: float = 50.0,
                        baseline_latency: float = 10.0, baseline_accuracy: float = 80.0,
                        settings: EvaluationSettings | None = None, compare: str | Path | None = None,
                        progress: Progress | None = None) -> dict[str, Any]:
    """Loads, verifies, measures and scores a submission; the result is what `results.json` holds.

    Args:
        compare: another submission, served in turns with the first; the verdicts are in `details.compare`.

    Raises:
        UserError: a folder is missing, an image is unreadable, a setting makes no sense.
        VerificationError: the submission's claims do not hold, or its classes are not the data's.
    """
    settings, baselines = settings or EvaluationSettings(), Baselines(baseline_size, baseline_latency, baseline_accuracy)
    settings.check()
    baselines.check()
    if compare and settings.batch_size != 1:
        raise UserError(f"--batch_size {settings.batch_size}: --compare serves both submissions one image at a time")
    comparing = toolkit("--compare", "compare") if compare else None
    import torch  # noqa: F401 - importing these takes far more memory than most models: before it is limited
    from PIL import Image  # noqa: F401
    classes, listed = list_images(data_dir)
    data = TestData(Path(data_dir), classes, [path for path, _ in listed], np.array([label for _, label in listed]))
    if not compare or not comparing:
        return _evaluate([submission_dir], data, baselines, settings, progress)[0][0]
    try:
        results, served = _evaluate([submission_dir, compare], data, baselines, settings, progress)
    except VerificationError as error:
        # Whose fault it was shows when the first is alone: the other's must not cost it its score.
        result = _evaluate([submission_dir], data, baselines, settings, progress)[0][0]
        result["details"]["compare"] = {"status": f"failed: {first_line(error)}"}
        result["details"]["warnings"].append(f"there is no comparison: {first_line(error)}")
        return result
    results[0]["details"]["compare"] = comparing.verdicts(results, served, data.labels)
    results[0]["details"]["warnings"] += [f"other: {warning}" for warning in results[1]["details"]["warnings"]]
    return results[0]


def _evaluate(folders: Sequence[str | Path], data: TestData, baselines: Baselines, settings: EvaluationSettings,
              progress: Progress | None) -> tuple[list[dict[str, Any]], list[Answers]]:
    """Results and answers of one submission, or of two that take turns."""
    classes, memory = len(data.classes), PeakMemory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_limit(settings.memory_limit_mb))
        entries = []
        for folder in folders:
            files = read_submission(folder)
            _check_classes(files, data.classes, data.folder)
            hashes = file_hashes(files.folder)
            runtime = open_runtime(files, settings, classes, data.folder)
            stack.callback(runtime.close)
            runtime.name = str(files.folder)
            entries.append(Contestant(files, runtime, hashes))
        if any(isinstance(entry.runtime, TorchRuntime) for entry in entries):
            stack.enter_context(torch_threads(settings.threads))
        preprocessings = [entry.files.preprocessing for entry in entries]
        served = serve([entry.runtime for entry in entries], preprocessings, data.images, classes, settings, progress) \
            if settings.batch_size == 1 else [_serve_batches(entries[0], data.images, classes, settings, progress)]
        for entry in entries:
            entry.runtime.close()
    peak = memory.details() if len(entries) == 1 else None  # of two in one process nobody can tell whose it is
    return [_result(entry, answers, data, baselines, settings, peak)
            for entry, answers in zip(entries, served, strict=True)], served


def _check_classes(files: SubmissionFiles, classes: list[str], data_dir: str | Path) -> None:
    count = len(classes) if files.num_classes is None else files.num_classes
    if count == len(classes) and files.class_names in (None, classes):
        return
    odd = sorted(set(classes) ^ set(files.class_names or classes))
    raise VerificationError(f"{data_dir}: {len(classes)} classes, the submission was trained on {count}"
                            + (f"; not in both: {', '.join(odd[:3])}" if odd else ""))


def _serve_batches(entry: Contestant, images: Sequence[Path], classes: int, settings: EvaluationSettings,
                   progress: Progress | None) -> Answers:
    """Accuracy by batches, then timed calls at batch 1, whose answers must be the same."""
    preprocessing = entry.files.preprocessing
    logits = classify(entry.runtime, preprocessing, images, classes, settings, progress)
    some = np.random.default_rng().permutation(len(images))[:settings.runs]
    timed = serve([entry.runtime], [preprocessing], [images[index] for index in some], classes, settings)[0]
    for index, answer in zip(some, timed.logits, strict=True):
        if not _same(logits[index], answer, 1e-2):
            raise VerificationError(f"{images[index]}: the timed run's answer is not the one of the accuracy run")
    return dataclasses.replace(timed, logits=logits)


def _result(entry: Contestant, answers: Answers, data: TestData, baselines: Baselines, settings: EvaluationSettings,
            peak: dict[str, Any] | None) -> dict[str, Any]:
    files, runtime, labels = entry.files, entry.runtime, data.labels
    if file_hashes(files.folder) != entry.hashes:
        raise VerificationError(f"{files.folder}: the folder changed while its model ran")
    remarks = list(runtime.warnings)
    durations = np.random.default_rng().permutation(answers.first_ms)[:settings.runs]
    ratio = repeats_ratio(answers)
    if ratio is not None and ratio < 0.7:
        remarks.append(f"images that were asked again came {1 / ratio:.1f} times faster: answers are cached; only first "
                        "calls are counted")
    elif len(durations) < settings.runs and files.kind != "code":  # which could have kept its answers
        durations = np.concatenate([durations, [took for _, took in answers.again][:settings.runs - len(durations)]])
    latency = latency_details(durations, settings)
    accuracy = accuracy_details(answers.logits, labels, data.classes, settings.batch_size)
    chance = float(np.bincount(labels).max() / len(labels))
    size_bytes, needed = files.size_bytes(), sum(path.stat().st_size for path in files.needed())
    if size_bytes > files.weights.stat().st_size:
        remarks.append("files beside the weights can hold numbers, so model_size counts them: "
                        f"{size_bytes - files.weights.stat().st_size:,} bytes")
    if files.kind == "code" and needed - size_bytes > max(size_bytes // 2, 2**16):
        remarks.append(f"{needed - size_bytes:,} bytes of source, JSON and prose are much beside {size_bytes:,} of data, "
                        "and code can read them; model_size leaves them out, the guarded score does not")
    if accuracy["wilson_95"][0] <= chance:
        remarks.append(f"the accuracy cannot be told from that of the best constant answer, {100 * chance:.2f} %")
    if 100 * accuracy["fraction"] < settings.min_accuracy:
        remarks.append(f"the accuracy is below --min_accuracy {settings.min_accuracy:g} %")
    if settings.batch_size > 1:
        remarks.append(f"accuracy was measured at batch {settings.batch_size}, in a random order")
    evaluator = evaluator_sha256()
    scores = score(size_bytes / 2**20, latency["mean_ms"], 100 * accuracy["fraction"], baselines.size, baselines.latency,
                   baselines.accuracy)
    guarded = guarded_score(scores | {"size_score": baselines.size / (needed / 2**20)}, accuracy["fraction"],
                            baselines.accuracy / 100, chance, settings.min_accuracy / 100, accuracy["wilson_95"][0])
    return {
        "model_size": size_bytes / 2**20, "latency": latency["mean_ms"], "accuracy": 100 * accuracy["fraction"], **scores,
        "details": {
            "status": "ok",
            "guarded_score": guarded,
            "warnings": remarks,
            "baselines": {"size_mb": baselines.size, "latency_ms": baselines.latency, "accuracy": baselines.accuracy},
            "chance": chance,
            "kind": files.kind,
            "backend": runtime.backend,
            "latency": latency | {"repeats_ratio": ratio},
            "accuracy": accuracy,
            "preprocessing": files.preprocessing.model_dump() | {"stated_by": files.preprocessing_from},
            "parameters": runtime.parameters,
            "macs": runtime.macs,
            "bytes": {"weights": size_bytes, "needed_at_inference": needed,
                      "files": {name: (files.folder / name).stat().st_size for name in entry.hashes}},
            "peak_memory": peak,
            "evaluator_sha256": evaluator,
            "sha256": {"evaluator": evaluator, "submission": combined_hash(entry.hashes), **entry.hashes},
            **runtime.details,
            "settings": dataclasses.asdict(settings),
            "machine": machine(), "versions": versions(),
        },
    }


def failed_result(reason: str, task: str | None = None) -> dict[str, Any]:
    """The result of what could not be scored: zero everywhere, and the reason."""
    details: dict[str, Any] = {"status": f"failed: {reason}", "warnings": []}
    details |= {"task": task} if task else {"guarded_score": 0.0}
    return dict.fromkeys(TASK_KEYS if task else RESULT_KEYS, 0.0) | {"details": details}
