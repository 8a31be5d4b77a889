"""Stage `evaluate`: score the packaged folder in a clean process, and check it against the model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field
from compress.evaluation.measure import measure_accuracy
from compress.pipeline.conversion import served_answer
from compress.pipeline.stage import Context, Evaluation, OnnxModel, Sketch, Stage, Submission, TorchModel
from loaders.splits import write_image_folder
from metadata.errors import UserError, VerificationError
from metadata.machine import torch_threads
from metadata.records import baselines


class Evaluate(Stage):
    """Run the folder's own model_loader.py under `python -I`, in another working folder, on the test split."""

    baselines: str = Field("default", description="name of an entry of metadata/baselines.json")

    opens_test = True

    def reads(self) -> dict[str, Any]:
        return {"baselines": baselines()[self.baselines].model_dump()}

    def check(self, sketch: Sketch) -> None:
        if self.baselines not in baselines():
            raise UserError(f"evaluate.baselines {self.baselines!r}: unknown (known: {', '.join(baselines())})")
        sketch.lines.append(f"python -I model_loader.py on the test split, baselines {self.baselines!r}")

    def run(self, model: Submission, context: Context) -> Evaluation:
        test = context.splits.open_test()
        folder = context.splits.test_folder
        if folder is None:  # the split is not on disk as image files, or some are not readable
            folder = context.folder / "test_images"
            if not folder.exists():
                write_image_folder(test, context.splits.card.class_names, folder)
        original = context.latest(TorchModel, OnnxModel)
        assert isinstance(original, TorchModel | OnnxModel), "a submission comes from an earlier output"
        with (tempfile.TemporaryDirectory() as scratch, context.tracker.progress("in memory") as advance,
              torch_threads(1)):  # the model as its stage left it
            answer = (original.module.cpu().eval() if isinstance(original, TorchModel)
                      else served_answer(original, Path(scratch), context))
            expected = measure_accuracy(answer, test.batches(1), context.splits.card.preprocessing, len(test), advance)
        results = self._score(model.folder, folder, context)
        counted = results["details"]["accuracy"]
        context.note("in_memory", {"correct": expected.correct, "total": expected.total})
        if (counted["correct"], counted["total"]) != (expected.correct, expected.total):
            raise VerificationError(
                f"{model.folder}: the packaged model has {counted['correct']} of {counted['total']} test images right, "
                f"the model in memory {expected.correct} of {expected.total}; they must be the same")
        return Evaluation(results)

    def _score(self, submission: Path, data: Path, context: Context) -> dict[str, Any]:
        chosen = baselines()[self.baselines]
        with tempfile.TemporaryDirectory() as elsewhere:
            output = Path(elsewhere) / "results.json"
            command = [sys.executable, "-I", str(submission.resolve() / "model_loader.py"),
                       "--submission_dir", str(submission.resolve()), "--data_dir", str(data.resolve()),
                       "--baseline_size", str(chosen.size_mb), "--baseline_latency", str(chosen.latency_ms),
                       "--baseline_accuracy", str(chosen.accuracy), "--output_file", str(output)]
            context.tracker.say("  scoring the package in a clean process")
            # On a terminal the evaluator shows its own progress with the time left.
            errors = None if context.tracker.console.is_terminal else subprocess.PIPE
            done = subprocess.run(command, cwd=elsewhere, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
            if done.returncode:
                reason = (done.stderr or "see the line above").strip().splitlines()[-1].removeprefix("error: ")
                kind = UserError if done.returncode == 2 else VerificationError
                raise kind(f"{submission}: its evaluation failed with exit code {done.returncode}: {reason}")
            results: dict[str, Any] = json.loads(output.read_text())
        return results
