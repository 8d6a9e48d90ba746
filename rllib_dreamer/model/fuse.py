"""Which form of a small pure function runs: the plain one, a native kernel or a compiled graph."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from rllib_dreamer.model import kernels
from rllib_dreamer.model.kernels_build import find_compiler

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = 32
"""Forms of one function: by rank, type and gradient. PyTorch's 8 are just enough for images."""

_enabled = ContextVar("fusing", default=False)


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a chain of elementwise operations that inside `fusing()` makes one pass over memory.

    On a CPU that is the function of the same name in `kernels`, on CUDA what `torch.compile` makes
    of it, kept on disk for the next run. The decorated function is the definition of both, and runs
    itself outside `fusing()`, for other types (float64) and where nothing can be compiled. The
    first argument, a tensor, decides.
    """
    compiled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        x = args[0]
        assert isinstance(x, Tensor)
        if native(x):
            return getattr(kernels, function.__name__)(*args, **kwargs)
        if not _enabled.get() or x.device.type == "cpu" or not can_compile():
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(compile_or_keep(function, *args, **kwargs))
        return compiled[0](*args, **kwargs)

    return call


def compile_or_keep(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
    """The compiled form of a pure function, or itself where that fails with these arguments."""
    limits = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, RECOMPILE_LIMIT)
    compiled: Callable[P, R] = torch.compile(function, dynamic=True)
    try:
        compiled(*args, **kwargs)
    except Exception as error:  # of the compiler, the linker, the driver: whatever is missing
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        logger.warning(
            "%s cannot be compiled, so updates take longer (%s: %s); often the headers of Python "
            "are missing (Debian: apt-get install python3-dev). compile=False avoids the attempt.",
            *(function.__name__, type(error).__name__, reason.strip()),
        )
        return function
    return compiled


@contextlib.contextmanager
def fusing(enabled: bool) -> Iterator[None]:
    """Within this context, fused functions take their fast form (or not) in this thread."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def native(x: Tensor) -> bool:
    """Whether native kernels are to be used for x, here and now."""
    return _enabled.get() and kernels.accepts(x) and kernels.available()


@functools.cache
def can_compile() -> bool:
    """Whether `torch.compile` can work here: it needs a C compiler and Triton; says once if not."""
    try:
        find_compiler()
    except FileNotFoundError as error:
        logger.warning("Nothing is compiled, %s: install one (Debian: apt-get install gcc).", error)
        return False
    if not has_triton():
        logger.warning(
            "Nothing is compiled, so updates take longer: Triton is not installed, or the GPU is "
            "too old for it (compute capability below 7.0)."
        )
        return False
    return True
