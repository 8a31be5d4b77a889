"""Tell what a column of a CSV file of runs holds, by its name: the quantity, its unit, and whether it is a logarithm."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metadata.closest import closest
from metadata.errors import UserError

ALIASES = {
    "N": ("n", "params", "parameters", "n_params", "num_params", "n_parameters", "num_parameters", "model_size"),
    "D": ("d", "data", "tokens", "n_tokens", "num_tokens", "dataset_size", "data_size", "training_tokens", "examples",
          "samples", "n_samples"),
    "C": ("c", "c_proxy", "compute", "flop", "flops", "total_flop", "total_flops", "training_flop", "training_flops"),
    "epochs": ("epochs", "num_epochs", "n_epochs"),
    "loss": ("final_test_loss_avg_last5", "test_loss", "val_loss", "validation_loss", "final_loss", "loss"),
    "error": ("test_error", "error", "val_error", "error_rate"),
    "accuracy": ("final_test_acc_avg_last5", "test_acc", "test_accuracy", "val_acc", "val_accuracy", "acc", "accuracy"),
}
ANOTHER = "another quantity"
# Parts of a name that tell the quantity where the whole name is none of the above.
PARTS = {
    "N": ("param", "weights"), "D": ("token", "example", "sample", "image"), "C": ("flop", "compute", "pfdays"),
    "epochs": ("epoch",), "loss": ("loss",), "accuracy": ("acc",), "error": ("error",),
    ANOTHER: ("per", "flops/s", "flop/s", "step", "batch", "seed", "second", "hour", "time", "macs", "width", "depth",
              "layer", "heads", "perplexity", "std", "id", "name")}
HELD_OUT = {"val", "valid", "validation", "test", "eval"}  # a number of such samples is not D
MEANINGS = {"N": "the number of parameters", "D": "the number of training samples or tokens", "C": "training compute"}
POWERS = {"thousand": 1e3, "thousands": 1e3, "k": 1e3, "million": 1e6, "millions": 1e6, "m": 1e6, "billion": 1e9,
          "billions": 1e9, "b": 1e9, "bn": 1e9, "trillion": 1e12, "trillions": 1e12, "t": 1e12}
PREFIXES = {"k": 1e3, "kilo": 1e3, "m": 1e6, "mega": 1e6, "g": 1e9, "giga": 1e9, "t": 1e12, "tera": 1e12, "p": 1e15,
            "peta": 1e15, "e": 1e18, "exa": 1e18, "z": 1e21, "zetta": 1e21, "y": 1e24, "yotta": 1e24}
PETAFLOP_DAY = 1e15 * 24 * 3600
BASES = {"log10": 10.0, "log2": 2.0, "ln": math.e, "log": None, "lg": None}  # the last two mean several things
COUNTS_FROM = 50  # smaller numbers that are not whole are no counts of parameters or samples


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its name, and how its numbers become the quantity in plain units.

    Args:
        name: in the file.
        quantity: a key of `ALIASES`, `ANOTHER`, or None where the name does not tell.
        core: the name in small letters and digits, without the unit and the word for the logarithm.
        exact: whether the core is a usual name of the quantity.
        logarithm: "log10", "log2", "ln", or "log" and "lg", whose base the name does not tell; None for plain numbers.
        scale: what one unit of the column stands for, such as 1e6 for `params_millions`.
    """

    name: str
    quantity: str | None
    core: str
    exact: bool
    logarithm: str | None
    scale: float

    def value(self, number: float) -> float:
        """Return a number of the column in plain units, infinite where that is beyond a float."""
        if self.logarithm is None:
            return number * self.scale
        base = BASES[self.logarithm]
        assert base is not None, "`checked` has refused the column"
        try:
            return float(base ** number) * self.scale
        except OverflowError:
            return math.inf

    @property
    def reading(self) -> str | None:
        """How the numbers are converted, as a note for the reader; None where they are taken as they stand."""
        if self.quantity == "loss" and self.name.lower().startswith("log"):
            return (f"{self.name} is taken as the loss itself; if it is a logarithm, name it log10_loss, ln_loss or "
                    "log2_loss")
        if self.logarithm is None:
            return None if self.scale == 1 else f"the numbers of {self.name} are taken times {self.scale:g}"
        times = "" if self.scale == 1 else f", times {self.scale:g}"
        base = "e" if self.logarithm == "ln" else f"{BASES[self.logarithm]:g}"
        return f"{self.name} holds logarithms: its numbers are taken as powers of {base}{times}"

    def checked(self, path: Path, role: str, flag: str) -> Column:
        """Return the column itself.

        Raises:
            UserError: by its name, the column holds another quantity than the role's, or a logarithm of unknown base.
        """
        wrong = self.quantity not in (role, None)
        if role in ("loss", "error", "accuracy"):  # each may be computed from another of them
            wrong = self.quantity in ("N", "D", "C", "epochs") or "perplexity" in self.name.lower()
        if wrong:
            way = "--d_from_compute computes D = C / (6 N)" if (role, self.quantity) == ("D", "C") else "rename it if not"
            raise UserError(f"{path}: {flag} {self.name!r}: by its name this column holds "
                            f"{MEANINGS.get(str(self.quantity), self.quantity)}, not {MEANINGS.get(role, role)}; {way}")
        if self.logarithm and BASES[self.logarithm] is None:
            plain, _ = _without_logarithm(self.name)
            raise UserError(f"{path}: column {self.name!r} holds logarithms, and its name does not tell their base; "
                            f"rename it to log10_{plain}, ln_{plain} or log2_{plain}")
        return self


def read_name(name: str) -> Column:
    """Return what the name of a column says."""
    rest, logarithm = _without_logarithm(name.strip())
    lowered = rest.lower()
    scale, core = _without_unit(lowered)
    core = _plain(core)
    quantity = next((role for role, names in ALIASES.items() if core in map(_plain, names)), None)
    exact = quantity is not None
    if not exact:
        words = set(re.split(r"[^a-z]+", lowered))
        told = {role for role, parts in PARTS.items() for part in parts
                if (part in words if len(part) < 4 else part in lowered)}
        told |= {ANOTHER} if told & {"N", "D"} and words & HELD_OUT else set()
        quantity = next((role for role in (ANOTHER, "C") if role in told), told.pop() if len(told) == 1 else None)
        scale = scale if quantity else 1.0
    if logarithm in ("log", "lg") and quantity in ("loss", None):  # "log loss" is a name of the cross-entropy
        logarithm = None
    return Column(name=name, quantity=quantity, core=core, exact=exact, logarithm=logarithm, scale=scale)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _without_logarithm(name: str) -> tuple[str, str | None]:
    """Return `params` and "log10" of `log10_params`, `log10(params)` or `params (log10)`."""
    before = re.fullmatch(r"(log10|log2|ln|log|lg)(?:\s*\((.+)\)|[\s_-]+(.+))", name, re.IGNORECASE)
    if before:
        return before[2] or before[3], before[1].lower()
    behind = re.fullmatch(r"(.+?)[\s_(-]+(log10|log2|ln|log|lg)\)?", name, re.IGNORECASE)
    return (behind[1], behind[2].lower()) if behind else (name, None)


def _without_unit(name: str) -> tuple[float, str]:
    """Return 1e6 and `params` of `params_millions`, 1e15 and `flops` of `pflops`, or 1 and the name itself."""
    if re.search(r"(pf|petaflops?|pflops?)([/_ -]?s)?[_ -]?days?", name):
        return PETAFLOP_DAY, "flops"
    prefixed = re.fullmatch(rf"(.*[^a-z]|)({'|'.join(PREFIXES)})(flops?)", name)
    if prefixed:
        return PREFIXES[prefixed[2]], prefixed[1] + prefixed[3]
    unit = re.fullmatch(rf"(.+?)(?:[\s_-]+in)?[\s_([-]+({'|'.join(POWERS)})[)\]]?", name)
    short = re.fullmatch(r"(.*[^a-z]|)([kmgbt])(params?|parameters?|tokens?)", name)  # mparams, gtokens
    if short:
        return {**POWERS, "g": 1e9}[short[2]], short[1] + short[3]
    return (POWERS[unit[2]], unit[1]) if unit else (1.0, name)


def usual_column(path: Path, header: Sequence[str], role: str, advice: str) -> Column | None:
    """Return the column of a role, by the first of its usual names that the file has.

    Raises:
        UserError: several columns are meant, or the column holds logarithms of unknown base.
    """
    usual = [column for column in map(read_name, header) if column.exact and column.quantity == role]
    for alias in ALIASES[role]:
        alike = [column for column in usual if column.core == _plain(alias)]
        alike = [column for column in alike if column.logarithm is None and column.scale == 1] or alike
        if alike:
            names = [column.name for column in alike]
            if len(names) > 1 and alias not in names and role not in names:
                raise UserError(f"{path}: the columns {' and '.join(names)} differ in case alone, or in their unit; "
                                f"{advice}")
            chosen = next(name for name in (role, alias, *names) if name in names)
            return alike[names.index(chosen)].checked(path, role, "column")
    return None


def find_column(path: Path, header: Sequence[str], role: str, named: str | None, flag: str) -> Column:
    """Return the column that the flag names, or else the one with a usual name of the role.

    Raises:
        UserError: there is no such column (a column is offered only if its name does not tell another quantity), or the
            column holds another quantity, or logarithms of unknown base.
    """
    if named is not None:
        if alike := [column for column in header if column.lower() == named.lower()]:
            if len(alike) > 1 and named not in alike:
                raise UserError(f"{path}: the columns {' and '.join(alike)} differ in case alone; spell {flag} as the "
                                "column is")
            return read_name(named if named in alike else alike[0]).checked(path, role, flag)
        raise UserError(f"{path}: {flag} {named!r} is not in it{closest(named, header)} (columns: {', '.join(header)})")
    if found := usual_column(path, header, role, f"choose one with {flag}"):
        return found
    offered = [name for name in header if read_name(name).quantity in (role, None) and name.lower() != "dataset"]
    near = next((match for alias in (role, *ALIASES[role]) if len(alias) > 2 and (match := closest(alias, offered))), "")
    compute = usual_column(path, header, "C", "rename all but one") if role == "D" else None
    other = f", or compute D = C / (6 N) from {compute.name!r} with --d_from_compute" if compute else ""
    raise UserError(f"{path}: no column for {role}{near} (columns: {', '.join(header)}); name it with {flag}{other}")


def check_counts(path: Path, column: Column, role: str, numbers: Sequence[float]) -> None:
    """Refuse numbers that cannot be counts of parameters or samples: logarithms, or millions, without a word of it.

    Raises:
        UserError: no number is as large as `COUNTS_FROM`, and some are not whole.
    """
    if column.logarithm is None and column.scale == 1 and numbers and max(numbers) <= COUNTS_FROM and any(
            number != round(number) for number in numbers):
        raise UserError(f"{path}: column {column.name!r}: expected {MEANINGS[role]}, got {min(numbers):g} to "
                        f"{max(numbers):g}, which are no counts; rename the column to log10_{role} if they are logarithms, "
                        f"to {role}_millions or {role}_billions if that is their unit")
