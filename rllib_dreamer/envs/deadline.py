"""Ends a call that does not return, so that an env that hangs can be named and replaced."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, NoReturn


class DeadlineExpired(TimeoutError):
    """A call took longer than its `Deadline` allows; no other code raises it."""


def _expired(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise DeadlineExpired("no answer in time")


class Deadline:
    """A context in which a call that takes too long raises DeadlineExpired.

    It works by the process's alarm signal, so it ends whatever Python waits for (a socket, a lock,
    a loop), but compiled code only once that returns. Outside of the main thread, and where the
    program uses the alarm itself, it does nothing.

    Args:
        seconds: How long the call may take, > 0; None for any time.
    """

    def __init__(self, seconds: float | None) -> None:
        """See the class."""
        self.seconds = seconds
        self._armed = False

    def __enter__(self) -> None:
        """Starts the clock."""
        if self.seconds is not None and _alarm_is_free():
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: Any) -> None:
        """Stops the clock."""
        if self._armed:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def _alarm_is_free() -> bool:
    """Whether the alarm can be set here; makes it ours if it is nobody's."""
    if threading.current_thread() is not threading.main_thread():
        return False
    handler = signal.getsignal(signal.SIGALRM)
    if handler is signal.SIG_DFL:
        signal.signal(signal.SIGALRM, _expired)
    return handler in (signal.SIG_DFL, _expired)
