"""An ONNX model in another format: converted, and run by the format's own runtime on real images before it is done."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import torch
from torch import Tensor

from compress.evaluation.runtimes import answering, open_file
from compress.packaging.export import check_labels, check_same
from compress.packaging.formats.base import ONNX_FORMAT, export_format
from compress.pipeline.stage import Context, OnnxModel
from loaders.images import normalize

Answer = Callable[[Tensor], Tensor]
FLOAT_TOLERANCE = 1e-4  # of the largest logit
SAME_CLASS = 0.995  # share of the images whose class by int8 must be that of exact integers
ANSWERED_AT_ONCE = 32


def validation_inputs(context: Context, images: int) -> Iterator[Tensor]:
    """Yield validation images chosen by the run's seed, preprocessed, in batches."""
    split = context.splits.validation
    for ids in split.sample(images, context.seed).split(ANSWERED_AT_ONCE):
        yield normalize(split.images.batch(ids).cpu(), context.splits.card.preprocessing)


def answers(answer: Answer, context: Context, images: int) -> Tensor:
    """Return the logits for `validation_inputs`."""
    with torch.inference_mode():
        return torch.cat([answer(batch) for batch in validation_inputs(context, images)])


def served_answer(model: OnnxModel, folder: Path, context: Context) -> Answer:
    """Write the files that are served into a folder, and return the model as a function on its own runtime."""
    card = context.splits.card
    return answering(open_file(model.write_served(folder), card.input_shape, card.preprocessing, model.backend))


def onnx_answers(model: OnnxModel, context: Context, images: int) -> Tensor:
    """Return the logits of the ONNX file on ONNX Runtime, which sums integers exactly, for `validation_inputs`."""
    plain = dataclasses.replace(model, files={}, card=model.card.model_copy(update={"backend": "onnxruntime"}))
    with tempfile.TemporaryDirectory() as folder:
        return answers(served_answer(plain, Path(folder), context), context, images)


def converted(model: OnnxModel, name: str, context: Context, images: int, expected: Tensor | None = None) -> OnnxModel:
    """Return an ONNX model in a format, whose files were run on validation images.

    Args:
        model: the ONNX model.
        name: of the format; of ONNX itself, the model is returned as it is.
        context: of the stage, which gets a note on the agreement.
        images: number of validation images.
        expected: logits of the network for these images; by default those of the ONNX file, from exact integer sums.

    Raises:
        UserError: the format is not installed, or cannot express the network.
        VerificationError: the files answer otherwise: a float network's logits differ by more than `FLOAT_TOLERANCE`, or
            an int8 network gives fewer than `SAME_CLASS` of the images the same class.
    """
    if name == ONNX_FORMAT:
        return model
    kind = export_format(name)
    files = kind.convert(onnx.load_model_from_string(model.content))
    card = model.card.model_copy(update={"format": name, "suffixes": list(files)})
    result = dataclasses.replace(model, card=card, files=files)
    expected = onnx_answers(model, context, images) if expected is None else expected
    with tempfile.TemporaryDirectory() as folder:
        own = kind.open(result.write_served(Path(folder))) if kind.open else served_answer(result, Path(folder), context)
        got = answers(own, context, images)
    if model.card.scheme == "none":
        found = check_same(expected, got, FLOAT_TOLERANCE, kind.title)
        said = ""
    else:
        found = check_labels(expected, got, SAME_CLASS, kind.title)
        said = f"{found['same_class']} classes are those of exact integers, "
    size = sum(map(len, files.values()))
    context.note("format", {"name": name, "bytes": size, **found})
    context.tracker.say(f"  {kind.title}, {size:,} bytes; on {found['images']} validation images {said}logits differ by "
                        f"at most {found['largest_difference']:.2g} (largest logit {found['largest_logit']:.3g})")
    return result
