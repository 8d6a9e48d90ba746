"""The exceptions of the command line, and how an error is told in one line."""

from __future__ import annotations

import re

#: The line of a traceback that names the exception.
_EXCEPTION_LINE = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b(: .*|\s*)$", re.M)
#: What a traceback has between an exception and the one that was raised `from` it.
_EXPLAINED = "The above exception was the direct cause of the following exception:"


class CommandError(Exception):
    """A mistake of the user, told in one line; the command ends with exit code 2."""


class RunFailed(Exception):
    """A run which started and then failed, told in one line; exit code 1."""


def first_line(error: BaseException) -> str:
    """Reduces an exception to one line: its type and text, of a chain those that say most.

    An exception raised `from` another explains it, so it is taken, if it has a text; one that was
    raised while another was being handled hides it, so the other is.

    Args:
        error: Any exception; a Ray error carries the traceback of another process as text.

    Returns:
        For example "ValueError: unknown size".
    """
    chain = [_EXCEPTION_LINE.search(part) for part in str(error).split(_EXPLAINED)]
    raised = [match[0].rstrip() for match in reversed(chain) if match]
    if raised:
        return next((line for line in raised if ": " in line), raised[0])
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return first_line(cause)
    text = next(filter(None, map(str.strip, str(error).splitlines())), "no message")
    return f"{type(error).__name__}: {text}"
