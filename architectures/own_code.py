"""`file:my_net.py:MyNet`: a model that a user's own file defines. The file runs, because the user named it.

Whatever goes wrong in it is told in one line with the file and the line, as the user's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from metadata.closest import closest
from metadata.errors import UserError, first_line

PREFIX = "file:"
FOLDERS: set[Path] = set()  # of the files that were imported
NOT_OPTIONS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def own_file(name: str) -> tuple[Path, str]:
    """Return the file and the name in it that `file:FILE:NAME` means.

    Raises:
        UserError: another form, or there is no such file.
    """
    file, _, wanted = name.removeprefix(PREFIX).rpartition(":")
    if not file or not wanted.isidentifier():
        raise UserError(f"model {name}: expected file:FILE:CLASS, such as file:my_net.py:MyNet")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"model {name}: there is no file {path}")
    if path.suffix != ".py":
        raise UserError(f"model {name}: expected a Python file (.py), got {path.name}")
    return path, wanted


def make_own(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """Build a model of a user's file. It gets `num_classes` where it takes that, and the options.

    Args:
        name: `file:FILE:NAME`; NAME is a class, or a function that returns a module.
        num_classes: width of the head.
        options: arguments of the class.

    Raises:
        UserError: the file, the class or an argument is missing, the file's own code fails, or the result is no module.
    """
    builder = _builder(name)
    taken = own_parameters(name)
    given = {"num_classes": num_classes, **options} if taken is None or "num_classes" in taken else dict(options)
    for option in given:
        if taken is not None and option not in taken:
            raise UserError(f"model {name}: it takes no option {option!r}{closest(option, taken)} "
                            f"(options: {', '.join(taken) or 'none'})")
    missing = [key for key, parameter in _signature(builder).items()
               if parameter.default is parameter.empty and parameter.kind not in NOT_OPTIONS and key not in given]
    if missing:
        raise UserError(f"model {name}: it needs the argument {missing[0]!r}; give options such as {{{missing[0]}: ...}}")
    with theirs(name), torch.device("cpu"):
        module = builder(**given)
    if not isinstance(module, nn.Module):
        raise UserError(f"model {name}: expected a torch.nn.Module, got {type(module).__name__}")
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise UserError(f"model {name}: it has lazy layers, whose sizes the first images decide; state their sizes")
    return module


def own_parameters(name: str) -> list[str] | None:
    """Return the names of the arguments that a user's class takes; None where it takes any."""
    builder = _builder(name)
    if inspect.isclass(builder) and builder.__init__ is nn.Module.__init__:
        return []  # torch's own takes anything, to refuse it
    parameters = _signature(builder)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return [key for key, parameter in parameters.items() if parameter.kind not in NOT_OPTIONS]


@contextmanager
def theirs(name: str) -> Iterator[None]:
    """Turn whatever a user's code raises into one line with its file and line.

    Raises:
        UserError: the code raised something, or ended the program.
    """
    path, _ = own_file(name)
    try:
        yield
    except UserError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's own code raises
        raise UserError(f"model {name}: {own_place(error) or path.name}: {_what(error)}") from error


def _what(error: BaseException) -> str:
    """Return what a user's code raised, in one line."""
    if isinstance(error, SystemExit):
        return "the file ends the program; guard what it runs with if __name__ == '__main__'"
    return f"{type(error).__name__}: {first_line(error)}"


def own_place(error: BaseException) -> str:
    """Return the innermost place in a user's file or its neighbours where an error was raised, "" if it was elsewhere."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = Path(frame.f_code.co_filename)
        if file.parent in FOLDERS:
            return f"{file.name}, line {number}"
    return ""


def own_error(error: BaseException) -> str:
    """Return what a user's code raised, in one line with its place; "" if something else raised it."""
    place = own_place(error)
    return f"{place}: {_what(error)}" if place else ""


def _builder(name: str) -> Callable[..., Any]:
    """Return the class or function of a user's file, which is imported once for each content."""
    path, wanted = own_file(name)
    module = _imported(name, path.resolve(), hashlib.sha256(path.read_bytes()).hexdigest())
    found = getattr(module, wanted, None)
    if found is None:
        names = [key for key, value in vars(module).items()
                 if inspect.isclass(value) and value.__module__ == module.__name__]
        raise UserError(f"model {name}: {path.name} has no {wanted}{closest(wanted, names)}"
                        + (f" (it has {', '.join(names)})" if names else ""))
    if isinstance(found, nn.Module):
        raise UserError(f"model {name}: {wanted} is a module already; name its class, or a function that returns one")
    if not callable(found) or (inspect.isclass(found) and not issubclass(found, nn.Module)):
        raise UserError(f"model {name}: {wanted} is no torch.nn.Module and no function that returns one")
    builder: Callable[..., Any] = found
    return builder


@functools.cache
def _imported(name: str, path: Path, content: str) -> Any:
    """Import a file under a name of its own, so that no module of the project or of a package is replaced."""
    called = f"own_{path.stem}_{content[:12]}"
    spec = importlib.util.spec_from_file_location(called, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module  # dataclasses and torch.fx look their module up
    _forget_neighbours(path.parent)
    FOLDERS.add(path.parent)
    sys.path.insert(0, str(path.parent))  # the file's neighbours, as where Python runs a file
    try:
        with theirs(name), torch.device("cpu"):
            spec.loader.exec_module(module)
    except UserError:
        del sys.modules[called]
        raise
    finally:
        if str(path.parent) in sys.path:
            sys.path.remove(str(path.parent))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for imports inside functions
    return module


def _forget_neighbours(folder: Path) -> None:
    """Forget modules of other folders that have the name of a file in this one: each file gets its own neighbours."""
    for called, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or called.startswith("own_") or Path(file).parent not in FOLDERS - {folder}:
            continue
        if (folder / Path(file).name).is_file():
            del sys.modules[called]


def _signature(builder: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(builder).parameters)
    except (TypeError, ValueError):  # a class of C code says nothing
        return {}
