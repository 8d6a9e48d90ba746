"""Pictures of a run in training, taken where they arise: in an evaluation runner and in a learner.

Needs nothing but what training needs; `training_videos` makes films of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner import Learner
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EVALUATION_RESULTS
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_dreamer.evaluation.environments import MAX_FRAMES, frame_of
from rllib_dreamer.policy import imagination
from rllib_dreamer.policy.policy import SeededNoise
from rllib_dreamer.spaces import flatten

EPISODE = "episode_frames"
"""Metric of an evaluation runner: a list of frames (T, h, w, C), one of each episode."""

VIDEOS = "videos"
"""Folder of a trial's films, and key of a result: name of a film -> its file."""


class EpisodeRecorder(RLlibCallback):
    """Keeps the pictures of one evaluation episode each `video_interval_s` of the config.

    Those of the first environment of the first runner: its image observation, else what it draws
    where its render mode is "rgb_array". They travel as a metric, which `DreamerTorch` takes out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._frames: list[np.ndarray] | None = None
        self._recorded_at = -math.inf

    def on_episode_start(self, *, env_runner: Any, env_index: int, **kwargs: Any) -> None:
        """Begins a recording if one is due."""
        if env_index or env_runner.worker_index > 1:
            return
        due = time.monotonic() - self._recorded_at >= env_runner.config.video_interval_s
        self._frames = [] if due else None
        self._see(env_index, **kwargs)

    def on_episode_step(self, *, env_index: int, **kwargs: Any) -> None:
        """Adds the newest picture."""
        self._see(env_index, **kwargs)

    def on_episode_end(self, *, metrics_logger: Any, env_index: int, **kwargs: Any) -> None:
        """Hands the recording over."""
        if env_index == 0 and self._frames:
            frames = np.stack(self._frames)
            metrics_logger.log_value(EPISODE, frames, reduce="item_series", window=1)
            self._frames, self._recorded_at = None, time.monotonic()

    def _see(self, env_index: int, *, episode: Any, env: Any, **kwargs: Any) -> None:
        if env_index or self._frames is None or len(self._frames) >= MAX_FRAMES:
            return
        space = episode.observation_space
        single = env.envs[0] if hasattr(env, "envs") else None  # environments in processes cannot
        frame = frame_of(single, flatten(episode.get_observations(-1), space), space)
        if frame is not None:
            self._frames.append(frame)


def forget_episodes(metrics: MetricsLogger) -> None:
    """Drops recordings from an algorithm's metrics, which would be reported and saved again."""
    metrics.delete(EVALUATION_RESULTS, ENV_RUNNER_RESULTS, EPISODE, key_error=False)


def open_loop_frames(
    learner: Learner, rows: Mapping[str, np.ndarray], context: int
) -> dict[str, NDArray[np.uint8]]:
    """Has a learner's world model filter the beginning of replayed rows and imagine the rest.

    Args:
        learner: A learner of `DreamerTorch`.
        rows: As `Replay.peek` gives them, (B, T + 1, ...).
        context: Steps to filter.

    Returns:
        By image leaf that is decoded (B, T, h, w, C).
    """
    module = learner.module[DEFAULT_MODULE_ID].unwrapped()
    agent = module.agent
    if not imagination.decoded_leaves(agent):
        return {}
    device = next(agent.parameters()).device
    batch = module.model_batch({k: torch.from_numpy(x).to(device) for k, x in rows.items()})
    decoded = imagination.open_loop(agent, batch, context, SeededNoise(0))
    return {
        key: imagination.pixels(decoded[key]).cpu().numpy() for key in agent.world.decoder.images
    }
