"""Prepares the next batch in a thread while the learner works on the present one."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from rllib_dreamer.replay import Replay


class Prefetcher:
    """Samples batches ahead of time; only their latents are fetched at the moment of use.

    Latents that an update has written back are always seen by the batch handed over next. A batch
    sampled ahead may miss the steps added since, depending on how fast the thread was, and a
    checkpoint does not hold it. With `depth=0` nothing is sampled ahead: batches depend on the seed
    alone, and a restored replay goes on with the very batches it would have given.
    """

    def __init__(self, replay: Replay, depth: int = 1) -> None:
        """Starts without sampling anything.

        Args:
            replay: Where batches come from.
            depth: Batches prepared ahead; 0 samples when asked, without a thread.

        Raises:
            ValueError: `depth` is negative.
        """
        if depth < 0:
            raise ValueError(
                f"replay prefetch depth is {depth}, allowed is >= 0: choose 0 for repeatable "
                "batches across restarts, 1 for speed"
            )
        self._replay = replay
        self._depth = depth
        self._pending: deque[Future[dict[str, np.ndarray]]] = deque()
        self._executor: ThreadPoolExecutor | None = None

    def next(self) -> dict[str, np.ndarray]:
        """Returns a batch as `Replay.sample` does, its latents up to date.

        Raises:
            ValueError: The replay holds too little, see `Replay.sample`.
        """
        if self._depth == 0:
            return self._replay.sample()
        batch = self._pending.popleft().result() if self._pending else self._replay.sample()
        batch = self._replay.refresh_latents(batch)
        self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="replay")
        while len(self._pending) < self._depth:
            self._pending.append(self._executor.submit(self._replay.sample))
        return batch

    def close(self) -> None:
        """Stops the thread and drops the batches prepared; `next` starts it again."""
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
