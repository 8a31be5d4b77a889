"""Scores: the formula of the user, and the guarded score beside it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.evaluation.score import guarded_score, score
from metadata.schemas import Baselines


def test_score_is_the_users_formula() -> None:
    scores = score(10.0, 5.0, 60.0, Baselines())
    assert scores == {"size_score": 5.0, "latency_score": 2.0, "accuracy_score": 0.75,
                      "total_score": pytest.approx(0.3 * 5 + 0.3 * 2 + 0.4 * 0.75)}


# A public competition with this formula, baselines 44.7 MB, 30 ms, 40 %, 100 classes: MB, ms, %, published total.
# The most accurate entry's latency was not published; it follows from its total.
COMPETITION = Baselines(size_mb=44.7, latency_ms=30.0, accuracy=40.0)
LEADERBOARD = {"winner": (0.31, 4.71, 0.82, 45.31), "second": (0.35, 8.63, 8.38, 39.43),
               "third": (0.43, 2.13, 2.16, 35.36), "best useful": (1.58, 7.0, 18.40, 9.94),
               "baseline ResNet18": (42.91, 30.6, 28.7, 0.90), "most accurate": (21.04, 20.6, 23.60, 1.31)}


def test_guarded_score_ranks_the_useless_last_on_the_public_leaderboard() -> None:
    plain, guarded = {}, {}
    for name, (size, latency, accuracy, published) in LEADERBOARD.items():
        scores = score(size, latency, accuracy, COMPETITION)
        plain[name] = scores["total_score"]
        assert plain[name] == pytest.approx(published, rel=0.03)
        guarded[name] = guarded_score(scores, accuracy / 100, 0.40, 0.01)
    assert max(plain, key=plain.__getitem__) == "winner"
    ranked = sorted(guarded, key=guarded.__getitem__, reverse=True)
    assert ranked[0] == "best useful" and ranked[-2:] == ["third", "winner"] and guarded["winner"] == 0.0
    assert guarded["third"] < guarded["baseline ResNet18"] / 3


def test_guarded_score_is_zero_at_chance_and_capped() -> None:
    useful = score(1.58, 7.0, 18.4, COMPETITION)
    assert 0 < guarded_score(useful, 0.184, 0.4, 0.01) < useful["total_score"]
    assert guarded_score(useful, 0.184, 0.4, 0.01, floor=0.2) == 0.0
    assert guarded_score(useful, 0.184, 0.4, 0.01, lower=0.009) == 0.0
    assert guarded_score(useful, 0.184, 0.4, 0.184) == 0.0
    tiny_and_fast = score(1e-6, 1e-6, 50.0, Baselines())
    skill = (0.5 - 0.1) / (0.8 - 0.1)
    assert guarded_score(tiny_and_fast, 0.5, 0.8, 0.1) == pytest.approx(skill * (3 + 3) + 0.4 * skill)
    # A baseline that guesses is no yardstick: at least a tenth of the way from chance to perfection counts as skill 1.
    assert guarded_score(tiny_and_fast, 0.5, 0.05, 0.1) == pytest.approx(3 + 3 + 0.4 * 0.4 / 0.09)
    assert guarded_score(tiny_and_fast, 0.11, 0.101, 0.1) == pytest.approx(guarded_score(tiny_and_fast, 0.11, 0.1, 0.1))


@given(st.floats(0.11, 1), st.floats(0.11, 1), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_guarded_score_grows_with_accuracy(one: float, two: float, size: float, latency: float) -> None:
    low, high = sorted((one, two))
    scores = score(size, latency, 50.0, Baselines())
    assert guarded_score(scores, low, 0.8, 0.1) <= guarded_score(scores, high, 0.8, 0.1)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0, 100), st.floats(1e-2, 0.9))
def test_smaller_faster_better_never_scores_less(size: float, latency: float, accuracy: float, less: float) -> None:
    worse = score(size, latency, accuracy, Baselines())["total_score"]
    assert score(size * less, latency, accuracy, Baselines())["total_score"] > worse
    assert score(size, latency * less, accuracy, Baselines())["total_score"] > worse
    assert score(size, latency, accuracy + 1, Baselines())["total_score"] > worse
