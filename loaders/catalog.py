"""The known data sets: `load(request)` opens one. Each file in `loaders/sets/` holds one data set or format.

A data-set file defines `SETS`, a dict from the name of a data set to a function `(Request) -> Splits`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import loaders.sets
from loaders.request import Request
from loaders.splits import Splits
from metadata.closest import closest, spelled
from metadata.errors import UserError


def sets() -> dict[str, Callable[[Request], Splits]]:
    """Return the known data sets by name, from every file in `loaders/sets/`."""
    found: dict[str, Callable[[Request], Splits]] = {}
    for module in pkgutil.iter_modules(loaders.sets.__path__):
        found |= importlib.import_module(f"loaders.sets.{module.name}").SETS
    return found


def set_module(name: str) -> str:
    """Return the module in `loaders/sets/` that holds a known data set."""
    modules = [f"loaders.sets.{module.name}" for module in pkgutil.iter_modules(loaders.sets.__path__)]
    return next(module for module in modules if name in importlib.import_module(module).SETS)


def set_name(name: str) -> str:
    """Return the canonical spelling of a data set's name, such as `cifar10` for `CIFAR-10`; other names are kept."""
    return spelled(name, sets())


def load(request: Request) -> Splits:
    """Open a data set.

    Raises:
        UserError: an unknown name (with the closest match), missing or malformed files, or a number of classes other
            than that of the request.
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
