"""A pass over a batch as a CUDA graph: one launch where Python makes thousands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")
R = TypeVar("R")

WARMUP = 3
"""Calls before the capture: they compile, choose cuDNN's algorithms and fill caches."""


class Capture(Protocol):
    """Calls a function; gives its result, and what does all its device work again into that."""

    def __call__(self, function: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        """Captures the function; whether this does the work too is left open."""


def capture_on_cuda(function: Callable[[], R]) -> tuple[R, Callable[[], None]]:
    """A `Capture` as a CUDA graph, with its own memory; nothing is computed until it is replayed.

    PyTorch's generator of the device takes part: every replay draws other numbers.

    Raises:
        RuntimeError: If something in the function cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = function()
    except RuntimeError as error:
        raise RuntimeError(
            f"this update cannot be a CUDA graph, leave out cuda_graphs=True: {error}"
        ) from error
    return result, graph.replay


class Captured(Generic[K, R]):
    """A function of a batch, run as it is at first, then captured, and replayed from then on.

    The function must be all device work: it reads nothing back, makes no tensor on the host, and
    its result holds no graph of autograd. What it does in Python beside that is done only while it
    is not replayed. Tensors of its result are overwritten by the next call.

    Args:
        function: Takes a batch, tensors by key.
        capture: How to capture.
    """

    def __init__(
        self, function: Callable[[Mapping[K, Tensor]], R], capture: Capture = capture_on_cuda
    ) -> None:
        self._function, self._capture = function, capture
        self._calls = 0
        self._batch: dict[K, Tensor] = {}
        self._result: R
        self._replay: Callable[[], None]

    def __call__(self, batch: Mapping[K, Tensor]) -> R:
        """Calls the function; a batch of other shapes or types than the captured one as it is."""
        self._calls += 1
        if self._calls <= WARMUP:
            return self._function(batch)
        if not self._batch:
            self._batch = {key: x.clone() for key, x in batch.items()}
            self._result, self._replay = self._capture(lambda: self._function(self._batch))
        if not self._fits(batch):
            return self._function(batch)
        for key, x in batch.items():
            self._batch[key].copy_(x, non_blocking=True)
        self._replay()
        return self._result

    def _fits(self, batch: Mapping[K, Tensor]) -> bool:
        """Whether the batch can take the place of the captured one."""
        return batch.keys() == self._batch.keys() and all(
            x.shape == self._batch[key].shape and x.dtype == self._batch[key].dtype
            for key, x in batch.items()
        )
