"""The last lines of a run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune import Checkpoint

from rllib_dreamer.cli.reporter import SCORE
from rllib_dreamer.cli.summary import closing_lines


def result(folder: Path, *scores: float) -> Any:
    """A trial's result, with checkpoints of these scores."""
    saved = [Checkpoint(str(folder / f"checkpoint_{n:06d}")) for n in range(len(scores))]
    metrics = [{SCORE: score} for score in scores]
    kept = list(zip(saved, metrics, strict=True))
    return SimpleNamespace(checkpoint=saved[-1], best_checkpoints=kept, metrics=metrics[-1])


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ((3.0, 9.0, 5.0), "checkpoint_000001 (return 9)"),
        ((9.0, 9.0, 5.0), "checkpoint_000001 (return 9)"),
        ((math.nan, 2.0, math.nan), "checkpoint_000001 (return 2)"),
        ((math.nan, math.nan), "checkpoint_000001"),
    ],
)
def test_the_best_checkpoint_is_the_latest_of_equal_ones(
    scores: tuple[float, ...], best: str, tmp_path: Path
) -> None:
    """As `find_checkpoint` chooses, so that `rllib evaluate best` takes the one that is named."""
    lines = closing_lines([result(tmp_path, *scores)])  # type: ignore[arg-type]
    assert lines[0] == f"best checkpoint: {tmp_path / best}"
    assert lines[1].startswith(f"last checkpoint: {tmp_path}/checkpoint_{len(scores) - 1:06d}")
