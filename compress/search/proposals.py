"""Which networks race: solutions by several criteria, with and without depth, in several forms; measured before they train.

What a network costs does not depend on its training. So every solution is made ready to be served and measured first, and
where the models of cost were wrong, they are corrected by the factor that was found, and the solution is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from architectures.architecture import Architecture
from architectures.counting import architecture_macs, layer_costs
from compress.search.bench import Bench
from compress.search.costs import CostModel
from compress.search.entrants import Entrant, RaceState
from compress.search.serving import Serving, Stopwatch, Workshop
from compress.search.solve import KB, Infeasible, Limits, Solution, solve
from compress.search.space import Choice
from compress.search.values import ValueModel, nearest
from compress.search.verdict import described, size_excess, violation
from metadata.errors import UserError

MARGIN = 0.97  # of a limit of time is solved for: what is measured scatters about what is predicted
SMALLER = 0.998  # of a limit of bytes is solved for, once a file was larger than its model said
WASTE = 0.93  # of a limit; a binding one of which less is used shows that the model of cost is wrong
CORRECTIONS = 3  # times at most that a network is solved again
RUNGS = (0.8, 0.5, 0.25, 0.1)  # of the way from the least time to the student's, where accuracy is the only limit


@dataclass(frozen=True, kw_only=True)
class Proposer:
    """Makes and measures the networks that race.

    Args:
        bench: their student and their weights.
        values: the value model of each criterion.
        costs: the cost model of each way to serve; empty where time does not matter.
        limits: that they should keep.
        servings: ways to serve.
        depth: whether blocks may go.
        state: takes the networks.
        workshop: makes them ready.
        stopwatches: time them, beside the student as it is served; by the name of the way to serve.
        keep: writes the state.
        say: shows a line.
        most: how many networks may race.
    """

    bench: Bench
    values: Mapping[str, ValueModel]
    costs: Mapping[Serving, CostModel]
    limits: Limits
    servings: Sequence[Serving]
    depth: bool
    state: RaceState
    workshop: Workshop
    stopwatches: Mapping[str, Stopwatch]
    keep: Callable[[], None]
    say: Callable[[str], None]
    most: int

    def propose(self) -> None:
        """Add the networks that race to the state.

        Raises:
            UserError: no sub-network keeps the limits; the message says the least time and bytes.
        """
        refusals: list[UserError] = []
        # In the order in which they are worth their time, where there is time for some alone.
        for criterion in self.values:
            for serving in self.servings:
                for limits in self._goals(serving):
                    for depth in (True, False) if self.depth else (False,):
                        if len(self.state.racing()) < self.most:
                            try:
                                self._add(self._solved(criterion, serving, depth, limits))
                            except Infeasible as error:
                                refusals.append(error)
                    if criterion == next(iter(self.values)) and len(self.state.racing()) < self.most:
                        self._add(self._uniform(serving, limits))
        if not self.state.racing():
            raise min(refusals, key=lambda error: len(str(error)))
        self.keep()

    def settle(self, has_time: Callable[[], bool]) -> None:
        """Measure the networks that race, and solve again where a model of cost was wrong.

        Raises:
            UserError: none keeps the limits as measured; the message says the least time and bytes that were.
        """
        for _ in range(CORRECTIONS):
            fresh = [entrant for entrant in self.state.racing() if entrant.latency_ms is None]
            if not fresh or not has_time():
                break
            self.measure(fresh)
            for entrant in fresh:
                self._correct(entrant)
            self.keep()
        self.measure([entrant for entrant in self.state.racing() if entrant.latency_ms is None])
        best = min((violation(entrant, self.limits) for entrant in self.state.racing()), default=2)
        for entrant in self.state.racing():
            if violation(entrant, self.limits) > min(best, 1):
                entrant.status, entrant.message = "replaced", "misses a limit as measured"
        if not self.state.racing():  # a correction went too far
            for entrant in self.state.entrants:
                if entrant.status == "replaced" and violation(entrant, self.limits) < 2:
                    entrant.status = "racing"
        if not self.state.racing():
            least = min(self.state.entrants, key=lambda entrant: entrant.latency_ms or 0.0)
            size = min(entrant.size_bytes for entrant in self.state.entrants)
            raise Infeasible(f"search: no network keeps the limits as measured; the least that was measured is "
                             f"{least.latency_ms:.3f} ms and {size / KB:.1f} kB; raise a limit")
        for entrant in self.state.racing():
            entrant.pace = self.bench.pace(entrant)
        self.keep()

    def measure(self, entrants: Sequence[Entrant]) -> None:
        """Measure the time and bytes of networks as they would be served now, beside each other."""
        if not entrants:
            return
        for name, stopwatch in self.stopwatches.items():
            served = [entrant for entrant in entrants if entrant.serving.name == name]
            ready = [self.workshop.deploy(*self.bench.network(entrant), entrant.serving) for entrant in served]
            timings = stopwatch.times([each.answer for each in ready]) if ready else []
            for entrant, each, timing in zip(served, ready, timings, strict=True):
                entrant.latency_ms, entrant.noise, entrant.size_bytes = timing.latency_ms, timing.noise, each.size_bytes
            self.state.student_ms[name] = stopwatch.calm_ms
        self.keep()

    # -------------------------------------------------------------------------------------------------- solutions

    def _goals(self, serving: Serving) -> list[Limits]:
        """Return the limits to solve for: those that were given, or several times where accuracy alone is a limit."""
        if self.limits.latency_ms is not None or self.limits.size_kb is not None:
            return [self.limits]
        space, costs = self.bench.space, self.costs[serving]
        least, whole = (costs.latency_ms(choice) for choice in (space.smallest(self.depth), space.full()))
        return [replace(self.limits, latency_ms=(least + rung * (whole - least)) / MARGIN) for rung in RUNGS]

    def _solved(self, criterion: str, serving: Serving, depth: bool, limits: Limits, factor: float = 1.0) -> Entrant:
        """Return the best network by the models, under limits that are corrected by what was measured.

        Raises:
            Infeasible: there is none.
        """
        found: Solution = solve(self.bench.space, self.costs.get(serving), self.values[criterion],
                                self._corrected(limits, factor), form=serving.form, drop=depth, asked=limits)
        return self._entrant(found.choice, criterion, "milp", depth, serving, found.gap)

    def _corrected(self, limits: Limits, factor: float) -> Limits:
        """Return limits for the models: with a margin, divided by the factor by which the model of cost was wrong."""
        return limits if limits.latency_ms is None else replace(limits, latency_ms=MARGIN * limits.latency_ms / factor)

    def _uniform(self, serving: Serving, limits: Limits, factor: float = 1.0) -> Entrant | None:
        """Return the widest network that keeps the same share of all channels and fits, or None."""
        limits, space, costs = self._corrected(limits, factor), self.bench.space, self.costs.get(serving)

        def within(choice: Choice) -> bool:
            quick = limits.latency_ms is None or costs is None or costs.latency_ms(choice) <= limits.latency_ms
            return quick and (limits.size_kb is None or space.size_bytes(choice, serving.form) <= KB * limits.size_kb)

        low, high = 0, 64  # sixty-fourths of the channels
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(self._share(middle / 64)) else (low, middle)
        choice = self._share(low / 64)
        criterion = next(iter(self.values))
        return self._entrant(choice, criterion, "uniform", False, serving, None) if within(choice) else None

    def _share(self, share: float) -> Choice:
        groups = self.bench.space.groups
        return Choice(widths={group.name: nearest(group.options, share * group.channels) for group in groups})

    def _entrant(self, choice: Choice, criterion: str, solver: str, depth: bool, serving: Serving,
                 gap: float | None) -> Entrant:
        space, costs = self.bench.space, self.costs.get(serving)
        architecture = space.shape(choice)
        return Entrant(
            id=self.state.next_id(), criterion=criterion, solver=solver, depth=depth, backend=serving.backend,
            form=serving.form, widths=dict(choice.widths), dropped=sorted(choice.dropped), gap=gap,
            loss=self.values[criterion].loss(choice),
            predicted_ms=costs.latency_ms(choice) if costs else None, macs=architecture_macs(architecture),
            parameters=stored_numbers(architecture), size_bytes=0,
            model=architecture.model_type)

    def _add(self, entrant: Entrant | None) -> None:
        """Let a network race, unless the same one does already."""
        if entrant is None:
            return
        for other in self.state.racing():
            if (other.choice, other.serving) == (entrant.choice, entrant.serving) and (
                    other.criterion == entrant.criterion or entrant.solver == "uniform"):
                return
        self.state.entrants.append(entrant)

    # ------------------------------------------------------------------------------------------------- corrections

    def _correct(self, entrant: Entrant) -> None:
        """Learn from a measurement: replace a network that misses a limit, or that uses too little of its time."""
        limits, factor, wasted = self.limits, 1.0, False
        if limits.latency_ms is not None and entrant.predicted_ms is not None and entrant.latency_ms is not None:
            factor = entrant.latency_ms / entrant.predicted_ms
            self.state.factors[entrant.serving.name] = factor
            binding = entrant.predicted_ms * entrant.factor > WASTE * limits.latency_ms
            wasted = binding and entrant.latency_ms < WASTE * limits.latency_ms
        if not violation(entrant, limits) and not wasted:
            return
        if size_excess(entrant, limits) > 0 and limits.size_kb is not None:
            limits = replace(limits, size_kb=limits.size_kb * SMALLER / (1 + size_excess(entrant, limits)))
        try:
            again = self._uniform(entrant.serving, limits, factor) if entrant.solver == "uniform" else self._solved(
                entrant.criterion, entrant.serving, entrant.depth, limits, factor)
        except Infeasible:  # by the model: the smallest network is measured before anything is called impossible
            again = self._entrant(self.bench.space.smallest(entrant.depth), entrant.criterion, "milp", entrant.depth,
                                  entrant.serving, None)
        if again is not None and again.choice != entrant.choice:
            again.factor = factor
            self.say(f"  {described(entrant)}; solved again with a factor of {factor:.2f}")
            entrant.status, entrant.message = "replaced", f"solved again with a factor of {factor:.2f}"
            self._add(again)


def stored_numbers(architecture: Architecture) -> int:
    """Return the stored numbers of a network, from its layers alone."""
    return sum(cost.parameters for cost in layer_costs(architecture).values())
