"""Errors that are told in one line, and the exit codes that go with them."""

from __future__ import annotations


from pydantic import ValidationError


class UserError(Exception):
    """A mistake of the caller, told in one line: expected, got, where, what to do. Command lines exit 2."""

    exit_code = 2


class VerificationError(UserError):
    """A claim that does not hold, such as weights that contradict their architecture. Command lines exit 1."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an error's text, printable, for messages that must fit on one line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(character if character.isprintable() else "?" for character in line)


def describe_validation_error(error: ValidationError) -> str:
    """One line for the first problem that pydantic found: where, what was expected, what came."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the document"
    got = repr(first.get("input"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}, got {got if len(got) <= 60 else got[:57] + '...'}{more}"
