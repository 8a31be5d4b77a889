"""The ledger's measurements: every artifact, whatever its format, is opened as it will be served, and measured alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from architectures.counting import count_macs, count_parameters
from compress.evaluation.measure import measure_accuracy, measure_latency
from compress.evaluation.file_formats import FILE_FORMATS
from compress.evaluation.runtime import Runtime
from compress.evaluation.runtimes import answering, EvaluationSettings, open_file, open_here, preferred_backend
from compress.evaluation.submission import open_submission, read_submission
from compress.pipeline.stage import Artifact, OnnxModel, Submission, TeacherModel, TorchModel, WEIGHTS
from compress.training.trackers import Tracker
from loaders.splits import Splits
from metadata.formats import write_csv
from metadata.machine import torch_threads
from metadata.records import DatasetCard, LedgerRow

PREDICTIONS = "predictions.csv"  # each validation image with its class and the class that the model says


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model as a function of images, and its sizes, which are known without running it.

    Args:
        answer: (N, C, H, W) float32, preprocessed, to (N, classes) logits; a module on the CPU, or a runtime.
        singly: validate one image at a time on one thread, as panels do; the answers or the speed depend on that.
    """

    answer: Callable[[Tensor], Tensor]
    parameters: int
    macs: int
    size_bytes: int
    singly: bool


def served(artifact: Artifact, folder: Path, card: DatasetCard) -> Served:
    """Open what a stage left in its folder as it will be served."""
    if isinstance(artifact, Submission):
        files = read_submission(artifact.folder)
        if files.kind in FILE_FORMATS:
            size = sum(path.stat().st_size for path in {files.weights, *files.data_files})
            return _on_runtime(open_here(files, preferred_backend(files), EvaluationSettings().threads), size)
        size = files.weights.stat().st_size
        return _in_torch(open_submission(files), card, size, files.architecture is not None and files.architecture.is_int8)
    if isinstance(artifact, OnnxModel):
        runtime = open_file(artifact.served_file(folder), card.input_shape, card.preprocessing, artifact.backend)
        return _on_runtime(runtime, sum(map(len, artifact.files.values())) or len(artifact.content))
    assert isinstance(artifact, TorchModel | TeacherModel)
    int8 = isinstance(artifact, TorchModel) and artifact.architecture.is_int8
    return _in_torch(artifact.module, card, (folder / WEIGHTS).stat().st_size, int8)


def _on_runtime(runtime: Runtime, size_bytes: int) -> Served:
    return Served(answer=answering(runtime), parameters=runtime.parameters["all"] or 0, macs=runtime.macs or 0,
                  size_bytes=size_bytes, singly=True)


def _in_torch(module: nn.Module, card: DatasetCard, size_bytes: int, int8: bool) -> Served:
    module = module.cpu().eval()
    return Served(answer=module, parameters=count_parameters(module), macs=count_macs(module, card.input_shape),
                  size_bytes=size_bytes, singly=int8)


def ledger_row(model: Served, stage: str, seconds: float, splits: Splits, device: torch.device, tracker: Tracker,
               folder: Path) -> LedgerRow:
    """Measure latency at batch 1 on one CPU thread, and accuracy on the validation split (float modules on `device`).

    The answers are left in `folder`, so that two models can be compared image by image later.
    """
    latency = measure_latency(model.answer, splits.card.input_shape)
    split, preprocessing = splits.validation, splits.card.preprocessing
    with tracker.progress(f"validating {stage}") as advance:
        if isinstance(model.answer, nn.Module) and not model.singly:
            module = copy.deepcopy(model.answer).to(device)
            result = measure_accuracy(module, split.batches(128), preprocessing, len(split), advance)
        else:
            with torch_threads(1):
                result = measure_accuracy(model.answer, split.batches(1), preprocessing, len(split), advance)
    write_csv(folder / PREDICTIONS, [{"image": index, "label": label, "predicted": predicted} for index, (label, predicted)
                                     in enumerate(zip(split.labels.tolist(), result.predictions, strict=True))])
    return LedgerRow(stage=stage, parameters=model.parameters, macs=model.macs, size_bytes=model.size_bytes,
                     latency_ms=latency.median_ms, latency_p5_ms=latency.p5_ms, latency_p95_ms=latency.p95_ms,
                     accuracy=result.correct / result.total, correct=result.correct, images=result.total,
                     seconds=round(seconds, 2))


def evaluation_row(results: dict[str, Any], stage: str, seconds: float) -> LedgerRow:
    """Return the ledger's row for what the evaluator measured on the test split."""
    details = results["details"]
    return LedgerRow(stage=stage, split="test", parameters=details["parameters"]["all"], macs=details["macs"],
                     size_bytes=details["bytes"]["weights"], latency_ms=details["latency"]["median_ms"],
                     latency_p5_ms=details["latency"]["p5_ms"], latency_p95_ms=details["latency"]["p95_ms"],
                     accuracy=results["accuracy"] / 100, correct=details["accuracy"]["correct"],
                     images=details["accuracy"]["total"], seconds=round(seconds, 2))
