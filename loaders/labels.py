"""Labels as people write them, numbers or names, to classes with indices; which split a name stands for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from loaders.listing import SPLITS
from metadata.errors import UserError, some_of

WHOLE = re.compile(r"([+-]?[0-9]{1,18})(\.0{0,18})?")  # 10, or 10.0 as pandas writes a column with gaps
DECIMAL = re.compile(r"[+-]?[0-9]+\.[0-9]*")
MOST_CLASSES = 2**20
WORD = re.compile(r"[A-Za-z]+")


def numbered(labels: Iterable[str | int], where: str) -> list[str]:
    """Return the classes of labels in the order of their indices: numbers by value, names by the alphabet.

    Decimals that are whole, such as 10.0, are numbers; versions such as 1.0 and 1.5 are names.

    Raises:
        UserError: a negative number, names between numbers, or more classes than a network has outputs.
    """
    distinct = set(labels)
    if len(distinct) > MOST_CLASSES:
        raise UserError(f"{where}: {len(distinct):,} different labels, expected at most {MOST_CLASSES:,} classes")
    texts = {str(label) for label in distinct}
    if not all(WHOLE.fullmatch(text) for text in texts):
        numbers = [text for text in texts if WHOLE.fullmatch(text)]
        decimals = all(DECIMAL.fullmatch(text) for text in texts)
        if numbers and not decimals and 2 * len(numbers) > len(texts):
            odd = min(texts - set(numbers))
            raise UserError(f"{where}: the label {odd[:40]!r} is no number, as {len(numbers)} of the {len(texts)} "
                            "different labels are; correct it")
        return sorted(texts)
    ordered = sorted(texts, key=lambda text: (_value(text), text))
    if _value(ordered[0]) < 0:
        raise UserError(f"{where}: the label {ordered[0]} is out of range: expected 0 or more; -1 often marks images "
                        "without a label, which must be left out")
    for one, other in itertools.pairwise(ordered):
        if _value(one) == _value(other):
            raise UserError(f"{where}: the labels {one!r} and {other!r} are one number; write it in one way")
    return ordered


def _value(whole: str) -> int:
    return int(whole.partition(".")[0])


def splits_of(paths: Sequence[Path], root: Path, what: str) -> list[str]:
    """Return the split that each file's name says; all are of train where no name says one.

    Args:
        paths: the files.
        root: where they lie; folders above it say nothing.
        what: a file in one word, for messages.

    Raises:
        UserError: some names say a split and others do not, or none is of the split train.
    """
    found = [split_in(path, root) for path in paths]
    if None in found and len(set(found)) > 1:
        raise UserError(f"{paths[found.index(None)]}: its name says no split (train, validation, test), as others do; "
                        "rename it, or move it away")
    splits = [split or "train" for split in found]
    if "train" not in splits:
        raise UserError(f"data.root {root}: no {what} of the split train (found: "
                        f"{some_of([path.name for path in paths], 5)})")
    return splits


def split_in(path: PurePath, root: Path) -> str | None:
    """Return the split that a file's name or a folder above it names, below a root: `train-00000-of-00001.parquet`."""
    try:
        parts: Sequence[str] = path.relative_to(root).parts
    except ValueError:
        parts = path.parts[-1:]
    for part in reversed(parts):
        for word in WORD.findall(part.partition(".")[0]):
            if word.lower() in SPLITS:
                return SPLITS[word.lower()]
    return None
