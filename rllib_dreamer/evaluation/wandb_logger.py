"""Tune's Weights & Biases logger, which also uploads the films of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune.experiment import Trial

from rllib_dreamer.evaluation.recorder import VIDEOS


class VideoWandbLogger(WandbLoggerCallback):
    """Logs results as Ray's logger does, and the films that they name as videos.

    Films are read from the trial's folder, so it must lie where the driver can open its files: on
    this machine or on a mounted disk. Others are left out.
    """

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        """Logs one result."""
        films = {
            name: wandb.Video(file, format="mp4")
            for name, file in result.get(VIDEOS, {}).items()
            if Path(file).is_file()
        }
        super().log_trial_result(iteration, trial, {**result, VIDEOS: films})
