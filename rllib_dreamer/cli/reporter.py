"""What the algorithm's own process adds to a run of the command line."""

from __future__ import annotations

import math
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback

from rllib_dreamer.checkpoint import SCORE


class RunReporter(RLlibCallback):
    """Scores each result by the newest mean episode return.

    Tune finds a score only at the top level of a result, and wants it in every one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.score = math.nan

    def on_train_result(self, *, algorithm: Algorithm, result: dict[str, Any], **kw: Any) -> None:
        """Adds the score; NaN, which ranks lowest, until the first episode ends.

        A result during which no episode ended has a NaN in place of the mean return; the
        policy is then judged by the last mean that was known.
        """
        score = float(result.get("env_runners", {}).get("episode_return_mean", math.nan))
        self.score = self.score if math.isnan(score) else score
        result[SCORE] = self.score
