"""Bytes on disk -> `Splits(train, validation, test, card)`. `load(name, ...)` opens a data set; one set (or kind) a file.

A data-set file defines `SETS`, a literal dict from a set's name to a function `(Request) -> Splits`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import loaders.sets
from loaders.arrays import Splits
from loaders.request import Request
from metadata.closest import closest, spelled
from metadata.errors import UserError

def sets() -> dict[str, Callable[[Request], Splits]]:
    """The known data sets by name, from every file in this folder."""
    found: dict[str, Callable[[Request], Splits]] = {}
    for module in pkgutil.iter_modules(loaders.sets.__path__):
        found |= importlib.import_module(f"loaders.sets.{module.name}").SETS
    return found


def set_name(name: str) -> str:
    """The project's own spelling of a data set's name, `CIFAR-10` for `cifar10`; any other name as it is."""
    return spelled(name, sets())


def load(request: Request) -> Splits:
    """Opens a data set.

    Raises:
        UserError: unknown name (with the closest match), missing or malformed files, or fewer or more classes than
            the request expects.
    """
    known = sets()
    if request.name not in known:
        raise UserError(f"data.name {request.name!r}: unknown{closest(request.name, known)} "
                        f"(known: {', '.join(sorted(known))})")
    splits = known[request.name](request)
    if request.num_classes and splits.card.num_classes != request.num_classes:
        raise UserError(f"data.root {request.root}: {splits.card.num_classes} classes, data.num_classes says "
                        f"{request.num_classes}")
    return splits
