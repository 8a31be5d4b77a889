"""A finished run as its report sees it, read back from its folder; and variants of what the folder holds."""

from __future__ import annotations

import csv
import html.parser
import json
from pathlib import Path

from compress.pipeline.folder import read_config
from compress.pipeline.ledger import PREDICTIONS
from compress.pipeline.page.content import FRONT, FinishedRun
from loaders.catalog import load
from metadata.files import read_json
from metadata.formats import read_csv, write_csv
from metadata.records import StageRecord

COLUMNS = ("candidate", "model", "form", "latency_ms", "size_bytes", "macs", "parameters", "validation_accuracy",
           "validation_images", "round", "status", "settings")


def finished_run(folder: Path) -> FinishedRun:
    """Return the finished run in a folder, which may have been moved."""
    config = read_config(folder).model_copy(update={"run_dir": folder.parent})
    splits = load(config.data.request(seed=config.seed, workers=1))
    records: list[StageRecord] = [read_json(path, StageRecord) for path in sorted(folder.glob("[0-9]*/stage.json"))]
    results = folder / "results.json"
    return FinishedRun(folder=folder, config=config, card=splits.card, records=records, validation=splits.validation,
                       warnings=[text for record in records for text in record.warnings],
                       results=json.loads(results.read_text()) if results.is_file() else None)


def answer_otherwise(folder: Path, stage: str, answers: dict[int, int]) -> None:
    """Let a stage's model have answered some validation images, by their index, with other classes."""
    path = folder / stage / PREDICTIONS
    rows = [{**row, "predicted": answers.get(int(row["image"]), row["predicted"])} for row in read_csv(path)]
    write_csv(path, rows)


def write_front(folder: Path, stage: str, *candidates: tuple[object, ...]) -> None:
    """Leave the table of a search in a stage's folder."""
    with (folder / stage / FRONT).open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *candidates])


class Parsed(html.parser.HTMLParser):
    """A page's elements as a browser sees them: names with attributes, and the texts inside each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # (the element that was opened last, a text in it)
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.elements[-1][0], " ".join(data.split()) if self.elements[-1][0] != "script" else data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of each element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """What a reader reads, in one line."""
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))
