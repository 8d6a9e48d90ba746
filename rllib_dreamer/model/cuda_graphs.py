"""A pass over a batch as a CUDA graph: one launch where Python makes thousands."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")
R = TypeVar("R")

WARMUP = 3
"""Calls before the capture: they compile, choose cuDNN's algorithms and make cuBLAS's handles."""


class Recorder(Protocol):
    """How a function is called before it is captured, and how it is captured."""

    def run(self, function: Callable[[], R]) -> R:
        """Calls the function."""

    def capture(self, function: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        """Calls the function; gives its result, and what does its device work into that."""


class CudaRecorder:
    """Captures CUDA graphs, each with its own memory.

    PyTorch's generator of the device takes part: every replay draws other numbers.

    Args:
        device: The device that the functions work on.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # cuBLAS has a workspace for each

    def run(self, function: Callable[[], R]) -> R:
        """Calls the function on the stream of the capture: nodes of autograd remember theirs."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                result = function()
            current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        """Captures a function that has been run; nothing is computed until the graph is replayed.

        Raises:
            RuntimeError: If something in the function cannot be captured. The device is then of no
                more use to this process.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                no_garbage_collection(),
                torch.cuda.device(self._device),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),  # also after an error
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                result = function()
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of the capture fails too
            raise RuntimeError(
                f"this update cannot be a CUDA graph, set cuda_graphs=False: {cause}"
            ) from error
        return result, graph.replay


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collects garbage now and not in this context: an old graph must not go during a capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Captured(Generic[K, R]):
    """A function of a batch, run as it is at first, then captured, and replayed from then on.

    The function must be all device work: it reads nothing back, copies nothing from the host, and
    its result holds no graph of autograd. What it does in Python beside that, it does only while it
    is not replayed, and numbers of Python stay what they were. Tensors of the result are
    overwritten by the next call.

    Args:
        function: Takes a batch, tensors by key.
        recorder: How to capture it.
    """

    def __init__(self, function: Callable[[Mapping[K, Tensor]], R], recorder: Recorder) -> None:
        self._function, self._recorder = function, recorder
        self._warm: list[tuple[int, dict[K, object]]] = []  # thread and form of the calls so far
        self._form: dict[K, object] | None = None  # of the captured batch
        self._batch: dict[K, Tensor]
        self._result: R
        self._replay: Callable[[], None]

    def __call__(self, batch: Mapping[K, Tensor]) -> R:
        """Calls the function; a batch of other shapes or types than the captured one as it is."""
        form: dict[K, object] = {key: (x.shape, x.dtype) for key, x in batch.items()}
        if self._form is None and self._is_warm(form):
            self._batch = {key: x.clone() for key, x in batch.items()}
            self._result, self._replay = self._recorder.capture(lambda: self._function(self._batch))
            self._form = form
        if form != self._form:
            return self._recorder.run(lambda: self._function(batch))
        for key, x in batch.items():
            self._batch[key].copy_(x, non_blocking=True)
        self._replay()
        return self._result

    def _is_warm(self, form: dict[K, object]) -> bool:
        """Whether there were enough calls like this: handles belong to a thread, code to shapes."""
        kind = threading.get_ident(), form
        if self._warm.count(kind) >= WARMUP:
            return True
        self._warm.append(kind)
        return False
