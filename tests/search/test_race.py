"""The race: the better half goes on, rounds grow, and a race that was killed ends as one that was not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compress.search.entrants import Entrant, RaceState
from compress.search.race import FEWEST_STEPS, Heat, HeatResult, Race, rounds_of

IMAGES = 100


def entrant(number: int, **changes: object) -> Entrant:
    return Entrant.model_validate(dict(
        id=number, criterion="taylor", solver="milp", depth=False, backend="torch", form="float32", widths={"conv": 8},
        dropped=[], macs=1000, parameters=100, size_bytes=400, model="Little", pace=0.01) | changes)


class KilledError(Exception):
    """Stands in for SIGKILL between two writes."""


class Course:
    """A race whose networks gain with their number and with their steps."""

    def __init__(self, count: int, kill_after: int | None = None, failing: Sequence[int] = ()) -> None:
        self.state = RaceState(entrants=[entrant(number) for number in range(count)])
        self.heats: list[tuple[int, int, int]] = []
        self.measured: list[list[int]] = []
        self.kill_after, self.failing, self.left = kill_after, failing, 60.0
        self.kept: RaceState = self.state.model_copy(deep=True)

    def train_all(self, heats: Sequence[Heat], on_result: Callable[[HeatResult], None]) -> None:
        for heat in heats:
            self.heats.append((heat.entrant.id, heat.round, heat.steps))
            if len(self.heats) == self.kill_after:
                raise KilledError
            self.left -= heat.steps * 0.01
            failed = heat.entrant.id in self.failing
            on_result(HeatResult(id=heat.entrant.id, failure="the loss is nan") if failed else HeatResult(
                id=heat.entrant.id, correct=50 + 5 * heat.entrant.id + heat.round, images=IMAGES, pace=0.01))

    def keep(self) -> None:
        self.kept = self.state.model_copy(deep=True)

    def run(self) -> Entrant | None:
        race = Race(self.state, train_all=self.train_all, rank=lambda each: (-(each.accuracy or 0.0),), keep=self.keep,
                    measure=lambda some: self.measured.append([each.id for each in some]), say=lambda text: None, seed=0)
        return race.run(lambda: self.left)


@pytest.mark.parametrize(("count", "rounds"), [(1, 0), (2, 1), (3, 2), (8, 3), (9, 4)])
def test_rounds_halve_to_one(count: int, rounds: int) -> None:
    course = Course(count)
    winner = course.run()
    assert rounds_of(count) == rounds == len(course.state.steps)
    assert winner is not None and winner.id == count - 1
    assert [each.status for each in course.state.entrants if each is not winner] == ["out"] * (count - 1)


def test_rounds_share_the_time_and_their_trainings_are_equally_long() -> None:
    course = Course(8)
    course.run()
    assert [len({steps for _, number, steps in course.heats if number == each}) for each in range(3)] == [1, 1, 1]
    spent = [sum(steps for _, number, steps in course.heats if number == each) * 0.01 for each in range(3)]
    assert spent == pytest.approx([20, 20, 20], rel=0.02)
    assert course.measured == [[7, 6, 5, 4], [7, 6], [7]]


def test_without_time_there_is_a_race_still() -> None:
    course = Course(4)
    course.left = 0.0
    assert course.run() is not None and course.state.steps == [FEWEST_STEPS, FEWEST_STEPS]


def test_networks_whose_training_fails_are_left_out() -> None:
    course = Course(4, failing=[3])
    winner = course.run()
    assert winner is not None and winner.id == 2
    assert (course.state.entrants[3].status, course.state.entrants[3].message) == ("failed", "the loss is nan")
    assert Course(2, failing=[0, 1]).run() is None


@pytest.mark.parametrize("moment", range(1, 15))
def test_a_killed_race_ends_as_one_that_was_not(moment: int, tmp_path: Path) -> None:
    whole, course = Course(8), Course(8, kill_after=moment)
    whole.run()
    with pytest.raises(KilledError):
        course.run()
    course.kept.save(tmp_path)
    again = Course(0)
    again.state, again.left = RaceState.load(tmp_path), course.left
    winner = again.run()
    assert winner is not None and again.state == whole.state
    assert len(course.heats) + len(again.heats) == len(whole.heats) + 1  # the training that was killed is repeated
