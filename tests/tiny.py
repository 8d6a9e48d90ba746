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
from torch import Tensor

from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
from rllib_dreamer.dreamer_torch_learner import DreamerTorchLearner
from rllib_dreamer.model.agent import Agent, build_agent
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ObsSpec, model_config

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
    """Observes [t, last action] / 10; the same actions always give the same episode, a success."""

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
        over = self.t == self.length
        return obs, float(action.sum()), over, False, {"success": over}


class LengtheningEnv(CountingEnv):
    """Its first episode has one step, each later one a step more than the one before."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__({"length": 0})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        self.length += 1
        return super().reset(seed=seed, options=options)


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
    """Starts Ray for this and later modules, unless it runs; it ends with the process.

    Ray gives its start a time that a busy machine may not keep: up to three attempts.
    """
    for left in (2, 1, 0):
        if ray.is_initialized():
            return
        try:
            ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parent)}},
            )
        except Exception as error:
            ray.shutdown()
            if not left or "imed out" not in str(error):
                raise


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


def assert_acting_with(group: Any, parameters: dict[str, np.ndarray]) -> None:
    """Checks the weights of every EnvRunner."""
    runners = group.foreach_env_runner(lambda runner: runner.module.get_state())
    assert runners
    for held in runners:
        assert_same(held, {name: parameters[name.removeprefix("agent.")] for name in held})


def watch_acting(agent: Agent) -> list[str]:
    """A list that gets what each action from now on is: "random", "greedy" or "sampled"."""
    kinds: list[str] = []
    dists: list[dict[str, Any]] = []
    agent.behavior.actor.register_forward_hook(lambda module, args, out: dists.append(out))
    act = agent.act

    def watched(obs: Any, state: Any, explore: bool, random: bool = False) -> Any:
        actions, state = act(obs, state, explore, random)
        greedy = all(torch.equal(actions[name], d.mode()) for name, d in dists[-1].items())
        kinds.append("random" if random else "greedy" if greedy else "sampled")
        return actions, state

    agent.act = watched  # type: ignore[method-assign]
    return kinds


def agent_and_batch(rows: int = 3, steps: int = 4) -> tuple[Agent, dict[str, Tensor]]:
    """A tiny agent with every kind of leaf, and a batch for it."""
    obs = {
        "image": ObsSpec("image", (16, 16, 3)),
        "vector": ObsSpec("vector", (5,)),
        "choice": ObsSpec("discrete", (2,), 4),
    }
    actions = {
        "move": ActionSpec("continuous", 2),
        "press": ActionSpec("discrete", 1, 3),
        "turn": ActionSpec("discrete", 2, 5, (3, 5)),
    }
    config = model_config("1M", deter=32, hidden=16, units=16, mults=(2, 4))
    agent = build_agent(obs, actions, config, LossConfig(horizon=3))
    agent.noise = FixedNoise(0.3)
    flag = torch.zeros(rows, steps + 1, dtype=torch.bool)
    batch = {
        "obs/image": torch.randint(0, 256, (rows, steps + 1, 16, 16, 3), dtype=torch.uint8),
        "obs/vector": torch.randn(rows, steps + 1, 5),
        "obs/choice": torch.randint(0, 4, (rows, steps + 1, 2)),
        "action/move": torch.rand(rows, steps + 1, 2) * 2 - 1,
        "action/press": torch.randint(0, 3, (rows, steps + 1, 1)),
        "action/turn": torch.randint(0, 3, (rows, steps + 1, 2)),
        "reward": torch.randn(rows, steps + 1),
        "is_first": flag.index_fill(1, torch.tensor([2]), True),
        "is_last": flag.clone(),
        "is_terminal": flag.clone(),
        "deter": torch.randn(rows, steps + 1, 32),
        "stoch": torch.randint(0, 4, (rows, steps + 1, 32)),
    }
    return agent, batch
