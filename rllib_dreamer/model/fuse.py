"""Compiling small pure functions: what is fused, and when."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)

_enabled = False


def fused(dynamic: bool | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a function that is compiled inside `fusing()` and runs as it stands elsewhere.

    Compiling a chain of elementwise operations makes one pass over memory out of many. Functions
    are compiled on their first call, and PyTorch keeps the result on disk for the next run.

    Args:
        dynamic: True compiles once for all shapes, for functions called with many; None lets
            PyTorch decide.
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        compiled: list[Callable[P, R]] = []

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _enabled:
                return function(*args, **kwargs)
            if not compiled:
                compiled.append(torch.compile(function, dynamic=dynamic))
            return compiled[0](*args, **kwargs)

        return call

    return mark


@contextlib.contextmanager
def fusing(enabled: bool) -> Iterator[None]:
    """Within this context, fused functions are compiled (or not)."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether this machine can compile for the device; says once if it cannot."""
    if device_type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        logger.warning(
            "No C++ compiler was found, so nothing is compiled and updates take about twice as "
            "long: install g++ (Debian: apt-get install g++)."
        )
        return False
    return True


def compile_counters() -> dict[str, Any]:
    """How many graphs were compiled so far, for tests that nothing is traced again."""
    return dict(torch._dynamo.utils.counters["stats"])
