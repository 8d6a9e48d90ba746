"""The last lines of a run: where its checkpoints are, and how to use them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray.tune import Result
from ray.tune.result_grid import ResultGrid
from ray.tune.utils import flatten_dict

from rllib_dreamer.cli.reporter import SCORE


class Saved(NamedTuple):
    """A checkpoint's path, and the mean return it was saved at (NaN if none was known)."""

    path: str
    score: float


def closing_lines(results: ResultGrid) -> list[str]:
    """Names the best and the last checkpoint, and the command that evaluates the best.

    Args:
        results: All trials of the run.

    Returns:
        Lines to print; of several trials, those with the best score.
    """
    best = [saved for result in results if (saved := best_checkpoint(result)) is not None]
    last = [saved for result in results if (saved := last_checkpoint(result)) is not None]
    if not last:
        return ["no checkpoint was saved"]
    chosen = max([*best, *last], key=_rank)
    lines = [f"best checkpoint: {chosen.path}{_score(chosen)}"]
    lines += [f"last checkpoint: {saved.path}{_score(saved)}" for saved in last]
    return [*lines, f"evaluate it: rllib evaluate {shlex.quote(chosen.path)}"]


def best_checkpoint(result: Result) -> Saved | None:
    """Finds the kept checkpoint with the highest mean return."""
    saved = [Saved(item.path, _value(metrics)) for item, metrics in result.best_checkpoints or []]
    return max(saved, key=_rank, default=None)


def last_checkpoint(result: Result) -> Saved | None:
    """Finds the newest checkpoint."""
    if result.checkpoint is None:
        return None
    kept = {item.path: _value(metrics) for item, metrics in result.best_checkpoints or []}
    path = result.checkpoint.path
    return Saved(path, kept.get(path, _value(result.metrics or {})))


def _value(metrics: Mapping[str, Any]) -> float:
    return float(flatten_dict(dict(metrics)).get(SCORE, math.nan))


def _rank(saved: Saved) -> float:
    return -math.inf if math.isnan(saved.score) else saved.score


def _score(saved: Saved) -> str:
    return "" if math.isnan(saved.score) else f" (return {saved.score:.4g})"
