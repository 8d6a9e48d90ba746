"""An env of your own, registered under a name.

    rllib train file tuned_examples/custom_env.py

Protocol: a point in the unit square is pushed to a goal. The agent sees a 32x32 gray picture (the
goal dim, the point bright) and its velocity; its action is an acceleration in [-1, 1]^2. The reward
of a step is 1 within 0.1 of the goal, else 0; 100 steps, then the episode is truncated, so the best
return is a little below 100.
Expected: no result of ours yet and none published; it stops at a mean training return of 70. A
random policy returns about 3.4 (mean of 30 episodes).
Time: not measured; a budget of 50,000 agent steps.

`register_env` has the output of the env checked at each step; `ray.tune.register_env` works too.
Anything with a Gymnasium interface can take the place of `PointReach`. Workers on other machines
import it by name if it lives in an installed package; a class in this file is sent by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from rllib_dreamer import DreamerConfig
from rllib_dreamer.envs import register_env

SIZE = 32


class PointReach(gym.Env):
    """Push a point to the goal.

    Args:
        env_config: `length` is the number of steps in an episode, 100 by default.
    """

    def __init__(self, env_config: Mapping[str, Any] | None = None) -> None:
        """See the class."""
        self.length = int((env_config or {}).get("length", 100))
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (SIZE, SIZE, 1), np.uint8),
                "velocity": spaces.Box(-1.0, 1.0, (2,), np.float32),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Puts the point and the goal somewhere."""
        super().reset(seed=seed)
        self._position, self._goal = self.np_random.uniform(0.1, 0.9, (2, 2))
        self._velocity = np.zeros(2)
        self._steps = 0
        return self._observation(), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Accelerates the point; walls stop it."""
        self._steps += 1
        self._velocity = np.clip(0.8 * self._velocity + 0.02 * np.asarray(action), -1, 1)
        moved = self._position + self._velocity
        self._position = np.clip(moved, 0.05, 0.95)
        self._velocity[moved != self._position] = 0.0
        near = np.linalg.norm(self._position - self._goal) < 0.1
        return self._observation(), float(near), False, self._steps >= self.length, {}

    def _observation(self) -> dict[str, np.ndarray]:
        picture = np.zeros((SIZE, SIZE, 1), np.uint8)
        for place, brightness in ((self._goal, 100), (self._position, 255)):
            row, column = (place * SIZE).astype(int)
            picture[row - 1 : row + 2, column - 1 : column + 2] = brightness
        return {"image": picture, "velocity": self._velocity.astype(np.float32)}


register_env(PointReach, "point-reach")

config = (
    DreamerConfig()
    .environment("point-reach", env_config={"length": 100})
    .training(
        model_size="1M",
        training_ratio=64,
        batch_size_B=8,
        batch_length_T=32,
        lr=3e-4,
        warmup_updates=100,
        replay_capacity=100_000,
    )
    .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
    .reporting(min_time_s_per_iteration=10)
    .debugging(seed=0)
)

stop = {"env_runners/episode_return_mean": 70.0, "num_env_steps_sampled_lifetime": 50_000}
