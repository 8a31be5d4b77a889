"""Errors that are reported in one line, and their exit codes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError


class UserError(Exception):
    """A mistake of the caller, in one line: expected, got, where, what to do. Command lines exit 2."""

    exit_code = 2


class VerificationError(UserError):
    """A claim that does not hold, such as weights that contradict their architecture. Command lines exit 1."""

    exit_code = 1


@contextlib.contextmanager
def enough_memory(path: Path) -> Iterator[None]:
    """Raise VerificationError where what is done with a file or folder needs more memory than there is."""
    try:
        yield
    except MemoryError as error:
        raise VerificationError(f"{path}: loading it takes more memory than there is, several times the size of its "
                                "files") from error


# What libraries say where a file could run code: advice to let it.
_UNSAFE_ADVICE = re.compile(r"weights_only|^Weights only load failed|safe_globals|allow_pickle|trust_remote_code|"
                            r"trust(ed)? (the|this) |pickle\.load", re.IGNORECASE)
_UNSAFE_OBJECT = re.compile(r"\bGLOBAL (\S+) (?:was not an allowed|whose module)")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, printable, for messages that must fit on one line.

    A library's advice to open a file unsafely is left out.
    """
    lines = str(error).strip().splitlines()
    if any(_UNSAFE_ADVICE.search(line) for line in lines):
        if found := _UNSAFE_OBJECT.search(str(error)):
            return f"it holds an object of the kind {found[1]}, which is no data"
        lines = [line.strip() for line in lines if line.strip() and not _UNSAFE_ADVICE.search(line)]
    return printable((lines or [type(error).__name__])[0])


def printable(value: object, length: int | None = None) -> str:
    """Return a text of somebody else in one line that a terminal can show: no control characters, no half of a pair.

    Args:
        value: the text, or what is to be shown as one.
        length: cut the text there.
    """
    return "".join(character if character.isprintable() else "?" for character in str(value))[:length]


def some_of(texts: Sequence[str], most: int = 4, separator: str = ", ") -> str:
    """Return the first texts in one line, with dots for the others."""
    return separator.join([*texts[:most], *["..."] * (len(texts) > most)])


def describe_validation_error(error: ValidationError) -> str:
    """Return one line for the first problem that pydantic found: where, what was expected, what was given."""
    first = error.errors()[0]
    where, got = ".".join(str(part) for part in first["loc"]), repr(first.get("input"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")  # pydantic's word for what our own validators say
    if first["type"] == "value_error" and not where:
        return message + more  # the whole document was looked at: showing it would not help
    return f"{where or 'the document'}: {message}, got {got if len(got) <= 60 else got[:57] + '...'}{more}"
