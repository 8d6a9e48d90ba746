"""Tiny environments and configs: one iteration of them takes a fraction of a second."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from gymnasium import spaces

from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
from rllib_dreamer.dreamer_torch_learner import DreamerTorchLearner
from rllib_dreamer.model.agent import Agent

#: Overrides of "1M" that keep every part of the model and make each as small as it can be.
MODEL = {
    "deter": 64,
    "hidden": 16,
    "classes": 4,
    "depth": 2,
    "units": 16,
    "stoch": 4,
    "bins": 41,
}

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (32, 32, 3), np.uint8)
CONTINUOUS = spaces.Box(-1.0, 1.0, (2,), np.float32)
DISCRETE = spaces.Discrete(3)
MIXED = spaces.Dict({"camera": IMAGE, "joints": VECTOR, "mode": spaces.Discrete(4)})


class RandomEnv(gym.Env):
    """Random observations of any space; refuses an action that is not in its action space.

    Keys of the config: `observation_space`, `action_space`, `length` of an episode (5), and
    `terminated`: whether episodes end by termination (True) or by a time limit.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.observation_space = config.get("observation_space", VECTOR)
        self.action_space = config.get("action_space", DISCRETE)
        self.length = config.get("length", 5)
        self.terminated = config.get("terminated", True)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        self.t += 1
        done = self.t >= self.length
        reward = float(self.t)
        over = done and self.terminated, done and not self.terminated
        return self.observation_space.sample(), reward, *over, {}


class CountingEnv(gym.Env):
    """Observes [t, last action] / 10; the same actions always give the same episode."""

    observation_space = spaces.Box(-10.0, 10.0, (3,), np.float32)
    action_space = CONTINUOUS

    def __init__(self, config: dict[str, Any]) -> None:
        self.length = config.get("length", 6)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.t += 1
        obs = np.array([self.t, *action], np.float32) / 10
        return obs, float(action.sum()), self.t == self.length, False, {}


def tiny_config(
    env: type[gym.Env] = RandomEnv,
    *,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **env_config: Any,
) -> DreamerConfig:
    """A config that builds in no time.

    Args:
        env: The environment.
        model: More overrides of the architecture.
        training: Overrides of `DreamerConfig.training`.
        **env_config: For the environment.
    """
    settings = {
        "model_size": "1M",
        "batch_size_B": 4,
        "batch_length_T": 8,
        "horizon_H": 3,
        "training_ratio": 32,
        "replay_capacity": 2000,
        "learner_threads": 1,
        "precision": "float32",
        "warmup_updates": 0,
        "lr": 1e-3,
    }
    config = DreamerConfig().environment(env, env_config=env_config)
    config.training(**{**settings, **(training or {})})
    config.rl_module(model_config={**MODEL, **(model or {})})
    config.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=1)
    config.debugging(seed=0, log_level="ERROR")
    return config


def start_ray() -> None:
    """Starts Ray for this and later modules, unless it runs; it ends with the process."""
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parent)}},
        )


@contextmanager
def built(config: DreamerConfig) -> Iterator[DreamerTorch]:
    """The algorithm of a config, stopped at the end; on one thread, so that runs repeat bitwise."""
    start_ray()
    torch.set_num_threads(1)
    algo = config.build_algo()
    try:
        yield algo
    finally:
        algo.stop()


def train_until(algo: DreamerTorch, updates: int) -> dict[str, Any]:
    """Trains until so many updates are done; returns the last result."""
    for _ in range(2000):
        result = algo.train()
        if result["dreamer"]["updates"] >= updates:
            return result
    raise AssertionError(f"no {updates} updates in 2000 iterations")


def learner_of(algo: DreamerTorch) -> DreamerTorchLearner:
    """The local learner."""
    return algo.learner_group._learner


def agent_of(algo: DreamerTorch) -> Agent:
    """The agent of the local learner."""
    return learner_of(algo).agent()


def parameters_of(algo: DreamerTorch) -> dict[str, np.ndarray]:
    """A copy of everything that the model holds, buffers included."""
    return {k: x.detach().numpy().copy() for k, x in agent_of(algo).state_dict().items()}


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Checks two nestings of arrays and plain values for equality, bit for bit."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}/{i}")
    elif isinstance(left, (np.ndarray, torch.Tensor)):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=path)
    else:
        assert left == right, f"{path}: {left!r} != {right!r}"
