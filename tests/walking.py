"""An environment that says where it is, and a policy for it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from tiny import IMAGE, MODEL, VECTOR

from rllib_dreamer.dreamer_catalog import action_spec, obs_spec
from rllib_dreamer.model.agent import build_agent
from rllib_dreamer.model.sizes import LossConfig, model_config
from rllib_dreamer.policy.policy import DreamerPolicy
from rllib_dreamer.spaces import leaf_spaces

CAMERA = spaces.Dict({"camera": IMAGE, "joints": VECTOR})

ARM = spaces.Box(-2.0, 2.0, (2,), np.float32)
ACTIONS = spaces.Dict(
    {
        "arm": spaces.Box(np.array([-2.0, 0.0]), np.array([1.0, 5.0]), dtype=np.float64),
        "grip": spaces.Discrete(3, start=2),
        "keys": spaces.MultiDiscrete([2, 4]),
    }
)


class Walk(gym.Env):
    """Says where it is: joints hold (episode's seed, step, last action). Ends by its seed.

    With `tells` in its config its infos tell whether it is at step 3, where odd seeds never are.
    """

    observation_space = CAMERA
    action_space = ARM

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = dict(config or {})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.seed, self.t, self.action = seed or 0, 0, np.zeros(2, np.float32)
        return self._obs(), self._info()

    def step(self, action: np.ndarray) -> Any:
        assert self.action_space.contains(action)
        self.t, self.action = self.t + 1, action
        end = self.t == self.config.get("length", 8) + self.seed
        return self._obs(), float(self.t), end and self.seed % 2 == 0, end, self._info()

    def _info(self) -> dict[str, bool]:
        succeeds = self.t == 3 and self.seed % 2 == 0
        return {"success": succeeds} if "tells" in self.config else {}

    def _obs(self) -> dict[str, np.ndarray]:
        picture = np.full((32, 32, 3), 10 * self.seed + self.t, np.uint8)
        joints = np.array([self.seed, self.t, self.action[0]], np.float32) / 100
        return {"camera": picture, "joints": joints}


def make_policy(
    observation_space: gym.Space = CAMERA, action_space: gym.Space = ARM
) -> DreamerPolicy:
    torch.manual_seed(0)
    agent = build_agent(
        {key: obs_spec(key, space) for key, space in leaf_spaces(observation_space).items()},
        {key: action_spec(key, s) for key, s in leaf_spaces(action_space, "action").items()},
        model_config("1M", **MODEL),
        LossConfig(),
    )
    return DreamerPolicy(agent, observation_space, action_space, env=Walk)
