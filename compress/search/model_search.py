"""The search: limits in, the best network out. Each step leaves its result on disk, and a killed search goes on there.

1. Choose the ways to serve; measure what layers cost on each (`costs.py`), and what channels are worth (`values.py`).
2. Solve for the widths of all groups under the limits (`solve.py`), measure the solutions, solve again (`proposals.py`).
3. Let the solutions race (`race.py`).
4. Train the winner for the rest of the minutes, make it int8, measure it (`finish.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from architectures.architecture import Architecture
from architectures.counting import architecture_macs
from compress.search.bench import Bench, fixed_batches
from compress.search.clock import SearchClock
from compress.search.cluster import Teaching
from compress.search.costs import CostModel, measure_costs
from compress.search.entrants import Entrant, RaceState
from compress.search.finish import Answer, Finish, MOST_RESERVED
from compress.search.proposals import Proposer, stored_numbers
from compress.search.race import Race, TrainAll
from compress.search.serving import Serving, Stopwatch, Workshop, servings
from compress.search.solve import Limits
from compress.search.space import Space
from compress.search.values import ValueModel, value_model
from compress.search.verdict import accuracy_lack, described, missed, nearest_by_each, violation
from compress.training.assessment import assess
from compress.training.data import Data
from compress.training.trackers import Tracker
from loaders.augment import derive_seed
from metadata.errors import VerificationError

COST_SHARE, VALUE_SHARE = 0.2, 0.2  # of the minutes, at most
RACE_SHARE, LEAST_RACE = 0.4, 0.05  # of the time left for training, and of the minutes at least
READY_SHARE = 0.5  # of the minutes, after which no solution is corrected any more
MAKING_SHARE = 0.05  # of the minutes, for making all networks of the race ready once
FEWEST, MOST = 2, 10  # networks that race
LEAST_TRAINING = 0.2  # of the minutes; a search with less warns
MOST_SERVINGS, AS_FAST = 2, 1.5  # ways to serve that race; slower ones than this times the fastest do not
VALUE_IMAGES, VALUE_BATCH = 512, 128
TOO_NOISY = 0.1  # one standard error of a measured time, as a share of it


@dataclass(frozen=True, kw_only=True)
class SearchOrder:
    """What is asked of a search.

    Args:
        limits: that the answer should keep.
        backend: a runtime, or "auto" for all that are installed.
        threads: of one inference.
        criteria: that rank channels; each has solutions in the race.
        depth: whether residual blocks may be dropped.
        samples: random sub-networks that each value model is fitted to.
        costs_folder: where measured costs are kept for other searches on this machine.
    """

    limits: Limits
    backend: str
    threads: int
    criteria: Sequence[str]
    depth: bool
    samples: int
    costs_folder: Path


@dataclass(frozen=True, kw_only=True)
class ModelSearch:
    """A search in progress.

    Args:
        order: what is asked.
        student: the trained network, on the CPU.
        architecture: its layers, with its history.
        data: on the device.
        teaching: how all networks learn.
        teacher: that it names, or None.
        examples: (N, C, H, W) training images, preprocessed.
        seed: of the run.
        device: to train on.
        folder: where the search leaves what it has found.
        tracker: shows progress.
        clock: of the minutes.
        warn: takes what the user should know.
        elsewhere: has the networks of a bench trained on other machines; None: in this process.
    """

    order: SearchOrder
    student: fx.GraphModule
    architecture: Architecture
    data: Data
    teaching: Teaching
    teacher: nn.Module | None
    examples: Tensor
    seed: int
    device: torch.device
    folder: Path
    tracker: Tracker
    clock: SearchClock
    warn: Callable[[str], None]
    elsewhere: Callable[[Bench], TrainAll] | None = None
    state: RaceState = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", RaceState.load(self.folder))

    def run(self) -> Answer:
        """Return the best network that keeps the limits.

        Raises:
            UserError: no sub-network can keep the limits of time and bytes.
            VerificationError: the answer misses a limit as measured; front.csv is written.
        """
        say, limits = self.tracker.say, self.order.limits
        space = Space.of(self.architecture, self.student.state_dict())
        workshop = Workshop(examples=self.examples, preprocessing=self.data.preprocessing, threads=self.order.threads,
                            folder=self.folder)
        reference = workshop.deploy(self.student, self.architecture, Serving("torch", "float32"))
        stopwatch = Stopwatch(reference.answer, workshop.input_shape, self.order.threads, self.state.calmest(),
                              exact=self._time_matters)
        chosen = self._servings(workshop, stopwatch)
        stopwatches = self._beside_the_student(workshop, chosen)
        costs = self._costs(space, chosen)
        values = self._values(space)
        bench = Bench(space=space, student=self.student, scores={name: model.scores for name, model in values.items()},
                      data=self.data, loss=self.teaching.loss(self.teacher, self.device), settings=self.teaching.settings,
                      seed=self.seed, device=self.device, folder=self.folder, tracker=self.tracker)
        proposer = Proposer(bench=bench, values=values, costs=costs, limits=limits, servings=chosen, depth=self.order.depth,
                            state=self.state, workshop=workshop, stopwatches=stopwatches, keep=self._keep, say=say,
                            most=min(MOST, max(FEWEST, int(MAKING_SHARE * self.clock.seconds / self.state.making))))
        if not self.state.entrants:
            self._enter_student(space)
            proposer.propose()
            say(f"  {len(self.state.racing())} candidates; {self.clock.said()}")
        if self.state.race_ends is None:
            proposer.settle(self.clock.until(READY_SHARE * self.clock.seconds))
            self._say_noise()
            training = self.clock.left - MOST_RESERVED * self.clock.seconds
            if training < LEAST_TRAINING * self.clock.seconds:
                self.warn(f"search: {self.clock.spent / 60:.1f} of {self.clock.seconds / 60:g} minutes are spent before "
                          "any training, and little is left to train in; give more minutes")
            self.state.race_ends = self.clock.spent + max(RACE_SHARE * training, LEAST_RACE * self.clock.seconds)
            self._keep()
        race_ends = self.state.race_ends
        train_all = self.elsewhere(bench) if self.elsewhere else bench.train_all
        race = Race(self.state, train_all=train_all, measure=proposer.measure, rank=self._rank,
                    keep=self._keep, say=say, seed=self.seed)
        winner = next((entrant for entrant in self.state.entrants if entrant.status == "won"), None) or race.run(
            lambda: max(race_ends - self.clock.spent, 0.0))
        if winner is None:
            failures = [entrant.message for entrant in self.state.entrants if entrant.status == "failed"]
            raise VerificationError(f"search: the training of every candidate failed: {failures[0]}")
        winner.status = "won"
        finish = Finish(bench=bench, workshop=workshop, stopwatch=stopwatches[winner.serving.name], limits=limits,
                        state=self.state, clock=self.clock, keep=self._keep, say=say)
        answer = finish.answer(winner)
        self._check(answer)
        return answer

    # --------------------------------------------------------------------------------------------------- the models

    def _servings(self, workshop: Workshop, stopwatch: Stopwatch) -> list[Serving]:
        """Return the ways to serve that race: the fastest on this machine, and of those that suit a limit of bytes."""
        limits = self.order.limits
        possible = servings(self.order.backend)
        if self.state.servings:
            return [serving for serving in possible if serving.name in self.state.servings]
        if limits.size_kb is not None:
            possible = [serving for serving in possible if serving.form != "float32"]
        if not self._time_matters:  # one of each form: the same bytes
            possible = list({serving.form: serving for serving in reversed(possible)}.values())
        ready, making = [], []
        for serving in possible:
            started = self.clock.spent
            ready.append(workshop.deploy(self.student, self.architecture, serving).answer)
            making.append(self.clock.spent - started)
        timings = stopwatch.times(ready)
        for serving, timing in zip(possible, timings, strict=True):
            self.tracker.say(f"  the student in {serving.name}: {timing.latency_ms:.3f} ms (± {timing.noise:.1%})")
        order = sorted(range(len(possible)), key=lambda place: timings[place].latency_ms)
        fastest = timings[order[0]].latency_ms
        chosen = [possible[place] for place in order if timings[place].latency_ms <= AS_FAST * fastest
                  or not self._time_matters][:MOST_SERVINGS]
        self.state.making = min(making)  # the first of them imports libraries
        self.state.servings, self.state.calm_ms = [serving.name for serving in chosen], stopwatch.calm_ms
        self._keep()
        return chosen

    def _beside_the_student(self, workshop: Workshop, chosen: Sequence[Serving]) -> dict[str, Stopwatch]:
        """Return a stopwatch for each way to serve, whose reference is the student served that way.

        Other work on the machine slows one runtime more than another: a network's share of the time of a reference on
        another runtime would depend on the moment.
        """
        found = {}
        for serving in chosen:
            student = workshop.deploy(self.student, self.architecture, serving).answer
            watch = Stopwatch(student, workshop.input_shape, self.order.threads,
                              self.state.student_ms.get(serving.name, math.inf), exact=self._time_matters)
            watch.times([student])
            found[serving.name], self.state.student_ms[serving.name] = watch, watch.calm_ms
        self._keep()
        return found

    @property
    def _time_matters(self) -> bool:
        """Whether time is a limit, or what is made small where accuracy is the only limit."""
        return self.order.limits.latency_ms is not None or self.order.limits.size_kb is None

    def _costs(self, space: Space, chosen: Sequence[Serving]) -> dict[Serving, CostModel]:
        """Return the cost model of each way to serve, with its check printed."""
        if not self._time_matters or self.state.race_ends is not None:  # all solutions are made
            return {}
        found = {}
        for serving in chosen:
            seconds = self.clock.share(COST_SHARE / len(chosen))
            costs = measure_costs(space, serving.backend, serving.precision, self.order.threads, seconds, self.tracker,
                                  self.order.costs_folder)
            self.tracker.say(f"  cost model of {serving.name}: {costs.check}; {self.clock.said()}")
            # It was measured at another moment of this machine, or days ago.
            found[serving] = costs.corrected(self.state.student_ms[serving.name] / costs.latency_ms(space.full()))
        return found

    def _values(self, space: Space) -> dict[str, ValueModel]:
        """Return the value model of each criterion, with its check printed; those on disk are read."""
        batches = fixed_batches(self.data, self.device, VALUE_IMAGES, min(VALUE_BATCH, self.teaching.settings.batch_size))
        found: dict[str, ValueModel] = {}
        loss = None
        for criterion in self.order.criteria:
            if any(not model.check.complete for model in found.values()):
                self.tracker.say(f"  no time for another value model, by {criterion}")
                break
            model = ValueModel.load(self.folder, criterion)
            if model is None:
                end = self.clock.spent + self.clock.share(VALUE_SHARE / len(self.order.criteria))
                rng = np.random.default_rng(derive_seed(self.seed, "values", criterion))
                loss = loss or self.teaching.loss(self.teacher, self.device, batches)
                with self.tracker.progress(f"value of channels by {criterion}", "sub-networks") as advance:
                    model = value_model(space, copy.deepcopy(self.student), batches, loss, criterion,
                                        self.order.samples, rng, drop=self.order.depth,
                                        has_time=self.clock.until(end), advance=advance)
                model.save(self.folder)
            check = model.check
            self.tracker.say(f"  value of channels by {criterion}: rank correlation {check.rank_correlation:.2f} with the "
                             f"measured losses of {check.held_out} sub-networks that were held out, "
                             f"{check.importance_alone:.2f} by importance alone; {self.clock.said()}")
            found[criterion] = model
        return found

    # ---------------------------------------------------------------------------------------------------- the race

    def _enter_student(self, space: Space) -> None:
        """Add the student as it came to what is reported: number 0, which does not race."""
        found = assess(copy.deepcopy(self.student).to(self.device), self.data.validation, self.data.preprocessing)
        self.state.entrants.append(Entrant(
            id=0, criterion="", solver="none", depth=False, backend="torch", form="float32", dropped=[],
            widths=dict(space.full().widths), macs=architecture_macs(self.architecture),
            parameters=stored_numbers(self.architecture), size_bytes=space.size_bytes(space.full(), "float32"),
            model=self.architecture.model_type, latency_ms=self.state.calm_ms, correct=found.correct, images=found.images,
            status="out"))

    def _rank(self, entrant: Entrant) -> tuple[float, ...]:
        """Return what orders networks: those that keep the limits, then accuracy; with a limit of accuracy alone, time."""
        limits, accuracy = self.order.limits, entrant.accuracy or 0.0
        if limits.latency_ms is None and limits.size_kb is None:
            enough = accuracy_lack(entrant, limits) <= 0
            return (0.0, entrant.latency_ms or 0.0) if enough else (1.0, -accuracy)
        return float(violation(entrant, limits)), -accuracy, entrant.latency_ms or 0.0

    def _say_noise(self) -> None:
        """Warn where times are too uncertain to tell candidates apart."""
        noise = max((entrant.noise for entrant in self.state.racing()), default=0.0)
        if noise > TOO_NOISY and self._time_matters:
            self.warn(f"search: this machine's timing is too noisy to tell candidates apart: one standard error is "
                      f"{noise:.0%} of a latency; latencies are compared with the limit only up to it. Stop other "
                      "work on this machine, or search again when it is idle")

    def _check(self, answer: Answer) -> None:
        """Raise VerificationError where the answer misses a limit."""
        misses = missed(answer.entrant, self.order.limits)
        if misses:
            texts = nearest_by_each(self.state.entrants, self.order.limits)
            raise VerificationError(
                f"search: no model keeps {' and '.join(misses)}: the answer is {described(answer.entrant)}; "
                + "; ".join(texts) + f"; all that was measured is in {self.folder / 'front.csv'}")

    def _keep(self) -> None:
        self.state.save(self.folder)
