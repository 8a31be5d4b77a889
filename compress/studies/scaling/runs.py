"""Read a CSV file of runs, ours or foreign, into points to fit, and report the rows that are left out and why."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compress.studies.scaling.columns import Column, check_counts, find_column, usual_column
from compress.studies.scaling.fitting import Observations, pooled_noise
from metadata.closest import closest
from metadata.errors import UserError

CONFIGURATION = ("width", "depth", "batch_size", "test_freq", "dataset", "lr", "weight_decay", "optimizer")
NumberedRow = tuple[int, dict[str, str]]  # the line number in the file, and the cells by column
MISSING = ("", "-", "na", "n/a", "none", "null")
FINISHED = ("", "done", "ok", "success", "finished", "complete", "completed")
SMALLEST, LARGEST = 1e-40, 1e40  # numbers beyond are no measurements, and their powers and products overflow
CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10, "fashion_mnist": 10, "digits": 10}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One usable row; `line` is its line number in the file."""

    line: int
    n: float
    d: float
    c: float
    loss: float
    configuration: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row that is not fitted, with the numbers that can still be drawn."""

    line: int
    reason: str
    n: float | None = None
    d: float | None = None
    loss: float | None = None


@dataclass(kw_only=True)
class Runs:
    """The rows of a file.

    Attributes:
        path: the file.
        target: "loss", or "error" = 1 - accuracy.
        columns: the column from which each of N, D, C, epochs and the target was read.
        runs: the rows to fit.
        left_out: the other rows, with reasons.
        notes: remarks for the reader, one sentence each.
        classes: the number of classes of the data set, if its column names a known one.
        dataset: the name in the data-set column, or None.
        from_accuracy: whether the target is 1 minus the value in its column.
        depth: the depth that all rows share, or None.
    """

    path: Path
    target: str
    columns: dict[str, str]
    runs: list[Run]
    left_out: list[LeftOut]
    notes: list[str] = field(default_factory=list)
    classes: int | None = None
    dataset: str | None = None
    from_accuracy: bool = False
    depth: int | None = None

    @property
    def passes(self) -> float:
        """The median of C / (N * D): the epochs, if the file has them, or a number such as 6 if C is counted in FLOPs."""
        return statistics.median(run.c / (run.n * run.d) for run in self.runs)

    def compute_rule(self, passes: float) -> str:
        """Return how a budget is spent, in words: `30 epochs`, or `C = 6 N D` if compute has its own column."""
        if "C" in self.columns:
            return f"C = {passes:.3g} N D"
        return f"{passes:.6g} epoch{'s' * (passes != 1)}"

    def observations(self) -> Observations:
        """Return one point for each configuration, in order of appearance."""
        members = self._by_configuration()
        losses = [np.log([run.loss for run in group]) for group in members]
        runs = np.array([float(len(group)) for group in members])
        squares = np.array([float(((own - own.mean())**2).sum()) for own in losses])
        return Observations(values={"N": np.array([group[0].n for group in members]),
                             "D": np.array([group[0].d for group in members]),
                             "C": np.array([group[0].c for group in members])},
                            log_loss=np.array([float(own.mean()) for own in losses]),
                            runs=runs, seed_noise=pooled_noise(squares, runs), squares=squares)

    def _by_configuration(self) -> list[list[Run]]:
        """Return the groups of runs that differ only in the seed, in order of appearance."""
        groups: dict[tuple[str, ...], list[Run]] = {}
        for run in self.runs:
            groups.setdefault(run.configuration, []).append(run)
        return list(groups.values())


def read_runs(path: Path, target: str = "loss", n_column: str | None = None, d_column: str | None = None,
              loss_column: str | None = None, dataset: str | None = None, accuracy_column: str | None = None,
              d_from_compute: bool = False) -> Runs:
    """Read a CSV file with columns for N, D and the loss, under any of the usual names.

    C is N * D * epochs if there are epochs, else the compute column, else N * D. Logarithms of a base that the column's
    name tells are undone, and units such as millions are multiplied out. Rows with a status other than "done" (or
    a synonym), and rows without a positive N, D and loss from SMALLEST to LARGEST, are left out and listed. Repeated rows
    count once.

    Args:
        path: the file.
        target: "loss" or "error" (1 - accuracy, which must be a fraction).
        n_column: the column of N, if its name is unusual.
        d_column: the column of D.
        loss_column: the column of the loss; with target "error", of the error, or of the accuracy if its name has acc.
        dataset: use only the rows of this data set.
        accuracy_column: with target "error", the column of the accuracy, under any name; the error is 1 minus its value.
        d_from_compute: compute D = C / (6 N) from the compute column, in FLOP; D then counts what was seen in all epochs.
            Source: Kaplan et al. 2020, section 2.1.

    Raises:
        UserError: a missing file or column, a column that by its name or values is another quantity, a cell that
            is not a number, accuracies in percent, or several data sets of which none was chosen.
    """
    header, rows = _read(path)
    rows, data_set = _of_one_set(path, header, rows, dataset)
    read = {"N": find_column(path, header, "N", n_column, "--n_column")}
    if d_from_compute and d_column is not None:
        raise UserError("--d_from_compute computes D, so it does not go with --d_column")
    if not d_from_compute:
        read["D"] = find_column(path, header, "D", d_column, "--d_column")
    read[target], from_accuracy = _target_column(path, header, target, loss_column, accuracy_column)
    source = read[target].name
    notes = []
    for optional in ("C",) if d_from_compute else ("epochs", "C"):
        found = usual_column(path, header, optional, f"rename all but one: each may be {optional}")
        if found and all(row[found.name].strip().lower() in MISSING for _, row in rows):
            notes.append(f"column {found.name} is empty, so it is not used")
        elif found:
            read[optional] = found
    if "epochs" in read:
        read.pop("C", None)
    if d_from_compute and "C" not in read:
        raise UserError(f"{path}: --d_from_compute needs a column of training compute in FLOP, such as flops or "
                        f"training_flop (columns: {', '.join(header)})")
    for role in {"N", "D"} & read.keys():
        check_counts(path, read[role], role, [number for line, row in rows if (number := _number(
            path, line, read[role], row, strict=False)) is not None])
    notes += [column.reading for column in read.values() if column.reading]
    columns = {role: column.name for role, column in read.items()}
    if d_from_compute:
        columns["D"] = f"{columns['C']} / (6 {columns['N']})"
    result = Runs(path=path, target=target, columns=columns, runs=[], left_out=[],
                  classes=CLASSES.get((data_set or "").lower()),
                  dataset=data_set.lower() if data_set else None, from_accuracy=from_accuracy,
                  notes=notes)
    if target == "error" and loss_column is not None and not from_accuracy and "err" not in source.lower():
        result.notes.append(f"{source} is taken for an error rate; if it is an accuracy, name it with --accuracy_column")
    by_lower = {name.lower(): name for name in header}
    status, seed = by_lower.get("status"), by_lower.get("seed")
    own = [by_lower[name] for name in CONFIGURATION if name in by_lower]
    depths = {row[by_lower["depth"]].strip() for _, row in rows} if "depth" in by_lower else set()
    if len(depths) == 1 and (only := depths.pop()).isdecimal():
        result.depth = int(only)
    seen: dict[tuple[str, ...], tuple[int, float]] = {}
    repeated: list[str] = []
    for line, row in rows:
        state = row[status].strip().lower() if status else ""
        finished = state in FINISHED
        numbers = {role: _number(path, line, column, row, strict=finished) for role, column in read.items()}
        n, loss = numbers["N"], numbers[target]
        d = _samples(numbers) if d_from_compute else numbers["D"]
        if target == "error" and loss is not None:
            if finished and (loss < 0 or loss > 1):
                what = "accuracy" if from_accuracy else "an error rate"
                advice = "; if these are percentages, divide them by 100" if loss > 1 else ""
                raise UserError(f"{path}, line {line}, column {source}: {what} must be a fraction in [0, 1], got "
                                f"{loss:g}{advice}")
            loss = 1 - loss if from_accuracy else loss
        shown = {"n": _usable(n), "d": _usable(d), "loss": _usable(loss)}
        if not finished:
            result.left_out.append(LeftOut(line=line, reason=state, **shown))
            continue
        needed: dict[str, float | None] = {"N": n, "D": d, target: loss}
        needed |= {role: numbers[role] for role in ("epochs", "C") if role in numbers}
        bad = next((f"{role} is {_spelled(value)}" for role, value in needed.items() if _usable(value) is None), None)
        if bad:
            result.left_out.append(LeftOut(line=line, reason=bad, **shown))
            continue
        assert n is not None and d is not None and loss is not None
        epochs = numbers.get("epochs")
        compute = n * d * epochs if epochs is not None else numbers.get("C", n * d)
        assert compute is not None
        if _usable(compute) is None:
            result.left_out.append(LeftOut(line=line, reason=f"N * D * epochs is {_spelled(compute)}", **shown))
            continue
        configuration = (f"{n:.12g}", f"{d:.12g}", f"{compute:.12g}", *(row[name].strip() for name in own))
        # A seed distinguishes repetitions from copies; without a seed, only rows that are equal in every cell are copies.
        key = (*configuration, row[seed].strip()) if seed else tuple(row.values())
        if key in seen:
            first, loss_there = seen[key]
            differs = "" if math.isclose(loss, loss_there, rel_tol=1e-9) else f", where the {target} is another"
            repeated.append(f"{line} (as {first}{differs})")
            result.left_out.append(LeftOut(line=line, reason=f"repeats line {first}{differs}", **shown))
            continue
        seen[key] = (line, loss)
        result.runs.append(Run(line=line, n=n, d=d, c=compute, loss=loss, configuration=configuration))
    if not result.runs:
        reasons = "; ".join(f"line {row.line}: {row.reason}" for row in result.left_out[:3])
        raise UserError(f"{path}: none of its {len(rows)} rows can be fitted ({reasons}"
                        f"{'; ...' if len(result.left_out) > 3 else ''})")
    _note(result, repeated)
    return result


def _of_one_set(path: Path, header: list[str], rows: list[NumberedRow],
                wanted: str | None) -> tuple[list[NumberedRow], str | None]:
    """Return the rows of one data set and its name, or all rows and None if the file has no such column."""
    column = next((name for name in header if name.lower() == "dataset"), None)
    if column is None:
        if wanted is not None:
            raise UserError(f"{path}: --dataset {wanted}: there is no column 'dataset' (columns: {', '.join(header)})")
        return rows, None
    present = sorted({row[column].strip() for _, row in rows})
    if wanted is None and len(present) > 1:
        raise UserError(f"{path}: rows of several data sets ({', '.join(present)}), which follow no common law; choose one "
                        f"with --dataset {next(name for name in present if name)}")
    chosen = present[0] if wanted is None else wanted
    if chosen not in present:
        raise UserError(f"{path}: --dataset {wanted}: no such rows{closest(chosen, present)} (there: {', '.join(present)})")
    return [(line, row) for line, row in rows if row[column].strip() == chosen], chosen


def _note(result: Runs, repeated: list[str]) -> None:
    if repeated:
        result.notes.append(f"repeated rows are counted once: line{'s' * (len(repeated) > 1)} {', '.join(repeated)}")
    others = [row for row in result.left_out if not row.reason.startswith("repeats line")]
    by_reason: dict[str, list[str]] = {}
    for row in others:
        by_reason.setdefault(row.reason, []).append(str(row.line))
    for reason, lines in by_reason.items():
        result.notes.append(f"left out of the fits, {reason}: line{'s' * (len(lines) > 1)} {', '.join(lines)}")
    pairs: dict[tuple[float, float], set[float]] = {}
    for run in result.runs:
        pairs.setdefault((run.n, run.d), set()).add(run.c)
    if mixed := sum(len(compute) > 1 for compute in pairs.values()):
        result.notes.append(f"{mixed} pairs of N and D were trained with several amounts of compute, which the forms do "
                            "not see: they count as separate points")


def _read(path: Path) -> tuple[list[str], list[NumberedRow]]:
    """Return the header and the rows with their line numbers; `;` and tab also work as delimiters."""
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{path}: {what}; expected a CSV with columns for N, D and the loss")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8, so no CSV (byte {error.start})") from error
    first = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in (",", ";", "\t") if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] = []
    rows = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise UserError(f"{path}: the column {twice!r} is there twice; rename one")
                continue
            if len(cells) != len(header):
                raise UserError(f"{path}, line {reader.line_num}: expected {len(header)} cells, as in the header, got "
                                f"{len(cells)}")
            rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
    if not header:
        raise UserError(f"{path}: it is empty; expected a CSV with columns for N, D and the loss")
    if not rows:
        raise UserError(f"{path}: it has a header and no rows")
    return header, rows


def _target_column(path: Path, header: list[str], target: str, named: str | None, accuracy: str | None
                   ) -> tuple[Column, bool]:
    """Return the column of the target, and whether the target is 1 minus its value."""
    if accuracy is not None:
        if target != "error" or named is not None:
            raise UserError(f"--accuracy_column {accuracy}: goes with --target error and without --loss_column")
        return find_column(path, header, "accuracy", accuracy, "--accuracy_column"), True
    if target == "error" and named is None:
        if found := usual_column(path, header, "accuracy", "choose one with --accuracy_column"):
            return found, True
        if found := usual_column(path, header, "error", "choose one with --loss_column"):
            return found, False
        flags = "--accuracy_column, or that of the error rate with --loss_column"
        return find_column(path, header, "accuracy", None, flags), True  # raises UserError: there is no such column
    column = find_column(path, header, target, named, "--loss_column")
    return column, target == "error" and "acc" in column.name.lower()


def _number(path: Path, line: int, column: Column, row: dict[str, str], strict: bool) -> float | None:
    """Return a cell's number in plain units; None for an empty cell or n/a, and, unless strict, for any other text."""
    text = row[column.name].strip().replace("_", "")
    if text.lower() in MISSING:
        return None
    try:
        return column.value(float(text))
    except ValueError as error:
        if not strict:
            return None
        raise UserError(f"{path}, line {line}, column {column.name}: expected a number, got {row[column.name].strip()!r}"
                        ) from error


def _samples(numbers: dict[str, float | None]) -> float | None:
    """Return D = C / (6 N), or None where one of the two is not a positive number."""
    n, compute = _usable(numbers["N"]), _usable(numbers["C"])
    return None if n is None or compute is None else compute / (6 * n)


def _usable(value: float | None) -> float | None:
    return value if value is not None and SMALLEST <= value <= LARGEST else None


def _spelled(value: float | None) -> str:
    if value is None:
        return "missing"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if value > 0:
        return f"beyond {LARGEST:g}" if value > LARGEST else f"below {SMALLEST:g}"
    return "zero" if value == 0 else "negative"
