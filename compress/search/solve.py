"""The best sub-network under limits of time and bytes: a multiple-choice knapsack, solved as a mixed-integer program.

Each group takes one of its widths. What a layer costs depends on the widths of two groups: for each pair of groups there
is a variable for each pair of widths, 1 where both are taken. Only the choices of widths and blocks need be integers.

Source: Kellerer, Pferschy and Pisinger 2004, "Knapsack Problems", chapter 11, for the multiple-choice knapsack; Adams and
Sherali 1986, "A Tight Linearization and an Algorithm for Zero-One Quadratic Programming Problems", for the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from compress.search.costs import CostModel
from compress.search.sizes import UNCERTAIN, Form
from compress.search.space import Choice, Space
from compress.search.terms import Key, Table, Terms, size_terms
from metadata.errors import UserError

GAP = 0.01  # relative, between a solution and the bound that is proven
SECONDS = 60.0  # of one solution at most; the gap says how far it came
KB = 1000  # bytes
UNPROVEN = 1.0  # a gap: nothing is known
ATTEMPTS = 8  # to keep the limit of bytes exactly


class Values(Protocol):
    """What a sub-network loses, as a sum.

    Attributes:
        terms: by group and width.
        blocks: by block that is dropped; a block that it leaves out stays.
    """

    @property
    def terms(self) -> Mapping[str, Mapping[int, float]]: ...

    @property
    def blocks(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Limits:
    """What a model must keep; None: no limit.

    Args:
        latency_ms: at batch 1.
        size_kb: of the weights file, in 1000 bytes.
        min_accuracy: a fraction.
    """

    latency_ms: float | None = None
    size_kb: float | None = None
    min_accuracy: float | None = None


class Infeasible(UserError):  # noqa: N818 - it says what the limits are
    """No sub-network keeps the limits."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The best sub-network by the models.

    Args:
        choice: the sub-network.
        latency_ms: predicted; None without a cost model.
        size_bytes: of the weights file, exact.
        macs: multiply-adds.
        loss: predicted by the value model.
        gap: by which share of its loss the best one may be better, as the solver has proven.
    """

    choice: Choice
    latency_ms: float | None
    size_bytes: int
    macs: int
    loss: float
    gap: float


def solve(space: Space, costs: CostModel | None, values: Values, limits: Limits, *, form: Form, drop: bool,
          asked: Limits | None = None) -> Solution:
    """Return the sub-network that loses least under limits of time and bytes, optimal within `GAP`.

    The bytes in the program are right to some ten bytes. The file's exact bytes, and those by which a file of other weights
    may be larger, decide: where they exceed the limit, the program's limit is lowered by as much, and solved again.

    Args:
        space: the sub-networks.
        costs: their times; needed with a limit of time.
        values: what they lose.
        limits: `min_accuracy` is not looked at.
        form: of the weights file.
        drop: whether blocks may go.
        asked: the limits before any correction, for the message; `limits` unless given.

    Raises:
        Infeasible: no sub-network keeps the limits; the message names the least time and the least bytes.
    """
    if limits.latency_ms is not None and costs is None:
        raise ValueError("a limit of time needs a cost model")
    latency = limits.latency_ms
    size = None if limits.size_kb is None else KB * limits.size_kb - UNCERTAIN[form]
    program = _Program(space, drop)
    loss = program.loss(values)
    if latency is not None and costs is not None:
        program.limit("latency", costs.terms, latency)
    sizes = None if size is None else size_terms(space, form)
    goal = size
    for _ in range(ATTEMPTS):
        if sizes is not None and goal is not None:
            program.limit("size", sizes, goal)
        found = program.solved(loss)
        if found is None:
            break
        choice, gap = found
        exact = space.size_bytes(choice, form)
        if size is None or goal is None or exact <= size:
            return _solution(space, costs, values, choice, exact, gap)
        goal -= exact - size + 1
    choice = space.smallest(drop)  # within some ten bytes of the limit the program may have missed it
    exact = space.size_bytes(choice, form)
    if exact > (size or np.inf) or (costs is not None and costs.latency_ms(choice) > (latency or np.inf)):
        raise _infeasible(space, costs, asked or limits, form, drop)
    return _solution(space, costs, values, choice, exact, UNPROVEN)


def loss_of(values: Values, choice: Choice) -> float:
    """Return what a sub-network loses by a value model."""
    return sum(values.terms[name][width] for name, width in choice.widths.items()) + sum(
        values.blocks[name] for name in choice.dropped)


def _solution(space: Space, costs: CostModel | None, values: Values, choice: Choice, size_bytes: int,
              gap: float) -> Solution:
    return Solution(choice=choice, latency_ms=None if costs is None else costs.latency_ms(choice), size_bytes=size_bytes,
                    macs=space.macs(choice), loss=loss_of(values, choice), gap=gap)


def _infeasible(space: Space, costs: CostModel | None, asked: Limits, form: Form, drop: bool) -> Infeasible:
    """Return the error for limits that no sub-network keeps, which says what the least is."""
    wanted = [f"{value:.4g} {unit}" for value, unit in ((asked.latency_ms, "ms"), (asked.size_kb, "kB"))
              if value is not None]
    least = [f"{space.size_bytes(space.smallest(drop), form) / KB:.4g} kB"]
    if costs is not None:
        program = _Program(space, drop)
        fastest = program.solved(program.row(costs.terms)[0])
        if fastest is not None:
            least.insert(0, f"{costs.latency_ms(fastest[0]):.4g} ms")
    where = f"{form} on {costs.backend}" if costs is not None else form
    return Infeasible(f"search: no sub-network of {space.architecture.model_type} keeps {' and '.join(wanted)}; the least "
                      f"of each is {' and '.join(least)} ({where}); raise a limit, or begin with a smaller student")


class _Program:
    """The mixed-integer program: its variables, what it minimizes, and its constraints.

    Args:
        space: the sub-networks.
        drop: whether blocks may go.
    """

    def __init__(self, space: Space, drop: bool) -> None:
        self.space, self.integer, self.upper = space, list[int](), list[float]()
        self.constraints: list[tuple[dict[int, float], float, float]] = []
        self.limits: dict[str, tuple[dict[int, float], float]] = {}
        self.widths = {group.name: [self._variable() for _ in group.options] for group in space.groups}
        self.dropped = {block.name: self._variable(upper=float(drop)) for block in space.blocks}
        self.gone: dict[frozenset[str], int] = {}
        self.chosen: dict[Key, list[int]] = {}
        for places in self.widths.values():
            self._constrain(dict.fromkeys(places, 1.0), 1, 1)
        for block in space.blocks:
            for name in space.lacking(frozenset({block.name})):  # a group that is not there costs and loses nothing
                self._constrain({self.widths[name][-1]: 1.0, self.dropped[block.name]: -1.0}, 0, np.inf)

    def _variable(self, integer: bool = True, upper: float = 1.0) -> int:
        self.integer.append(int(integer))
        self.upper.append(upper)
        return len(self.integer) - 1

    def _constrain(self, row: dict[int, float], low: float, high: float) -> None:
        self.constraints.append((row, low, high))

    def loss(self, values: Values) -> dict[int, float]:
        """Return the coefficients of what a sub-network loses."""
        found = {}
        for name, place in self.dropped.items():
            found[place] = values.blocks.get(name, 0.0)
            if name not in values.blocks:  # what its absence costs is not known
                self.upper[place] = 0.0
        for name, places in self.widths.items():
            found |= {place: values.terms[name][width]
                      for place, width in zip(places, self.space.options[name], strict=True)}
        return found

    def row(self, terms: Terms) -> tuple[dict[int, float], float]:
        """Return the coefficients of a sum over sub-networks, and its constant."""
        row: dict[int, float] = {}
        constant = 0.0
        for (groups, blocks), table in terms.tables.items():
            if groups:
                for place, each in zip(self._chosen((groups, blocks), table), table.ravel(), strict=True):
                    row[place] = row.get(place, 0.0) + float(each)
            else:
                constant += float(table)
                if blocks:
                    gone = self._gone(blocks)
                    row[gone] = row.get(gone, 0.0) - float(table)
        return row, constant

    def limit(self, name: str, terms: Terms, most: float) -> None:
        """Limit a sum over sub-networks; a limit of the same name is replaced."""
        row, constant = self.row(terms)
        scale = max(map(abs, row.values()), default=0.0) or 1.0
        self.limits[name] = {place: each / scale for place, each in row.items()}, (most - constant) / scale

    def _gone(self, blocks: frozenset[str]) -> int:
        """Return the variable that is 1 where one of the blocks is dropped."""
        if len(blocks) == 1:
            return self.dropped[next(iter(blocks))]
        if blocks not in self.gone:
            gone = self.gone[blocks] = self._variable(integer=False)
            for name in blocks:
                self._constrain({gone: 1.0, self.dropped[name]: -1.0}, 0, np.inf)
            self._constrain({gone: 1.0, **{self.dropped[name]: -1.0 for name in blocks}}, -np.inf, 0)
        return self.gone[blocks]

    def _chosen(self, key: Key, table: Table) -> list[int]:
        """Return the variables that are 1 for the widths that are taken, and 0 where one of the blocks is dropped."""
        groups, blocks = key
        if len(groups) == 1 and not blocks:
            return self.widths[groups[0]]
        if key in self.chosen:
            return self.chosen[key]
        places = self.chosen[key] = [self._variable(integer=False) for _ in range(table.size)]
        square = np.array(places).reshape(table.shape)
        for axis, name in enumerate(groups):
            for option, width in enumerate(self.widths[name]):
                # All that has this width is the width's own variable, or nothing where the block is dropped.
                row = dict.fromkeys(square.take(option, axis).ravel().tolist(), 1.0)
                self._constrain({**row, width: -1.0}, -np.inf if blocks else 0, 0)
        if blocks:
            self._constrain({**dict.fromkeys(places, 1.0), self._gone(blocks): 1.0}, 1, 1)
        return places

    def solved(self, loss: Mapping[int, float]) -> tuple[Choice, float] | None:
        """Return the best sub-network and the proven gap, or None where none is found that keeps the limits.

        Args:
            loss: the coefficients of what is minimized.
        """
        rows = [*self.constraints, *((row, -np.inf, most) for row, most in self.limits.values())]
        matrix = _matrix([row for row, _, _ in rows], len(self.integer))
        found: OptimizeResult = milp(
            np.array([loss.get(place, 0.0) for place in range(len(self.integer))]), integrality=np.array(self.integer),
            bounds=Bounds(0, np.array(self.upper)),
            constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
            options={"mip_rel_gap": GAP, "time_limit": SECONDS})
        if found.x is None:
            return None
        return self._choice(found.x), float(found.mip_gap or 0.0)

    def _choice(self, solution: Any) -> Choice:
        widths = {name: self.space.options[name][int(np.argmax(solution[places]))] for name, places in self.widths.items()}
        dropped = frozenset(name for name, place in self.dropped.items() if solution[place] > 0.5)
        return self.space.normal(Choice(widths=widths, dropped=dropped))


def _matrix(rows: list[dict[int, float]], columns: int) -> Any:
    """Return rows of coefficients as a sparse matrix."""
    at = [(number, column, value) for number, row in enumerate(rows) for column, value in row.items()]
    numbers, found, values = zip(*at, strict=True)
    return coo_array((values, (numbers, found)), shape=(len(rows), columns)).tocsc()
