"""report.html: what it holds of a run, that it asks for nothing, and that the user's texts stay texts."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from compress.evaluation.score import wilson
from compress.pipeline.config import resolve
from compress.pipeline.page.answers import data_uri
from compress.pipeline.page.charts import in_range, not_beaten
from compress.pipeline.page.content import FinishedRun, measured_models
from compress.pipeline.page.write import page, write_page
from compress.pipeline.repeat import as_recipe, repeating_command
from compress.pipeline.run import run_pipeline
from compress.pipeline.report import write_report
from metadata.errors import UserError
from metadata.formats import read_csv, write_csv
from tests.helpers.commands import Compress
from tests.helpers.ledgers import STAGES, ledger
from tests.helpers.reports import Parsed, answer_otherwise, finished_run, write_front

INT8, PACKAGE = "05-quantize_dynamic", "06-package"
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> FinishedRun:
    """The finished run in a folder of its own."""
    return finished_run(Path(shutil.copytree(tiny_run, tmp_path / "tiny")))


def figures(found: Parsed) -> dict[str, dict[str, list[dict[str, object]]]]:
    """The plots of a page by their ids."""
    texts = [text for tag, text in found.texts if tag == "script"]
    names = [attributes.get("data-plot") for attributes in found.of("script")]
    return {name: json.loads(text) for name, text in zip(names, texts, strict=True) if name}


def test_a_run_leaves_a_page_that_asks_for_nothing(tiny_run: Path) -> None:
    text = (tiny_run / "report.html").read_text()
    assert text.startswith("<!doctype html>")
    found = Parsed(text)
    links = [value for _, attributes in found.elements for name, value in attributes.items()
             if name in ("src", "href", "action", "data", "srcset") and value]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert not {"iframe", "object", "embed", "base", "form"} & {tag for tag, _ in found.elements}
    ids = {attributes["id"] for _, attributes in found.elements if "id" in attributes}
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    policy = next(meta["content"] for meta in found.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 2 and all(f"'sha256-{digest}'" in policy for digest in hashes)
    assert "default-src 'none'" in policy and "unsafe-inline' 'sha" not in policy


def test_the_ledger_has_every_row_with_its_interval(run: FinishedRun) -> None:
    found = Parsed(page(run))
    assert [record.stage[3:] for record in run.records] == STAGES
    for row in (row for record in run.records for row in record.rows):
        low, high = wilson(row.correct, row.images)
        for part in (row.stage, f"{row.accuracy:.2%}", f"{low:.2%} to {high:.2%}", f"{row.correct:,} of {row.images:,}",
                     f"{row.size_bytes:,}", f"{row.latency_ms:.3f}", f"{row.macs:,}", f"{row.parameters:,}"):
            assert part in found.text
    assert {attributes.get("id") for attributes in found.of("details")} >= {f"stage-{number}" for number in range(1, 8)}
    assert "train.batch_size 6" in found.text and "threads of the run 1" in found.text and torch.__version__ in found.text


def test_points_have_intervals_settings_and_a_place_to_open(run: FinishedRun) -> None:
    points = {model.name: model for model in measured_models(run)}
    assert list(points) == [stage for stage in STAGES if stage != "package"]
    assert [points[stage].kind for stage in ("finetune", "quantize_dynamic", "evaluate")] == ["float", "int8", "test"]
    plots = figures(Parsed(page(run)))
    assert list(plots) == ["front-bytes", "front-latency", "curves-accuracy", "curves-loss"]
    trace = next(trace for trace in plots["front-bytes"]["data"] if trace["name"] == "int8")
    row = run.records[4].rows[0]
    low, high = wilson(row.correct, row.images)
    assert trace["x"] == [row.size_bytes] and trace["y"] == [row.accuracy]
    assert trace["error_y"]["array"] == pytest.approx([high - row.accuracy])
    assert trace["error_y"]["arrayminus"] == pytest.approx([row.accuracy - low])
    target, told = trace["customdata"][0]
    assert target == "stage-5" and "arithmetic: int8" in told and f"{row.size_bytes:,} bytes" in told
    timed = next(trace for trace in plots["front-latency"]["data"] if trace["name"] == "int8")
    assert timed["x"] == [row.latency_ms]
    assert timed["error_x"]["array"] == pytest.approx([row.latency_p95_ms - row.latency_ms])


def test_curves_show_every_epoch_that_was_measured(run: FinishedRun) -> None:
    drawn = figures(Parsed(page(run)))["curves-accuracy"]["data"]
    for index, stage in ((1, "teacher"), (2, "distill: student"), (4, "finetune")):
        epochs = read_csv(run.folder / f"0{index}-{stage.partition(':')[0]}" / "metrics.csv")
        validation, train = (next(trace for trace in drawn if trace["name"].startswith(f"{index} {stage.split(':')[0]}")
                                  and trace["line"]["dash"] == dash) for dash in ("solid", "dot"))
        assert validation["y"] == [float(epoch["validation_accuracy"]) for epoch in epochs]
        assert train["y"] == [float(epoch["train_accuracy"]) for epoch in epochs]


def test_coverage_says_which_layers_are_int8_and_why_others_are_not(run: FinishedRun) -> None:
    assert "quantize_dynamic: 21 of 21 layers are int8, with 100 % of the weights" in Parsed(page(run)).text
    layer = run.records[4].notes["coverage"][0]
    layer |= {"dtype": "float32", "reason": "excluded by the recipe", "sqnr_db": None}
    text = Parsed(page(run)).text
    assert "20 of 21 layers are int8" in text and f"{layer['layer']} {layer['kind']} float32 excluded by the recipe" in text


def test_predictions_are_what_the_ledger_counted(tiny_run: Path) -> None:
    for number, row in enumerate(ledger(tiny_run)[:6], start=1):
        answers = read_csv(tiny_run / f"{number:02d}-{row['stage']}" / "predictions.csv")
        assert len(answers) == int(row["images"])
        assert sum(answer["label"] == answer["predicted"] for answer in answers) == int(row["correct"])


def test_pictures_whose_answer_int8_changed(run: FinishedRun) -> None:
    labels = run.validation.labels.tolist()
    right = dict(enumerate(labels))
    answer_otherwise(run.folder, "04-finetune", right)
    for stage in (INT8, PACKAGE):
        answer_otherwise(run.folder, stage, right | {3: (labels[3] + 1) % 4})
    found = Parsed(page(run))
    names = run.card.class_names
    assert (f"package answers 1 of {len(labels)} validation images differently than finetune. Right answers that became "
            "wrong: 1; wrong ones that became right: 0.") in found.text
    assert f"{names[labels[3]]} float: {names[labels[3]]} right int8: {names[(labels[3] + 1) % 4]} wrong" in found.text
    (picture,) = found.of("img")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))))
    assert np.array_equal(pixels, run.validation.images.batch(torch.tensor([3]))[0].permute(1, 2, 0).numpy())
    assert picture["alt"] == f"validation image 3, of class {names[labels[3]]}"
    own = labels.count(labels[3])
    assert f"{names[labels[3]]} {(own - 1) / own:.2%}" in found.text  # the only class with a mistake
    assert f"{names[(labels[3] + 1) % 4]} (1)" in found.text


def test_equal_and_faultless_answers_are_said_to_be_so(run: FinishedRun) -> None:
    for stage in ("04-finetune", INT8, PACKAGE):
        answer_otherwise(run.folder, stage, dict(enumerate(run.validation.labels.tolist())))
    text = Parsed(page(run)).text
    assert f"package has all {len(run.validation)} validation images right" in text
    assert f"package gives all {len(run.validation)} validation images the answer that finetune gives" in text


def test_pictures_are_small_and_keep_their_channels() -> None:
    for channels, mode in ((1, "L"), (3, "RGB")):
        uri = data_uri(torch.arange(channels * 200 * 300).reshape(channels, 200, 300).to(torch.uint8))
        picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
        assert picture.format == "PNG" and picture.mode == mode and picture.size == (96, 64)


def test_texts_of_the_user_stay_texts(run: FinishedRun) -> None:
    names = [EVIL, "a\"b'c", "&amp;", "</script>"]
    evil = dataclasses.replace(
        run, card=run.card.model_copy(update={"class_names": names}), warnings=[f"a warning of {EVIL}"],
        config=run.config.model_copy(update={"name": "\"quoted\" 'run' <b>", "recipe": EVIL, "run_dir": Path(f"/{EVIL}")}))
    evil.config.stages[0]["teacher"]["options"] = {"width": EVIL, "</script>": "</script><img src=x onerror=alert(1)>"}
    evil.records[1].notes["</details>"] = EVIL
    labels = run.validation.labels.tolist()
    answer_otherwise(run.folder, PACKAGE, {image: (label + 1) % 4 for image, label in enumerate(labels)})
    write_front(run.folder, "03-prune", (EVIL, EVIL, "int8", 1.0, 1000, 10, 10, 0.5, 12, 1, EVIL, json.dumps({EVIL: EVIL})))
    found, plain = Parsed(page(evil)), Parsed(page(run))
    count = len(found.of("script"))
    assert count == len(plain.of("script")) == 6
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert all(image["src"].startswith("data:image/png") for image in found.of("img"))
    assert found.text.count(EVIL) > 5 and "\"quoted\" 'run' <b>" in found.text and "a\"b'c" in found.text
    told = json.dumps(figures(found)["front-bytes"])
    assert "&lt;script&gt;alert(1)" in told and EVIL not in told  # plotly reads HTML in its texts


def test_notes_of_a_stage_are_pairs_and_tables(run: FinishedRun) -> None:
    run.records[2].notes["rounds"] = [{"width": 8, "kept": True}, {"width": 16, "why": ["slow", "large"]}]
    run.records[2].notes["trace"] = {"steps": [1, 2], "loss": 0.123456789}
    text = Parsed(page(run)).text
    assert "rounds width kept why 8 yes – 16 – slow, large" in text
    assert "trace.steps 1, 2" in text and "trace.loss 0.123457" in text and "channels.conv1 8, 4" in text


@pytest.mark.parametrize("stages", [1, 2, 4, 5, 6])
def test_a_part_that_is_missing_is_left_out(run: FinishedRun, stages: int) -> None:
    shorter = dataclasses.replace(run, records=run.records[:stages], results=None, warnings=[])
    found = Parsed(page(shorter))
    sections = {attributes.get("id") for attributes in found.of("section")}
    assert ("coverage" in sections) == (stages >= 5) and "answers" in sections
    assert ("From float to int8" in found.text) == (stages >= 5)
    assert "Warnings" not in found.text and "scored in a clean process" not in found.text


def test_a_run_of_an_earlier_version_has_no_answers_and_maybe_no_curves(run: FinishedRun) -> None:
    for path in [*run.folder.glob("*/predictions.csv"), *run.folder.glob("*/metrics.csv")]:
        path.unlink()
    found = Parsed(page(run))
    assert not {"answers", "training"} & {attributes.get("id") for attributes in found.of("section")}
    assert list(figures(found)) == ["front-bytes", "front-latency"]


def test_candidates_of_a_search_are_points_and_rows(run: FinishedRun) -> None:
    write_front(run.folder, "03-prune", ("small", "slim", "int8", 0.5, 20000, 10, 10, 0.75, 16, 2, "kept", '{"width": 8}'),
                ("untimed", "slim", "float", "", 30000, 10, 10, 0.5, 16, 1, "halved", ""),
                ("lost", "slim", "float", "", "", "", "", "", "", 1, "failed", ""))
    found = Parsed(page(run))
    plots = figures(found)
    traces = {trace["name"]: trace for trace in plots["front-bytes"]["data"]}
    for form, size, accuracy, place in (("int8", 20000, 0.75, 1), ("float", 30000, 0.5, 2)):
        trace = traces[f"{form} candidate"]
        assert (trace["x"], trace["y"]) == ([size], [accuracy])
        assert [target for target, _ in trace["customdata"]] == [f"stage-3-candidate-{place}"]
    assert "settings.width: 8" in traces["int8 candidate"]["customdata"][0][1]
    timed = {trace["name"]: trace for trace in plots["front-latency"]["data"]}
    assert timed["int8 candidate"]["x"] == [0.5] and "float candidate" not in timed
    rows = [attributes["id"] for attributes in found.of("tr") if attributes.get("id")]
    assert rows == [f"stage-3-candidate-{place}" for place in (1, 2, 3)]
    assert "small slim int8 0.5 20,000" in found.text and "lost slim float –" in found.text


def test_the_front_is_what_no_other_model_beats(run: FinishedRun) -> None:
    assert not_beaten([(3, 0.9), (1, 0.5), (2, 0.5), (2, 0.8), (4, 0.85)]) == [(1, 0.5), (2, 0.8), (3, 0.9)]
    assert not_beaten([]) == []
    models = measured_models(run)
    best = max(models, key=lambda model: model.accuracy)
    chance = dataclasses.replace(best, correct=0)
    assert best in in_range([best, chance]) and chance not in in_range([best, chance])


def test_a_report_that_cannot_be_written_loses_nothing(tiny_run: Path, tiny_recipe: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    for name in ("report.html", "results.json"):
        (folder / name).unlink()

    def fail(run: FinishedRun) -> None:
        raise OSError(28, "No space left on device")

    config, shown = resolve(str(tiny_recipe), [f"run_dir={tmp_path}"]), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("compress.pipeline.run.write_page", fail)
        outcome = run_pipeline(config, Console(file=shown, width=300))
    assert outcome.results and (folder / "results.json").is_file() and len(outcome.rows) == len(STAGES)
    warning = outcome.warnings[-1]
    assert "report.html could not be written: [Errno 28]" in warning and warning in shown.getvalue()
    again = run_pipeline(config, Console(file=io.StringIO()))
    assert (folder / "report.html").is_file() and "report" not in "".join(again.warnings)


@pytest.mark.parametrize(("name", "text"), [
    ("06-package/predictions.csv", "image,label,predicted\n0,a,b\n"), ("06-package/predictions.csv", "image\n0\n"),
    ("06-package/predictions.csv", "image,label,predicted\n0,0,99\n"), ("02-distill/metrics.csv", "training,epoch\na,b\n"),
    ("02-distill/metrics.csv", "a,b\n1,2\n"), ("02-distill/metrics.csv", "training,epoch\na,1,2\n")])
def test_a_damaged_file_is_named(run: FinishedRun, name: str, text: str) -> None:
    (run.folder / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: .*; move it away"):
        page(run)


def test_a_text_report_that_fails_does_not_cost_the_page(tiny_run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    (folder / "report.html").unlink()
    (folder / "report.md").unlink()
    (folder / "report.md").mkdir()
    outcome = run_pipeline(resolve(str(tiny_recipe), [f"run_dir={tmp_path}"]), Console(file=io.StringIO()))
    assert "report.md could not be written" in outcome.warnings[-1] and (folder / "report.html").is_file()


def test_epochs_without_a_measurement_and_odd_file_names_are_reported(run: FinishedRun) -> None:
    path = run.folder / "02-distill" / "metrics.csv"
    epochs = read_csv(path)
    write_csv(path, [epochs[0] | {"validation_loss": "", "validation_accuracy": ""}, *epochs[1:]])
    write_report(run.folder, "odd", [record.rows[0] for record in run.records], ["not \udcff.png"], None)
    assert "not \\udcff.png" in (run.folder / "report.md").read_text()
    drawn = {trace["name"]: trace for trace in figures(Parsed(page(run)))["curves-accuracy"]["data"]
             if trace["line"]["dash"] == "solid"}
    assert len(drawn["2 distill: student"]["y"]) == len(epochs) - 1


def test_the_command_repeats_the_run(tiny_run: Path, compress: Compress, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    run = finished_run(folder)
    command = repeating_command(run.config)
    assert command == f"python -m compress run {folder}/recipe.yaml run_dir={tmp_path}"
    assert command in Parsed(page(run)).text
    done = compress(*command.split()[3:])
    assert done.returncode == 0 and done.stdout.count("finished before, skipped") == len(STAGES), done.stderr


@pytest.mark.parametrize(("recipe", "overrides", "command"), [
    ("slim_resnet18_digits", [], "python -m compress run slim_resnet18_digits"),
    ("slim_resnet18_digits", ["prune.ratio=0.5", "name=half", "run_dir=my runs"],
     "python -m compress run slim_resnet18_digits name=half 'run_dir=my runs' prune.ratio=0.5"),
    ("slim_resnet18_digits", ["distill.control=false", "teacher.train.augment="],
     "python -m compress run slim_resnet18_digits 'teacher.train.augment=[]' distill.control=false"),
    ("slim_resnet18_digits", ["teacher.options.stem='[x'"], "python -m compress run runs/slim_resnet18_digits/recipe.yaml"),
    ("slim_resnet18_digits", ["distill.options.a='1e3'"], "python -m compress run runs/slim_resnet18_digits/recipe.yaml"),
], ids=["as it is", "overrides", "empty", "not sayable", "text like a number"])
def test_a_packaged_recipe_is_repeated_by_name(recipe: str, overrides: list[str], command: str, tmp_path: Path) -> None:
    config = resolve(recipe, overrides)
    assert repeating_command(config) == command
    (tmp_path / "recipe.yaml").write_text(as_recipe(config))
    assert resolve(str(tmp_path / "recipe.yaml"), [f"run_dir={config.run_dir}"]) == config


def test_the_page_is_written_whole(run: FinishedRun) -> None:
    write_page(run)
    text = (run.folder / "report.html").read_text()
    assert text.rstrip().endswith("</html>") and text == page(run)
