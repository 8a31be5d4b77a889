"""The known data sets: `load(request)` opens one. Each file in `loaders/sets/` holds one data set or format.

A data-set file defines `SETS`, a dict from the name of a data set to a function `(Request) -> Splits`. A format may also
have an entry in `RECOGNIZED`, a function from a path to the reason why it is one, or "".
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import loaders.sets
from loaders.request import Request
from loaders.splits import Splits
from metadata.closest import closest, spelled
from metadata.errors import UserError


ANY_FOLDER = "image_folder"  # the name under which other formats are recognized, too; folders of splits come first
SURE = "tiny_imagenet"  # told by a file that nothing else has


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


def recognized(root: Path) -> tuple[str, str]:
    """Return the data set that a file or folder is read as, and what was taken for what, in a line or none.

    Raises:
        UserError: it could be read as more than one.
    """
    found: dict[str, str] = {}
    for module in pkgutil.iter_modules(loaders.sets.__path__):
        for name, recognize in getattr(importlib.import_module(f"loaders.sets.{module.name}"), "RECOGNIZED", {}).items():
            if reason := recognize(root):
                found[name] = reason
    for name in (SURE, ANY_FOLDER):
        if name in found:
            return name, f"data.root {root}: read as {name}: {found[name]}" if name != ANY_FOLDER else ""
    if len(found) > 1:
        raise UserError(f"data.root {root}: may be read as " + " or as ".join(f"{name} ({reason})" for name, reason in
                        found.items()) + "; pass data.name=" + " or data.name=".join(found))
    if not found:
        return ANY_FOLDER, ""  # which says what is there instead
    (name, reason), = found.items()
    return name, f"data.root {root}: read as {name}: {reason}"


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
    name, said = request.name, ""
    if name == ANY_FOLDER and request.root is not None:
        name, said = recognized(request.root)
    splits = known[name](replace(request, name=name))
    splits.warnings[:0] = [said] if said else []
    if request.num_classes and splits.card.num_classes != request.num_classes:
        raise UserError(f"data.root {request.root}: {splits.card.num_classes} classes, data.num_classes says "
                        f"{request.num_classes}")
    return splits
