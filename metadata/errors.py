"""Errors that are reported in one line, and their exit codes."""

from __future__ import annotations

from pydantic import ValidationError


class UserError(Exception):
    """A mistake of the caller, in one line: expected, got, where, what to do. Command lines exit 2."""

    exit_code = 2


class VerificationError(UserError):
    """A claim that does not hold, such as weights that contradict their architecture. Command lines exit 1."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, printable, for messages that must fit on one line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(character if character.isprintable() else "?" for character in line)


def describe_validation_error(error: ValidationError) -> str:
    """Return one line for the first problem that pydantic found: where, what was expected, what was given."""
    first = error.errors()[0]
    where, got = ".".join(str(part) for part in first["loc"]), repr(first.get("input"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")  # pydantic's word for what our own validators say
    if first["type"] == "value_error" and not where:
        return message + more  # the whole document was looked at: showing it would not help
    return f"{where or 'the document'}: {message}, got {got if len(got) <= 60 else got[:57] + '...'}{more}"
