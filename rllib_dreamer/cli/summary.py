"""The last lines of a run: where its checkpoints are, and how to use them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ray.tune import Result
from ray.tune.result_grid import ResultGrid
from ray.tune.utils import flatten_dict

from rllib_dreamer.checkpoint import SCORE
from rllib_dreamer.cli.experiment import Experiment
from rllib_dreamer.dreamer_config import DreamerConfig


class Saved(NamedTuple):
    """A checkpoint's path, and the mean return it was saved at (NaN if none was known)."""

    path: str
    score: float


def closing_lines(results: ResultGrid) -> list[str]:
    """Names the best and the last checkpoint.

    Args:
        results: All trials of the run.

    Returns:
        Lines to print; of several trials, those with the best score.
    """
    last = [saved for result in results if (saved := last_checkpoint(result)) is not None]
    best = best_of_all(results)
    if best is None:
        return ["no checkpoint was saved"]
    lines = [f"best checkpoint: {best.path}{_score(best)}"]
    return [*lines, *(f"last checkpoint: {saved.path}{_score(saved)}" for saved in last)]


def evaluation_hint(results: ResultGrid, experiment: Experiment) -> list[str]:
    """The line with the command that evaluates the best checkpoint, if there is such a command."""
    best = best_of_all(results)
    if best is None or not isinstance(experiment.config, DreamerConfig):
        return []
    words = ["rllib", "evaluate", best.path]
    if experiment.file is not None:
        words += ["--file", str(experiment.file)]
    return [f"evaluate it: {shlex.join(words)}"]


def best_of_all(results: ResultGrid) -> Saved | None:
    """Finds the checkpoint with the highest mean return of all trials."""
    saved = (find(result) for result in results for find in (best_checkpoint, last_checkpoint))
    return max((item for item in saved if item is not None), key=_rank, default=None)


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


def _rank(saved: Saved) -> tuple[float, str]:
    """By score; of equal ones, and where none is known, the later: `rllib evaluate` takes that."""
    return -math.inf if math.isnan(saved.score) else saved.score, Path(saved.path).name


def _score(saved: Saved) -> str:
    return "" if math.isnan(saved.score) else f" (return {saved.score:.4g})"
