"""The search for static int8: what it tries, what it takes, and what it says when nothing is good enough."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from architectures.build import build
from architectures.describe import describe
from architectures.onnx_files import read_onnx
from compress.packaging.export import export
from compress.quantization.calibration import RANGES
from compress.quantization.candidates import SENSITIVE, SLOWER, SearchRequest
from compress.quantization.saturation import Backend
from compress.quantization.search import AS_FAST, Search
from compress.quantization.static import Calibration, Int8Network, StaticSettings, layers_of
from compress.quantization.weights import WEIGHT_FORMS, WeightForm
from compress.quantization.workbench import OnnxWorkbench
from loaders.arrays import ArrayImages
from loaders.images import normalize
from loaders.splits import Split
from metadata.errors import UserError, VerificationError
from metadata.schemas import Preprocessing

ASKED = SearchRequest(max_drop=0.2, portable=False, budget_seconds=600)
BOTH: tuple[Backend, ...] = ("onnxruntime", "openvino")


def silent(text: str) -> None:
    """Say nothing."""


# ------------------------------------------------------------------------------------------------- on a fake workbench


class Answering:
    """What a fake workbench has loaded: a file by its name, on a runtime."""

    def __init__(self, name: str, backend: str) -> None:
        self.name, self.backend = name, backend


class TableWorkbench:
    """Answers from tables, keyed by the settings in words and the layers that stay float; its clock moves by hand.

    Attributes:
        weights: the number of weights of each layer.
        correct: right answers of a candidate by part of its name; 250 for others, and 256 for the float network.
        milliseconds: latency of a file by (part of its name, runtime); 1.0 for others.
        noise: distance of a file's logits from the float ones by (part of its name, runtime); 0.01 for others.
        profiles: milliseconds of each layer as float and as int8.
        sensitivities: of each layer.
        verdicts: what the portability check finds, by part of a candidate's name; it holds for others.
        seconds: what quantizing a network takes.
    """

    images, calibration_images = 256, 64

    def __init__(self) -> None:
        self.float_content = b"float"
        self.weights = {"conv1": 10, "conv2": 500, "conv3": 1000, "conv4": 1000, "fc": 20}
        self.correct: dict[str, Any] = {}
        self.milliseconds: dict[tuple[str, str], float] = {("FLOAT", "onnxruntime"): 2.0, ("FLOAT", "openvino"): 2.0}
        self.noise: dict[tuple[str, str], float] = {("FLOAT", "onnxruntime"): 0.0, ("FLOAT", "openvino"): 0.0}
        self.profiles = dict.fromkeys(self.weights, 1.0), dict.fromkeys(self.weights, 0.5)
        self.sensitivities = {"conv1": 0.5, "conv2": 0.1, "conv3": 0.4, "conv4": 0.3, "fc": 0.2}
        self.verdicts: dict[str, dict[str, Any]] = {}
        self.missing: set[str] = set()
        self.seconds, self.time = 0.0, 0.0
        self.verified: list[str] = []

    def _lookup(self, table: dict[Any, Any], name: str, backend: str | None, default: Any) -> Any:
        return next((value for key, value in table.items() if (key if backend is None else key[0]) in name
                     and (backend is None or key[1] == backend)), default)

    def now(self) -> float:
        return self.time

    def quantize(self, settings: StaticSettings, kept_float: Collection[str] = ()) -> Int8Network:
        self.time += self.seconds
        name = f"{settings}; kept: {', '.join(sorted(kept_float))}"
        return Int8Network(onnx.ModelProto(doc_string=name), {}, onnx.ModelProto())

    def open(self, content: bytes, backend: Backend) -> Any:
        if backend in self.missing:
            raise UserError(f"backend {backend}: the package is not installed")
        name = "FLOAT" if content == self.float_content else onnx.ModelProto.FromString(content).doc_string
        return Answering(name, backend)

    def probe(self, answer: Any) -> Tensor:
        return torch.ones(8, 10) + self._lookup(self.noise, answer.name, answer.backend, 0.01)

    def reference(self, network: Int8Network | None = None) -> Tensor:
        return self.probe(Answering("FLOAT" if network is None else network.model.doc_string, "onnxruntime"))

    def count_correct(self, answer: Any) -> int:
        if answer.name == "FLOAT":
            return self.images
        correct = self._lookup(self.correct, answer.name, None, 250)
        if isinstance(correct, Exception):
            raise correct
        return int(correct(answer.name) if callable(correct) else correct)

    def latencies(self, answers: Sequence[Any]) -> list[float]:
        return [self._lookup(self.milliseconds, answer.name, answer.backend, 1.0) for answer in answers]

    def layer_times(self, network: Int8Network | None, backend: Backend) -> dict[str, float]:
        return self.profiles[network is not None]

    def sensitivity(self, settings: StaticSettings, layer: str) -> float:
        return self.sensitivities[layer]

    def portability(self, content: bytes, backend: Backend, tolerated_drop: float) -> dict[str, Any]:
        name = onnx.ModelProto.FromString(content).doc_string
        self.verified.append(name)
        return dict(self._lookup(self.verdicts, name, None, {"holds": True, "verdict": "holds"}))


def search(bench: Any, request: SearchRequest = ASKED, backends: Sequence[Backend] = ("onnxruntime",),
           say: Callable[[str], None] = silent, **options: Any) -> Search:
    return Search(bench, request, backends, say, **options)


def floats_in(name: str) -> set[str]:
    return set(name.partition("kept: ")[2].split(", ")) - {""}


def test_the_fastest_of_those_that_keep_the_accuracy() -> None:
    bench = TableWorkbench()
    bench.correct = {"7-bit": 256, "entropy": 100, "biases as trained": 254}
    bench.milliseconds |= {("7-bit", "onnxruntime"): 1.5, ("entropy", "onnxruntime"): 0.2,
                           ("S8S8", "onnxruntime"): 0.99 / AS_FAST}
    found = search(bench).run()
    assert found.reached and found.float_correct == found.images == 256 and not found.not_tried and found.float_ms == 2.0
    assert {candidate.settings.method for candidate in found.candidates} == set(RANGES)
    assert len(found.candidates) == 11 and found.best in found.candidates and found.sensitivity == {}
    # The most accurate one is slow, the fastest one inaccurate; the next fastest, with signed activations, is taken.
    assert found.best.settings == StaticSettings(operators="weighted", activations="int8")
    bench.milliseconds["S8S8", "onnxruntime"] = 1.01 / AS_FAST  # no faster than can be told: accuracy decides
    assert search(bench).run().best.settings == StaticSettings(operators="weighted", correct=False)
    row = found.best.row()
    assert row["accuracy"] == 250 / 256 and row["images"] == 256
    assert StaticSettings(**row["settings"]) == found.best.settings


def test_the_base_of_the_variants_is_the_most_accurate_calibration() -> None:
    bench = TableWorkbench()
    bench.correct = {"mse": 255}
    found = search(bench).run()
    variants = [candidate.settings for candidate in found.candidates if candidate.settings.weights != "pair"
                or candidate.settings.equalise or candidate.settings.float_ends or candidate.settings.images]
    assert len(variants) == 5 and {settings.method for settings in variants} == {"mse"}
    assert next(settings.images for settings in variants if settings.images) == 8  # an eighth of the calibration images


def test_the_fastest_operators_and_runtime_are_chosen_and_of_equals_the_first() -> None:
    bench = TableWorkbench()
    bench.milliseconds |= {("all", "openvino"): 0.5, ("sums", "openvino"): 0.5 * AS_FAST}
    found = search(bench, backends=BOTH).run()
    assert found.backend == "openvino" and {candidate.settings.operators for candidate in found.candidates} == {"sums"}
    assert {(row["operators"], row["backend"]): row["latency_ms"] for row in found.latencies} == {
        **{(name, backend): 1.0 for name in ("weighted", "sums", "all") for backend in BOTH},
        ("float", "onnxruntime"): 2.0, ("float", "openvino"): 2.0, ("all", "openvino"): 0.5,
        ("sums", "openvino"): 0.5 * AS_FAST}


def test_a_runtime_that_computes_something_else_is_not_chosen() -> None:
    bench, said = TableWorkbench(), list[str]()
    bench.milliseconds["U8S8", "openvino"] = 0.1
    bench.noise["U8S8", "openvino"] = 0.021  # 4.41 times the power of ONNX Runtime's
    found = search(bench, backends=BOTH, say=said.append).run()
    assert found.backend == "onnxruntime" and sum("4 times ONNX Runtime's rounding noise" in line for line in said) == 3
    assert {(row["operators"], row["backend"]): row["exact"] for row in found.latencies} == {
        (name, backend): backend == "onnxruntime" or name == "float"
        for name in ("float", "weighted", "sums", "all") for backend in BOTH}
    bench.noise["U8S8", "openvino"] = 0.019
    assert search(bench, backends=BOTH).run().backend == "openvino"
    bench.noise["U8S8", "openvino"] = 1.0  # the only runtime: there is nothing better
    assert search(bench, backends=("openvino",)).run().backend == "openvino"


def test_layers_return_to_float_until_the_accuracy_is_there() -> None:
    bench = TableWorkbench()
    bench.correct = {"U8S8": lambda name: 255 if floats_in(name) >= {"conv1", "conv3", "conv4"} else 240,
                     "S8S8": 200}
    found = search(bench, replace(ASKED, max_drop=0.01)).run()
    assert found.reached and found.best.kept_float == ("conv1", "conv3", "conv4")  # by falling sensitivity
    assert found.sensitivity == bench.sensitivities and found.best.name.endswith("3 layers float again")
    counts = [len(candidate.kept_float) for candidate in found.candidates if candidate.kept_float]
    assert counts == [1, 2, 4, 3]  # doubled until it is enough, then bisected
    bench.correct = {"8": 200}
    found = search(bench, replace(ASKED, max_drop=0.01)).run()
    assert not found.reached and max(len(candidate.kept_float) for candidate in found.candidates) == 4  # one stays int8
    assert found.best.correct == 200


def test_layers_that_int8_makes_slower_stay_float_in_one_candidate() -> None:
    bench = TableWorkbench()
    bench.profiles[1].update({"conv1": 1.5, "fc": 1.02, "conv2": 9.0, "conv3": 9.0})
    found = search(bench).run()
    one, = (candidate for candidate in found.candidates if candidate.kept_float)
    # Neither the layer whose times nobody can tell apart, nor those that would make the file larger.
    assert one.kept_float == ("conv1",) and one.reason == SLOWER and one.int8_ms == {"conv1": 1.5}
    assert one.name.endswith("1 layer float for speed") and one.row()["kept_float_reason"] == "faster in float"
    bench.profiles[1]["fc"] = 1.5
    found = search(bench, replace(ASKED, exclude=("conv1",))).run()
    assert [candidate.kept_float for candidate in found.candidates if candidate.kept_float] == [("fc",)]


def test_when_time_is_out_the_best_so_far_is_there_and_the_rest_is_named() -> None:
    bench = TableWorkbench()
    bench.seconds = 10  # three networks for the operators, then one a candidate
    found = search(bench, replace(ASKED, max_drop=0.0, budget_seconds=55)).run()
    assert not found.reached and [candidate.settings.method for candidate in found.candidates] == ["min-max", "percentile",
                                                                                                   "mse"]
    assert found.best is found.candidates[0] and found.best.content and found.best.latency_ms == 1.0
    assert len(found.not_tried) == 8 and "U8S8, entropy" in found.not_tried[0] and found.sensitivity == {}
    assert found.best.portability and found.candidates[1].portability is None  # the best is verified in any case


def test_when_time_is_out_what_is_as_requested_is_taken() -> None:
    bench = TableWorkbench()
    bench.seconds = 10
    for holds in (True, False):
        bench.verdicts = {"U8S8": {"holds": holds, "verdict": "a verdict"}}
        found = search(bench, replace(ASKED, portable=True, budget_seconds=1)).run()
        assert len(found.candidates) == 1 and found.reached == holds
        assert found.best.portability == {"holds": holds, "verdict": "a verdict"}


def test_a_candidate_that_fails_is_named_and_the_search_goes_on() -> None:
    bench, kept = TableWorkbench(), list[list[str]]()
    bench.correct = {"percentile": VerificationError("no kernel"), "mse": 255}
    found = search(bench, keep=lambda candidates: kept.append([candidate.name for candidate in candidates])).run()
    assert found.reached and found.failed == {"U8S8, percentile, weighted": "no kernel"}
    assert not set(found.failed) & {candidate.name for candidate in found.candidates}
    assert [len(names) for names in kept] == list(range(1, len(found.candidates) + 1)) and "mse" in kept[-1][0]
    bench.correct = {"8": RuntimeError("no kernel at all\nand more")}
    with pytest.raises(VerificationError, match=r"no candidate can be built and run: U8S8.*no kernel at all"):
        search(bench).run()


def test_a_runtime_whose_float_answers_are_others_is_left_out() -> None:
    bench, said = TableWorkbench(), list[str]()
    bench.noise["FLOAT", "openvino"] = 0.1
    bench.milliseconds["U8S8", "openvino"] = 0.1
    assert search(bench, backends=("openvino", "onnxruntime"), say=said.append).run().backend == "onnxruntime"
    assert "openvino is left out" in said[0]
    with pytest.raises(VerificationError, match="logits differ"):
        search(bench, backends=("openvino",)).run()


def test_a_runtime_that_is_not_installed_is_left_out() -> None:
    bench = TableWorkbench()
    bench.missing = {"openvino"}
    found = search(bench, backends=("openvino", "onnxruntime")).run()
    assert found.reached and found.backend == "onnxruntime"
    with pytest.raises(UserError, match="the package is not installed"):
        search(bench, backends=("openvino",)).run()


def test_what_saturation_and_int8_lose_together_must_be_tolerated() -> None:
    bench = TableWorkbench()
    bench.correct = {"8": 230}  # 10.2 % lost by int8, and 11 % by saturation, of 20 %
    bench.verdicts = {"8": {"holds": True, "verdict": "holds", "accuracy": 0.9, "accuracy_saturating": 0.79}}
    found = search(bench, replace(ASKED, portable=True)).run()
    assert not found.reached and found.best.portability is not None
    assert "int8 and saturation together lose 21.16%" in found.best.portability["verdict"]
    assert search(bench, replace(ASKED, portable=True, max_drop=0.22)).run().reached


def test_a_candidate_must_hold_without_vnni_if_that_is_requested() -> None:
    bench = TableWorkbench()
    bench.verdicts = {"7-bit": {"holds": True, "verdict": "holds"}, "8": {"holds": False, "verdict": "does not hold"}}
    bench.milliseconds["7-bit", "onnxruntime"] = 1.9
    found = search(bench, replace(ASKED, portable=True)).run()
    assert found.reached and found.best.settings.weights == "7-bit" and "7-bit" in bench.verified[-1]
    assert search(bench).run().best.settings.weights == "pair"
    bench.correct = {"7-bit": 100}  # none is as requested: the best that holds everywhere
    found = search(bench, replace(ASKED, portable=True)).run()
    assert not found.reached and found.best.settings.weights == "7-bit"


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_a_form_of_weights_that_is_asked_for_is_that_of_every_candidate(form: WeightForm) -> None:
    found = search(TableWorkbench(), replace(ASKED, weights=form)).run()
    assert len(found.candidates) == 9 and {candidate.settings.weights for candidate in found.candidates} == {form}


def test_excluded_layers_stay_float_in_every_candidate() -> None:
    bench = TableWorkbench()
    bench.correct = {"8": 200}
    found = search(bench, replace(ASKED, exclude=("conv1",))).run()
    assert all("conv1" in floats_in(candidate.quantized.model.doc_string) and "conv1" not in candidate.kept_float
               for candidate in found.candidates)
    assert "conv1" not in found.sensitivity
    with pytest.raises(UserError, match=r"quantize_static\.exclude: 'conv9' is no Conv2d or Linear layer"):
        search(bench, replace(ASKED, exclude=("conv9",)))


# -------------------------------------------------------------------------------------------------- on real runtimes


class Residual(nn.Module):
    """Four layers with weights, a sum and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return self.head(torch.relu(self.second(self.first(x)) + x))


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> OnnxWorkbench:
    """An untrained network whose own float answers are the labels, on the images of which it is least sure."""
    plain = Preprocessing(resize=None, crop=None, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    torch.manual_seed(0)
    model = Residual()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (16384, 3, 12, 12), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        for _ in range(3):
            model.train()(normalize(pixels[:64], plain))
        graph = build(describe(model.eval(), (3, 12, 12)))
        graph.load_state_dict(model.state_dict())
        logits = torch.cat([graph.eval()(normalize(part, plain)) for part in pixels.split(512)])
    file, _ = export(graph, describe(graph, (3, 12, 12)))
    first, second = logits.topk(2).values.unbind(1)
    unsure = (first - second).argsort()[:192]
    split = Split(ArrayImages(pixels[unsure]), logits[unsure].argmax(1))
    return OnnxWorkbench(Calibration(file, normalize(pixels[:32], plain).numpy()), split, 192, plain,
                         folder=tmp_path_factory.mktemp("search"))


def test_a_search_on_both_runtimes(workbench: OnnxWorkbench, tmp_path: Path) -> None:
    """No answer may change, so layers return to float."""
    found = search(workbench, replace(ASKED, max_drop=0.0), BOTH).run()
    names = [node.name for node in layers_of(workbench.calibration.model)]
    assert found.float_correct == found.images == 192 and not found.not_tried and not found.failed
    assert len(found.latencies) == 8 and len(found.candidates) > 10 and found.float_ms > 0
    assert found.sensitivity and set(found.sensitivity) <= set(names) and min(found.sensitivity.values()) > 0
    assert found.best.portability is not None and "verdict" in found.best.portability
    returned = [candidate for candidate in found.candidates if candidate.kept_float and candidate.reason == SENSITIVE][-1]
    assert returned.kept_float[0] == max(found.sensitivity, key=found.sensitivity.__getitem__)
    (tmp_path / "model.onnx").write_bytes(returned.content)
    layers = read_onnx(tmp_path / "model.onnx", (3, 12, 12)).layers
    assert {name for name, int8 in layers.items() if not int8} == {
        *returned.kept_float, *returned.settings.ends(names)} < set(names)


def test_a_search_on_openvino_alone(workbench: OnnxWorkbench, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(ASKED, max_drop=0.3, exclude=("stem.0",), budget_seconds=1e-3)
    found = search(workbench, request, ("openvino",)).run()
    assert found.reached and found.backend == "openvino" and len(found.candidates) == 1
    layers = {node.name for node in layers_of(found.best.quantized.network)}
    assert "stem.0" in layers and found.best.latency_ms and found.best.correct >= 0.7 * 192
    monkeypatch.setitem(sys.modules, "openvino", None)  # as where it is not installed
    with pytest.raises(UserError, match="the package is not installed"):
        search(workbench, request, ("openvino",)).run()
