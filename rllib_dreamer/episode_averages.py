"""Statistics over the latest episodes, out of those over the episodes of each iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Share of episodes that were a success, of environments that tell.
EPISODE_SUCCESS_MEAN = "episode_success_mean"
#: RLlib's names but for the last; the end of each says what it is: mean, least or greatest.
STATISTICS = (
    *("episode_return_mean", "episode_return_min", "episode_return_max"),
    *("episode_len_mean", "episode_len_min", "episode_len_max"),
    EPISODE_SUCCESS_MEAN,
)


class EpisodeAverages:
    """Combines the latest iterations in which episodes ended, as many as have `window` of them.

    Args:
        window: Episodes, >= 1.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._iterations: list[tuple[int, dict[str, float]]] = []

    def add(self, ended: int, statistics: Mapping[str, Any]) -> dict[str, float]:
        """Takes an iteration in; returns the statistics over the latest episodes.

        Args:
            ended: Episodes that ended in it; of none the statistics are not read.
            statistics: Those over them, among others; what is missing or NaN is left out.

        Returns:
            All of `STATISTICS`, NaN until an episode has ended that has it.
        """
        if ended:
            given = {name: float(statistics[name]) for name in STATISTICS if name in statistics}
            found = {name: value for name, value in given.items() if not math.isnan(value)}
            self._iterations.append((ended, found))
        while sum(count for count, _ in self._iterations[1:]) >= self.window:
            del self._iterations[0]
        return {name: self._combined(name) for name in STATISTICS}

    def _combined(self, name: str) -> float:
        counted = [(count, found[name]) for count, found in self._iterations if name in found]
        if not counted:
            return math.nan
        if name.endswith("_mean"):
            total = sum(count * value for count, value in counted)
            return total / sum(count for count, _ in counted)
        return (min if name.endswith("_min") else max)(value for _, value in counted)

    def get_state(self) -> list[tuple[int, dict[str, float]]]:
        """What `set_state` takes."""
        return list(self._iterations)

    def set_state(self, state: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Goes on where another one stopped."""
        self._iterations = list(state)
