"""The project's import graph, read from the source files: what a module needs, and in which order modules can be joined."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ImportCycleError(Exception):
    """Modules import each other."""


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """Return the file of a module or package below `root`, or None for a module that lies elsewhere."""
    path = root.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def import_target(module: str, node: ast.ImportFrom, root: Path = ROOT) -> str:
    """Return the absolute name that a `from ... import` statement in a module names, relative imports resolved."""
    file = module_file(module, root)
    package = module if file and file.name == "__init__.py" else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


@functools.cache
def imported_modules(module: str, root: Path = ROOT) -> tuple[str, ...]:
    """Return the modules below `root` that a module imports, inside functions too, in the order of its statements.

    The `__init__` of a package counts only where a name is imported from it.
    """
    file = module_file(module, root)
    assert file is not None, module
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name: None for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            target = import_target(module, node, root)
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                found[inner if module_file(inner, root) else target] = None
    return tuple(name for name in found if module_file(name, root))


def import_closure(start: str, root: Path = ROOT) -> list[str]:
    """Return a module and every module below `root` that it imports, directly or not."""
    found, waiting = {start: None}, [start]
    while waiting:
        names = [name for name in imported_modules(waiting.pop(0), root) if name not in found]
        found |= dict.fromkeys(names)
        waiting += names
    return list(found)


def import_order(start: str, root: Path = ROOT) -> list[str]:
    """Return the modules of `import_closure`, each behind those that it imports.

    Raises:
        ImportCycleError: modules import each other; the text names them.
    """
    graph = {name: imported_modules(name, root) for name in import_closure(start, root)}
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise ImportCycleError(f"modules import each other: {' -> '.join(error.args[1])}") from error
