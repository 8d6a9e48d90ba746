"""Whether it learns: a tiny model on a task that needs every part, and the CartPole-v1 example."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from tiny import built, tiny_config, train_until

from rllib_dreamer.cli.experiment import experiment_from_file
from rllib_dreamer.cli.options import TrainOptions

ROOT = Path(__file__).resolve().parents[1]


class Corridor(gym.Env):
    """Six cells and a door at the near end: leaving pays 1 at once, the far end 1 a step.

    An episode begins at the door and lasts 20 steps, so 15 is the best return. The far end is too
    far to be seen in three imagined steps: a critic that does not look further leaves for 1, one
    that does not know endings values what comes after the door, and a reversed actor leaves too.
    A random policy returns about 1.1.
    """

    observation_space = spaces.Box(0.0, 1.0, (6,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, config: dict[str, Any]) -> None:
        self.t = self.cell = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        self.t = self.cell = 0
        return self._obs(), {}

    def step(self, action: int) -> Any:
        self.t += 1
        left = action == 0 and self.cell == 0
        reward = float(left or (action == 1 and self.cell == 5))
        self.cell = min(self.cell + 1, 5) if action == 1 else max(self.cell - 1, 0)
        return self._obs(), reward, left, self.t == 20, {}

    def _obs(self) -> np.ndarray:
        return np.eye(6, dtype=np.float32)[self.cell]


def test_a_far_reward_is_preferred_to_a_near_one() -> None:
    settings = {
        "batch_size_B": 8,
        "batch_length_T": 16,
        "training_ratio": 64,
        "lr": 2e-3,
        "warmup_updates": 20,
    }
    model = {"units": 32, "hidden": 32, "bins": 63}
    config = tiny_config(Corridor, training=settings, model=model)
    config.env_runners(num_envs_per_env_runner=4)
    config.reporting(min_sample_timesteps_per_iteration=100)
    with built(config) as algo:
        result = train_until(algo, 250)
    assert result["env_runners"]["episode_return_mean"] > 8.0
    learned = result["learners"]["default_policy"]
    assert learned["reward_error"] < 0.1
    assert learned["value_mean"] > 3.0  # more than three steps can bring


@pytest.mark.slow
def test_cartpole_is_solved_within_the_budget_of_its_example() -> None:
    experiment = experiment_from_file(ROOT / "tuned_examples" / "cartpole.py", TrainOptions())
    budget = experiment.limits["num_env_steps_sampled_lifetime"]
    best, steps = -math.inf, 0
    with built(experiment.config) as algo:
        while best < 450.0 and steps < budget:
            result = algo.train()
            steps = result["num_env_steps_sampled_lifetime"]
            best = max(best, result["env_runners"].get("episode_return_mean", -math.inf))
    assert best >= 450.0
