"""The exceptions of the command line, and how an error is told in one line."""

from __future__ import annotations

import re

#: The line of a traceback that names the exception.
_EXCEPTION_LINE = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b(: |$)")


class CommandError(Exception):
    """A mistake of the user, told in one line; the command ends with exit code 2."""


class RunFailed(Exception):
    """A run which started and then failed, told in one line; exit code 1."""


def first_line(error: BaseException) -> str:
    """Reduces an exception to one line: its type and text, at the root of a chain of causes.

    Args:
        error: Any exception; a Ray error carries the traceback of another process as text.

    Returns:
        For example "ValueError: unknown size".
    """
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    # Of chained exceptions the first in the text is the one that began it.
    raised = [line for line in lines if _EXCEPTION_LINE.match(line)]
    if raised:
        return raised[0]
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return first_line(cause)
    text = lines[0].strip() if lines else "no message"
    return f"{type(error).__name__}: {text}"
