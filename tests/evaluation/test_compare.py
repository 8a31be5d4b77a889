"""Statistics that decide: percentiles, intervals, paired verdicts, and the calls that they rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from compress.evaluation.channel import Clock
from compress.evaluation.compare import SAME, confirmed, latency_ratio_interval, mcnemar, verdicts
from compress.evaluation.pictures import decode_pictures
from compress.evaluation.runtime import Runtime
from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.score import PERCENTILES, accuracy_details, latency_details, wilson
from compress.evaluation.serve import Answers, repeats_ratio, same_answer, serve
from metadata.errors import VerificationError
from metadata.schemas import Preprocessing
from tests.helpers.verdicts import Evaluate, assert_refused

# ------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (8695, 10000), (3, 359), (1, 2)])
def test_wilson_interval_is_scipys(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(method="wilson")
    assert wilson(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("runs", "given"), [(10, set()), (63, set()), (64, {"p90_ms"}), (129, {"p90_ms"}),
                                             (130, {"p5_ms", "p90_ms", "p95_ms"}), (661, {"p5_ms", "p90_ms", "p95_ms"}),
                                             (662, {"p5_ms", "p90_ms", "p95_ms", "p99_ms"})])
def test_percentiles_need_their_runs(runs: int, given: set[str]) -> None:
    details = latency_details(list(range(runs)), EvaluationSettings())
    keys = set(PERCENTILES)
    assert {key for key in keys if details[key] is not None} == given
    assert set(details["not_given"]) == keys - given and details["runs"] == runs
    assert all(f"got {runs}" in reason for reason in details["not_given"].values())
    assert details["median_ms"] == (runs - 1) / 2


def test_accuracy_details_by_hand() -> None:
    logits = np.zeros((5, 6), np.float32)
    logits[0, 0] = logits[1, 1] = logits[2, 0] = logits[3, 2] = logits[4, 0] = 1
    logits[4, 1] = 0.5
    details = accuracy_details(logits, np.array([0, 1, 1, 2, 1]), list("abcdef"), 1)
    assert (details["correct"], details["total"], details["fraction"]) == (3, 5, 0.6)
    # The label's logit of image 2 ties with four others behind the first, so it need not be among the top 5; image 4's is.
    assert details["top5_fraction"] == 0.8
    assert details["per_class"]["b"] == {"correct": 1, "total": 3} and details["per_class"]["a"]["correct"] == 1
    only = accuracy_details(logits[:, :3], np.array([0, 1, 1, 2, 1]), list("abc"), 1)
    assert only["worst_class"] == {"name": "b", "correct": 1, "total": 3} and only["top5_fraction"] is None


def test_mcnemar_by_hand() -> None:
    first, second = np.zeros(100, bool), np.zeros(100, bool)
    first[:10], second[10:12] = True, True
    first[50:], second[50:] = True, True
    only_first, only_second, p_value = mcnemar(first, second)
    assert (only_first, only_second) == (10, 2) and p_value == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar(first, first) == (0, 0, 1.0)


@pytest.mark.parametrize("draws", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_latency_interval_covers_the_true_ratio(draws: int) -> None:
    """Drifting, skewed times with a true ratio of 0.9: the 95 % interval holds it about that often."""
    held = 0
    for draw in range(draws):
        generator = np.random.default_rng(draw)
        drift = np.exp(0.1 * np.sin(np.linspace(0, 20, 400)))
        times = [scale * drift * np.exp(0.1 * generator.standard_normal(400)) for scale in (0.9, 1.0)]
        _, low, high = latency_ratio_interval(*times)
        held += low <= 0.9 <= high
    assert 0.88 * draws <= held <= 0.995 * draws


# ------------------------------------------------------------------------------------------------------ interleaved


class Scripted(Runtime):
    """Answers by what the image looks like, and does as it is told."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__("torch", {}, None)
        self.asked: list[bytes] = []
        self.classes = classes

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.asked += [image.tobytes() for image in images]
        return np.stack([np.arange(self.classes) * image.mean() for image in images]).astype(np.float32)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    from PIL import Image
    paths = []
    for index in range(40):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(np.full((4, 4, 3), index * 5, np.uint8)).save(paths[-1])
    return paths


PLAIN = Preprocessing(resize=None, crop=None, mean=[0, 0, 0], std=[1, 1, 1])


def ask(runtime: Runtime, pictures: list[Path], **settings: Any) -> Answers:
    given = EvaluationSettings(**settings)
    decoded = decode_pictures(pictures, PLAIN, (3, 4, 4), True, Clock(60))
    return serve([runtime], [decoded], [3], given, [Clock(given.time_limit_s)])[0]


def test_every_image_is_asked_in_another_order_each_time(pictures: list[Path]) -> None:
    one, two = Scripted(), Scripted()
    answers = ask(one, pictures, runs=20, warmup=0)
    ask(two, pictures, runs=20, warmup=0)
    assert len(set(one.asked)) == 40 and len(one.asked) == 80  # each once, and each of 40 draws again
    assert one.asked != two.asked
    assert (answers.first_ms > 0).all() and len(answers.again) == 40
    assert np.allclose(answers.logits[:, 1], [index * 5 / 255 for index in range(40)])  # in the images' order
    few = Scripted()
    assert len(ask(few, pictures[:5], runs=50, warmup=3).again) == 45 and len(few.asked) == 53


def test_answers_that_change_or_do_not_fit_are_refused(pictures: list[Path]) -> None:
    class Moody(Scripted):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            return super().__call__(images) + len(self.asked)
    with pytest.raises(VerificationError, match="another answer when asked again"):
        ask(Moody(), pictures)
    with pytest.raises(VerificationError, match=r"is \[1, 4\], expected finite logits \[1, 3\]"):
        ask(Scripted(4), pictures)


def test_answers_may_differ_by_rounding_and_not_by_class() -> None:
    one = np.array([-1e6, 1.0, 2.0], np.float32)
    assert same_answer(one, one + np.float32(1e-5)) and not same_answer(one, one[[0, 2, 1]])
    tie = np.array([1.0, 1.0000001, 0.0], np.float32)
    assert same_answer(tie, tie[[1, 0, 2]])
    assert same_answer(one + np.float32(1e4), one + np.float32(1e4 + 1e-3))
    plain = np.array([0.0, 3.0, 5.0], np.float32)
    assert not same_answer(plain + 1e5, plain[[0, 2, 1]] + 1e5)  # an offset hides no change
    assert not same_answer(plain + 1e5, plain + 1e5 + np.float32([1, 0, 0]))


def test_warm_up_shows_no_test_image(pictures: list[Path]) -> None:
    runtime = Scripted()
    ask(runtime, pictures, runs=20, warmup=10)
    assert len(set(runtime.asked[:10]) | set(runtime.asked[10:])) == 10 + 40


def test_time_limit_holds_for_models_in_this_process_too(pictures: list[Path]) -> None:
    class Slow(Scripted):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            import time
            time.sleep(0.02)
            return super().__call__(images)
    with pytest.raises(VerificationError, match=r"within --time_limit_s 0\.1"):
        ask(Slow(), pictures, time_limit_s=0.1)


def test_a_cache_gives_itself_away(pictures: list[Path]) -> None:
    class Cached(Scripted):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            import time
            if images.tobytes() not in self.asked:
                time.sleep(0.01)
            return super().__call__(images)
    ratio = repeats_ratio(ask(Cached(), pictures, warmup=0))
    assert ratio is not None and ratio < 0.5
    assert repeats_ratio(ask(Scripted(), pictures[:3], runs=4, warmup=0)) is None  # too few to tell


def result_of(size: float) -> dict[str, Any]:
    return {"model_size": size, "details": {"machine": {}, "status": "ok"}}


def answers_of(right: np.ndarray, times: np.ndarray) -> Answers:
    logits = np.eye(2, dtype=np.float32)[right.astype(int)]
    return Answers(logits=logits, first_ms=times, order=np.arange(len(right)))


def test_verdicts_on_planted_differences() -> None:
    generator = np.random.default_rng(0)
    labels = np.ones(400, np.int64)
    base = generator.random(400) < 0.8
    better = base | (generator.random(400) < 0.3)
    times = np.exp(0.1 * generator.standard_normal(400))
    again = np.exp(0.1 * generator.standard_normal(400))
    judged = verdicts([result_of(1), result_of(2)], [answers_of(better, 0.8 * times), answers_of(base, again)], labels)
    assert [judged[key]["verdict"] for key in ("size", "latency", "accuracy")] == ["better"] * 3
    assert judged["size"]["ratio"] == 0.5 and judged["latency"]["ratio"] == pytest.approx(0.8, abs=0.05)
    assert judged["accuracy"]["flip_rate"] == pytest.approx((better != base).mean())
    judged = verdicts([result_of(2), result_of(1)], [answers_of(base, again), answers_of(better, 0.8 * times)], labels)
    assert [judged[key]["verdict"] for key in ("size", "latency", "accuracy")] == ["worse"] * 3
    few = [answers_of(base[:8], 0.5 * times[:8]), answers_of(base[:8], again[:8])]
    assert verdicts([result_of(1), result_of(1)], few, labels[:8])["latency"]["verdict"] == SAME  # too few to tell
    judged = verdicts([result_of(1), result_of(1)], [answers_of(base, times), answers_of(base, again)], labels)
    assert [judged[key]["verdict"] for key in ("size", "latency", "accuracy")] == [SAME] * 3


def test_a_latency_is_told_apart_only_if_new_processes_agree() -> None:
    generator = np.random.default_rng(1)
    right, labels = generator.random(400) < 0.8, np.ones(400, np.int64)
    times, others = (np.exp(0.1 * generator.standard_normal(400)) for _ in range(2))

    def judged(factor: float) -> dict[str, Any]:
        answered = [answers_of(right, factor * times), answers_of(right, others)]
        return verdicts([result_of(1), result_of(1)], answered, labels)

    faster, same, slower = judged(0.8), judged(1.0), judged(1.3)
    assert confirmed(faster, judged(0.7))["latency"]["verdict"] == "better"
    for other in (same, slower):
        sobered = confirmed(faster, other)
        assert sobered["latency"]["verdict"] == SAME and SAME in sobered["lines"][3]
        assert sobered["latency"]["again_ratio"] == other["latency"]["ratio"]
        assert sobered["accuracy"] == faster["accuracy"]


def test_compare_through_the_command_line(submission: Path, onnx_submission: Path, evaluate: Evaluate,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    code, result, error = evaluate(submission, "--compare", str(onnx_submission))
    assert code == 0, error
    compare = result["details"]["compare"]
    assert compare["size"]["verdict"] == "better"  # int8 against float
    assert compare["latency"]["pairs"] == 50 and compare["latency"]["ratio"] > 0
    assert compare["second"]["details"]["kind"] == "onnx"
    assert compare["accuracy"]["difference"] == pytest.approx(
        (result["accuracy"] - compare["second"]["accuracy"]) / 100, abs=1e-9)
    code, result, _ = evaluate(submission, "--compare", str(submission))
    compare = result["details"]["compare"]
    assert code == 0 and compare["size"]["verdict"] == compare["accuracy"]["verdict"] == SAME
    assert compare["accuracy"]["flip_rate"] == 0
    assert_refused(evaluate(submission, "--compare", str(submission), "--batch_size", "4"), "one image at a time", code=2)


def test_outputs_for_show_hide_no_other_answer() -> None:
    """Spare classes far below the real ones: the spread of all outputs is huge, and says nothing."""
    spare = np.full(6, -1e6, np.float32)
    one = np.concatenate([np.float32([0, 3, 5, 1, 2]), spare])
    assert same_answer(one, one + np.float32(1e-4))
    assert not same_answer(one, np.concatenate([np.zeros(5, np.float32), spare]))
