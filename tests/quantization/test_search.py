"""The search for static int8: what it tries, what it takes, and what it says when nothing is good enough; and the stage."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from architectures.build import build
from architectures.describe import describe
from architectures.zoo import make
from compress.evaluation.onnx_files import read_onnx
from compress.packaging.export import export
from compress.quantization.calibration import RANGES
from compress.quantization.candidates import SLOWER, Wanted
from compress.quantization.search import AS_FAST, Search
from compress.quantization.static import Calibration, StaticSettings, layers_of
from loaders.arrays import ArrayImages, Split
from loaders.images import normalize
from metadata.errors import UserError, VerificationError
from metadata.schemas import Preprocessing
from tests.helpers.commands import Compress, SMALL, assert_one_line_error
from tests.helpers.folders import draw_folder

PLAIN = Preprocessing(resize=None, crop=None, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
ASKED = Wanted(max_drop=0.2, portable=False, budget_seconds=600)
SlowSearch = Callable[..., Search]


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> SlowSearch:
    """Searches on an untrained network whose own float answers are the labels, on the images of which it is least sure."""
    torch.manual_seed(0)
    model = make("slim_resnet18", num_classes=10, width=8, stem="small")
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2048, 3, 16, 16), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        for _ in range(3):
            model.train()(normalize(pixels[:64], PLAIN))
        graph = build(describe(model.eval(), (3, 16, 16)))
        graph.load_state_dict(model.state_dict())
        logits = graph.eval()(normalize(pixels, PLAIN))
    file, _ = export(graph, describe(graph, (3, 16, 16)))
    calibration = Calibration(file, normalize(pixels[:64], PLAIN).numpy())
    first, second = logits.topk(2).values.unbind(1)
    unsure = (first - second).argsort()[:256]
    split = Split(ArrayImages(pixels[unsure]), logits[unsure].argmax(1))

    def search(wanted: Wanted, images: int = 256, backends: tuple[str, ...] = ("onnxruntime",)) -> Search:
        folder = tmp_path_factory.mktemp("search")
        return Search(calibration, split, images, PLAIN, backends, wanted, folder, lambda text: None)  # type: ignore[arg-type]

    return search


def test_the_fastest_of_those_that_keep_the_accuracy(searching: SlowSearch) -> None:
    found = searching(ASKED, backends=("onnxruntime", "openvino")).run()
    assert found.reached and found.float_correct == found.images == 256 and not found.not_tried
    assert {candidate.settings.method for candidate in found.candidates} == set(RANGES)
    assert sum(candidate.reason != SLOWER for candidate in found.candidates) == 10 and found.best in found.candidates
    assert {(row["operators"], row["backend"]) for row in found.times} == {
        (name, backend) for name in ("float", "weighted", "sums", "all") for backend in ("onnxruntime", "openvino")}
    good = [candidate for candidate in found.candidates if candidate.correct >= 0.8 * 256]
    fastest = min(candidate.latency_ms or 0 for candidate in good)
    assert (found.best.latency_ms or 0) <= AS_FAST * fastest
    assert all(candidate.correct <= found.best.correct for candidate in good
               if (candidate.latency_ms or 0) <= AS_FAST * fastest)
    row = found.best.row()
    assert row["accuracy"] == found.best.correct / 256 and row["images"] == 256 and found.float_ms > 0
    assert StaticSettings(**row["settings"]) == found.best.settings


def test_a_runtime_that_computes_something_else_is_not_chosen(searching: SlowSearch) -> None:
    said: list[str] = []
    search = searching(replace(ASKED, budget_seconds=1e-3), backends=("onnxruntime", "openvino"))
    opened, search.say = search._open, said.append  # type: ignore[method-assign]

    def wrong(content: bytes, backend: str) -> Callable[[Tensor], Tensor]:
        answer = opened(content, backend)
        return answer if backend == "onnxruntime" or content == search.floats else lambda image: answer(image).flip(1)

    search._open = wrong  # type: ignore[method-assign]
    found = search.run()
    assert found.backend == "onnxruntime" and sum("rounding noise" in line for line in said) == 3
    assert {(row["operators"], row["backend"]): row["exact"] for row in found.times} == {
        (name, backend): backend == "onnxruntime" or name == "float"
        for name in ("float", "weighted", "sums", "all") for backend in ("onnxruntime", "openvino")}


def test_layers_return_to_float_until_the_accuracy_is_there(searching: SlowSearch, tmp_path: Path) -> None:
    search = searching(replace(ASKED, max_drop=0.01))
    found = search.run()
    names = [node.name for node in layers_of(search.calibration.model)]
    assert found.reached and found.best.correct >= 0.99 * 256 and 0 < len(found.best.kept_float) < len(names)
    assert set(found.sensitivity) == set(names) and min(found.sensitivity.values()) > 0
    order = sorted(names, key=found.sensitivity.__getitem__, reverse=True)
    assert list(found.best.kept_float) == order[:len(found.best.kept_float)]
    (tmp_path / "model.onnx").write_bytes(found.best.content)
    floats = {name for name, int8 in read_onnx(tmp_path / "model.onnx", (3, 16, 16)).layers.items() if not int8}
    assert floats >= set(found.best.kept_float)
    enough = {len(candidate.kept_float): candidate.correct >= 0.99 * 256 for candidate in found.candidates
              if candidate.kept_float and candidate.reason != SLOWER and candidate.settings == found.best.settings}
    # It ends where so many layers are enough and one less is not.
    assert any(good and (count == 1 or enough.get(count - 1) is False) for count, good in enough.items()), enough


def test_layers_that_int8_makes_slower_stay_float_in_one_candidate(searching: SlowSearch, monkeypatch: pytest.MonkeyPatch,
                                                                   ) -> None:
    search = searching(ASKED)
    slow = {"conv1": 1.5, "layer1.0.conv1": 1.01, "layer2.0.downsample.0": 1.5, "layer4.1.conv2": 9.0}
    profiles = iter([dict.fromkeys(search.names, 1.0), {name: slow.get(name, 0.5) for name in search.names}])
    monkeypatch.setattr("compress.quantization.search.layer_times", lambda *_: next(profiles))
    found = search.run()
    one, = (candidate for candidate in found.candidates if candidate.kept_float)
    # Not the one whose times nobody can tell apart, nor the one that would make the file larger.
    assert set(one.kept_float) == {"conv1", "layer2.0.downsample.0"} and one.reason == SLOWER
    assert one.name.endswith("2 layers float for speed") and one.row()["kept_float_reason"] == "faster in float"
    assert one.int8_ms == {"conv1": 1.5, "layer2.0.downsample.0": 1.5}
    plain = next(candidate for candidate in found.candidates if candidate.settings == one.settings)
    assert one.latency_ms and len(one.content) < 1.05 * len(plain.content)
    path = search.folder / "it.onnx"
    path.write_bytes(one.content)
    assert {name for name, int8 in read_onnx(path, (3, 16, 16)).layers.items() if not int8} >= set(one.kept_float)


def test_when_time_is_out_the_best_so_far_is_there_and_the_rest_is_named(searching: SlowSearch) -> None:
    found = searching(replace(ASKED, max_drop=0.0, budget_seconds=1e-3)).run()
    assert not found.reached and len(found.candidates) == 1 and found.best is found.candidates[0]
    assert len(found.not_tried) == 9 and "U8S8, entropy" in " ".join(found.not_tried) and found.sensitivity == {}
    assert found.best.content and found.best.latency_ms


def test_when_time_is_out_what_is_as_asked_is_taken(searching: SlowSearch) -> None:
    found = searching(replace(ASKED, portable=True, max_drop=0.3, budget_seconds=1e-3)).run()
    assert len(found.candidates) == 1 and found.best.portability is not None
    assert found.reached == found.best.portability["holds"] and found.reached


def test_a_candidate_that_fails_is_named_and_the_search_goes_on(searching: SlowSearch,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    search, kept = searching(ASKED), list[list[str]]()
    search.keep = lambda candidates: kept.append([candidate.name for candidate in candidates])
    measure = Search._measure

    def failing(self: Search, content: bytes) -> int:
        if len(self.candidates) == 1 and not self.failed:
            raise VerificationError("no kernel")
        return measure(self, content)

    monkeypatch.setattr(Search, "_measure", failing)
    found = search.run()
    assert found.reached and list(found.failed.values()) == ["no kernel"]
    assert not set(found.failed) & {candidate.name for candidate in found.candidates}
    assert [len(names) for names in kept] == list(range(1, len(found.candidates) + 1))

    def broken(self: Search, content: bytes) -> int:
        if content != self.floats:
            raise VerificationError("no kernel at all")
        return measure(self, content)

    monkeypatch.setattr(Search, "_measure", broken)
    with pytest.raises(VerificationError, match=r"no candidate can be built and run: U8S8.*no kernel at all"):
        searching(ASKED).run()


def test_a_runtime_whose_float_answers_are_others_is_left_out(searching: SlowSearch,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Search._open

    def other(self: Search, content: bytes, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
        answer = opened(self, content, backend)
        return (lambda images: 1.1 * answer(images)) if backend == "openvino" else answer

    monkeypatch.setattr(Search, "_open", other)
    assert searching(ASKED, backends=("openvino", "onnxruntime")).run().backend == "onnxruntime"
    with pytest.raises(VerificationError, match="logits differ"):
        searching(ASKED, backends=("openvino",)).run()


def test_what_saturation_and_int8_lose_together_must_be_tolerated(searching: SlowSearch,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    search = searching(replace(ASKED, portable=True))
    monkeypatch.setattr("compress.quantization.search.verify_portability", lambda *_: {
        "holds": True, "verdict": "holds", "accuracy": 0.9, "accuracy_saturating": 0.71})
    found = search.run()
    assert not found.reached and found.best.portability is not None
    assert "with what int8 loses anyway" in found.best.portability["verdict"]


def test_a_search_on_openvino_alone(searching: SlowSearch) -> None:
    found = searching(ASKED, backends=("openvino",)).run()
    assert found.reached and found.backend == "openvino" and found.best.correct >= 0.8 * 256


def test_a_runtime_that_is_not_there_is_left_out(searching: SlowSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # as where it is not installed
    found = searching(ASKED, images=64, backends=("openvino", "onnxruntime")).run()
    assert found.reached and found.backend == "onnxruntime" and found.images == 64
    with pytest.raises(UserError, match="the package is not installed"):
        searching(ASKED, backends=("openvino",)).run()


def test_a_candidate_must_hold_without_vnni_if_that_is_asked(searching: SlowSearch) -> None:
    found = searching(replace(ASKED, max_drop=0.25, portable=True)).run()
    assert found.reached and found.best.portability is not None and found.best.portability["holds"]
    assert all(candidate.portability is None or "verdict" in candidate.portability for candidate in found.candidates)


def test_excluded_layers(searching: SlowSearch, tmp_path: Path) -> None:
    found = searching(replace(ASKED, max_drop=1.0, exclude=("conv1",))).run()
    for candidate in found.candidates:
        (tmp_path / "model.onnx").write_bytes(candidate.content)
        layers = read_onnx(tmp_path / "model.onnx", (3, 16, 16)).layers
        assert not layers["conv1"] and "conv1" not in candidate.kept_float
        assert sum(layers.values()) >= len(layers) - 2 - len(candidate.kept_float)
    with pytest.raises(UserError, match=r"quantize_static\.exclude: 'conv9' is no Conv2d or Linear layer"):
        searching(replace(ASKED, exclude=("conv9",)))


# -------------------------------------------------------------------------------------------------------- the stage

QUICK = [*SMALL, "quantize_static.max_drop=0.05"]


@pytest.fixture(scope="module")
def static_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.commands import run_compress
    runs = tmp_path_factory.mktemp("static")
    done = run_compress("run", "slim_resnet18_digits_static", f"run_dir={runs}", "name=mine", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    for part in ("candidate right ms kB without VNNI", "SQNR dB", "chosen: ", "without VNNI: ", "evaluate (test)"):
        assert part in text, text
    return runs / "mine"


def test_a_static_run_packages_what_was_measured(static_run: Path) -> None:
    record = json.loads((static_run / "06-quantize_static" / "stage.json").read_text())
    rows, candidates = record["notes"]["coverage"], record["notes"]["candidates"]
    assert len(candidates) >= 10 and sum(row["chosen"] for row in candidates) == 1
    assert all(row["sqnr_db"] > 10 and row["dtype"] in ("int8", "float32") for row in rows)
    metadata = json.loads((static_run / "submission" / "model_metadata.json").read_text())
    assert metadata["quantization"]["scheme"] == "static_int8" and metadata["model_format"] == "onnx"
    assert metadata["quantization"]["layers"] == {row["layer"]: f"{row['dtype']}: {row['reason']}" for row in rows}
    assert metadata["portability"]["verdict"].startswith("holds") and metadata["runtime"] in ("onnxruntime", "openvino")
    assert metadata["compression_steps"][-2:] == ["onnx_export", "static_quantization"]
    card = (static_run / "submission" / "README.md").read_text()
    assert f"| runtime | {metadata['runtime']} |" in card and "on CPUs without VNNI | holds" in card
    with (static_run / "ledger.csv").open() as file:
        ledger = {row["stage"]: row for row in csv.DictReader(file)}
    assert int(ledger["quantize_static"]["size_bytes"]) < 0.45 * int(ledger["export"]["size_bytes"])
    results = json.loads((static_run / "results.json").read_text())
    assert results["details"]["backend"] == metadata["runtime"]
    evaluated = json.loads((static_run / "08-evaluate" / "stage.json").read_text())
    assert evaluated["notes"]["in_memory"]["correct"] == results["details"]["accuracy"]["correct"]


def test_a_static_run_that_is_finished_is_not_searched_again(static_run: Path, compress: Compress) -> None:
    done = compress("run", "slim_resnet18_digits_static", f"run_dir={static_run.parent}", "name=mine", *QUICK)
    assert done.returncode == 0 and "quantize_static: finished before, skipped" in done.stdout


def test_what_cannot_be_reached_is_one_line_and_the_best_is_kept(static_run: Path, compress: Compress) -> None:
    again = ["run", "slim_resnet18_digits_static", f"run_dir={static_run.parent}", "name=mine", "--update",
             *QUICK[:-1]]
    # No budget for more than the first candidate, and too few validation images to show that it holds to so little.
    done = compress(*again, "quantize_static.max_drop=0", "quantize_static.budget_seconds=0.001")
    folder = static_run / "06-quantize_static"
    assert len(json.loads((folder / "candidates.json").read_text())["candidates"]) == 1
    assert_one_line_error(done, "no candidate is as asked; the best one, U8S8", "best_candidate.onnx", "max_drop", code=1)
    assert (folder / "best_candidate.onnx").is_file() and not (folder / "stage.json").exists()


@pytest.mark.parametrize(("change", "parts"), [
    ("quantize_static.exclude=[conv9]", ("quantize_static.exclude: 'conv9' is no Conv2d or Linear layer",)),
    ("quantize_static.max_drop=2", ("max_drop", "less than 1")),
    ("quantize_static.bachend=openvino", ("bachend", "backend")),
    ("quantize_static.backend=tensorrt", ("backend", "onnxruntime"))])
def test_mistakes_in_the_stages_settings(static_run: Path, compress: Compress, change: str, parts: tuple[str, ...]) -> None:
    done = compress("run", "slim_resnet18_digits_static", f"run_dir={static_run.parent}", "name=mine", "--update",
                    *QUICK, change)
    assert_one_line_error(done, *parts)


def test_training_images_are_cropped_before_they_calibrate(compress: Compress, tmp_path: Path) -> None:
    """Files are read larger than the network sees them, so that training can shift its window."""
    images = draw_folder(tmp_path / "images", 4, 12, size=24)
    training = "options: {width: 8, stem: small}, train: {epochs: 1, batch_size: 16, augment: [crop]}"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"""data: {{name: image_folder, root: {images}, resize: 20, crop: 16, validation_fraction: 0.25}}
stages:
  - teacher: {{model: slim_resnet18, floor: 0, {training}}}
  - distill: {{model: slim_resnet18, {training}}}
  - finetune: {{quantization_aware: true, train: {{epochs: 1, batch_size: 16}}}}
  - export
  - quantize_static: {{max_drop: 0.9, portable: false, budget_seconds: 0.001}}
  - package
""")
    done = compress("run", recipe, f"run_dir={tmp_path}", "name=cropped", "threads=1")
    assert done.returncode == 0, done.stdout + done.stderr
    notes = json.loads((tmp_path / "cropped" / "05-quantize_static" / "stage.json").read_text())["notes"]
    assert notes["not_tried"] and notes["candidates"][0]["images"] == 12
    again = recipe.read_text().replace("  - package", "  - quantize_static\n  - package")
    recipe.write_text(again)
    assert_one_line_error(compress("plan", recipe, f"run_dir={tmp_path}"), "quantize_static: the model is int8 already")
