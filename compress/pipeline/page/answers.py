"""The answers of two models, image by image: the worst classes, and the pictures whose answer int8 changed."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from compress.evaluation.score import wilson
from compress.pipeline.ledger import PREDICTIONS
from compress.pipeline.page.content import FinishedRun
from metadata.errors import UserError
from metadata.formats import read_csv

CLASSES, PICTURES = 8, 24  # the most that the page shows
SIDE = 96  # pixels of a picture's longer side, at most


@dataclass(frozen=True, kw_only=True)
class StageAnswers:
    """What a stage's model says to the validation images: (N,) int64 labels and predicted classes."""

    stage: str
    labels: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True, kw_only=True)
class WorstClass:
    """A class that a model often gets wrong.

    Args:
        name: of the class.
        correct, images: of the class, of the last model.
        interval: 95 %, of the fraction.
        before: right answers of the float model; None where there is none to compare with.
        mistaken: the class that its images are most often taken for, and how many are.
        test: right answers and images of the test split, where the package was scored.
    """

    name: str
    correct: int
    images: int
    interval: tuple[float, float]
    before: int | None
    mistaken: tuple[str, int]
    test: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class ChangedAnswer:
    """A picture that the int8 model answers differently: its data URI, and the names of the classes."""

    image: int
    picture: str
    label: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class AnswersCompared:
    """The last float model beside the last int8 model, by their stages; `changed` holds some of `total` pictures."""

    before: str
    after: str
    images: int
    total: int
    became_right: int
    became_wrong: int
    changed: list[ChangedAnswer]


def read_answers(run: FinishedRun, index: int) -> StageAnswers | None:
    """Return what a stage's model said when the ledger measured it, or None: earlier versions did not write it down.

    Raises:
        UserError: the file is damaged, or of other images.
    """
    path = run.folder / run.records[index].stage / PREDICTIONS
    rows = read_csv(path)
    if not rows:
        return None
    try:
        labels, predicted = (np.array([int(row[key]) for row in rows]) for key in ("label", "predicted"))
    except (LookupError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the answers of a model; move it away") from error
    if not np.array_equal(labels, run.validation.labels.numpy(force=True)) or not np.isin(
            predicted, np.arange(run.card.num_classes)).all():
        raise UserError(f"{path}: the answers of a model of other data; move it away")
    return StageAnswers(stage=run.records[index].stage.partition("-")[2], labels=labels, predicted=predicted)


def last_answers(run: FinishedRun) -> tuple[StageAnswers | None, StageAnswers | None]:
    """Return the answers of the last float model, where the run made int8 from it, and of the last model of all."""
    def last(stages: range) -> tuple[int, StageAnswers | None]:
        found = ((index, answers) for index in reversed(stages) if (answers := read_answers(run, index)) is not None)
        return next(found, (-1, None))

    index, after = last(range(len(run.records)))
    return (last(range(run.quantized))[1] if index >= run.quantized else None), after


def ranked_classes(answers: StageAnswers) -> list[int]:
    """Return the classes that have a mistake, from the least accurate on."""
    wrong = np.bincount(answers.labels[answers.predicted != answers.labels])
    images = np.bincount(answers.labels, minlength=len(wrong))
    return sorted(np.flatnonzero(wrong).tolist(), key=lambda label: (-wrong[label] / images[label], -wrong[label], label))


def worst_classes(run: FinishedRun, before: StageAnswers | None, after: StageAnswers) -> list[WorstClass]:
    """Return the classes with the least accuracy of the last model, the worst first; none that is always right."""
    names = run.card.class_names
    tested = run.results["details"]["accuracy"].get("per_class", {}) if run.results else {}
    found = []
    for label in ranked_classes(after)[:CLASSES]:
        own = after.labels == label
        predicted = after.predicted[own]
        others = np.bincount(predicted[predicted != label])
        right, test = int((predicted == label).sum()), tested.get(names[label])
        found.append(WorstClass(
            name=names[label], correct=right, images=int(own.sum()), interval=wilson(right, int(own.sum())),
            before=None if before is None else int((before.predicted[own] == label).sum()),
            mistaken=(names[int(others.argmax())], int(others.max())),
            test=(test["correct"], test["total"]) if test and test["total"] else None))
    return found


def compared(run: FinishedRun, before: StageAnswers, after: StageAnswers) -> AnswersCompared:
    """Return which pictures got another answer from the int8 model, those of the worst classes first."""
    labels, names = after.labels, run.card.class_names
    changed = np.flatnonzero(before.predicted != after.predicted)
    rank = {label: place for place, label in enumerate(ranked_classes(after))}
    shown = sorted(changed.tolist(), key=lambda image: (rank.get(int(labels[image]), len(rank)), image))[:PICTURES]
    pictures = run.validation.images.batch(torch.tensor(shown, dtype=torch.int64)) if shown else ()
    return AnswersCompared(
        before=before.stage, after=after.stage, images=len(labels), total=len(changed),
        became_right=int((after.predicted == labels)[changed].sum()),
        became_wrong=int((before.predicted == labels)[changed].sum()),
        changed=[ChangedAnswer(image=image, picture=data_uri(pixels), label=names[labels[image]],
                               before=names[before.predicted[image]], after=names[after.predicted[image]])
                 for image, pixels in zip(shown, pictures, strict=True)])


def data_uri(pixels: torch.Tensor) -> str:
    """Return an image, (C, H, W) uint8 with one or three channels, as the URI of a PNG of at most SIDE pixels a side."""
    array = pixels.cpu().permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
