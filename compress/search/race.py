"""The race: networks train briefly, in rounds that grow; after each, the better half goes on.

Source: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", algorithm 1
(successive halving); Li et al. 2018, "Hyperband", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress.search.entrants import Entrant, RaceState

FEWEST_STEPS = 2  # of a training, however little time there is


@dataclass(frozen=True, kw_only=True)
class Heat:
    """One training of the race, as sent to whoever trains it.

    Args:
        entrant: the network.
        round: counted from 0.
        steps: of the training.
        seed: of the search.
    """

    entrant: Entrant
    round: int
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class HeatResult:
    """What a training gave: right answers on the validation split, and why there are none.

    Args:
        id: of the network.
        pace: seconds of a step.
    """

    id: int
    correct: int = 0
    images: int = 0
    pace: float = 0.0
    failure: str = ""


TrainAll = Callable[[Sequence[Heat], Callable[[HeatResult], None]], None]  # calls back after each, in any order
Rank = Callable[[Entrant], tuple[float, ...]]  # the smallest is the best


def rounds_of(count: int) -> int:
    """Return in how many rounds so many networks are halved to one."""
    return math.ceil(math.log2(max(count, 1)))


class Race:
    """A race in progress. It continues wherever its state is.

    Args:
        state: the networks and how far they are.
        train_all: trains the networks of a round.
        measure: measures the latency of those that go on.
        rank: orders networks after a round.
        keep: writes the state.
        say: shows a line.
        seed: of the search.
    """

    def __init__(self, state: RaceState, *, train_all: TrainAll, measure: Callable[[list[Entrant]], None], rank: Rank,
                 keep: Callable[[], None], say: Callable[[str], None], seed: int) -> None:
        self.state, self.train_all, self.measure, self.rank = state, train_all, measure, rank
        self.keep, self.say, self.seed = keep, say, seed

    def run(self, seconds_left: Callable[[], float]) -> Entrant | None:
        """Halve the networks until one is left, and return it; None where all have failed.

        Args:
            seconds_left: what is left for the race; its rounds share it equally.
        """
        while len(racing := self.state.racing()) > 1:
            number = self.state.halved
            if len(self.state.steps) == number:
                self.state.steps.append(self._steps(racing, seconds_left() / rounds_of(len(racing))))
                self.keep()
            waiting = [Heat(entrant=entrant, round=number, steps=self.state.steps[number], seed=self.seed)
                       for entrant in racing if entrant.round == number]
            self.say(f"  round {number + 1}: {len(racing)} candidates, {self.state.steps[number]} steps each")
            self.train_all(waiting, self._note)
            self._halve()
        return next(iter(self.state.racing()), None)

    def _steps(self, racing: list[Entrant], seconds: float) -> int:
        """Return how many steps each training of a round may take: equally many, so that they can be compared."""
        return max(FEWEST_STEPS, int(seconds / max(sum(entrant.pace or 0.0 for entrant in racing), 1e-9)))

    def _note(self, result: HeatResult) -> None:
        entrant = self.state.entrants[result.id]
        entrant.round += 1
        if result.failure:
            entrant.status, entrant.message = "failed", result.failure
            self.say(f"  candidate {entrant.name}: failed: {result.failure}")
        else:
            entrant.correct, entrant.images, entrant.pace = result.correct, result.images, result.pace
            entrant.steps += self.state.steps[entrant.round - 1]
            self.say(f"  candidate {entrant.name}: {result.correct}/{result.images} "
                     f"({result.correct / result.images:.2%})")
        self.keep()

    def _halve(self) -> None:
        """Let the better half go on, and measure it."""
        ranked = sorted(self.state.racing(), key=self.rank)
        keep = math.ceil(len(ranked) / 2)
        self.measure(ranked[:keep])
        for entrant in ranked[keep:]:
            entrant.status = "out"
        self.state.halved += 1
        self.keep()
