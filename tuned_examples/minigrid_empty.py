"""MiniGrid's empty room from pixels: discrete actions, pictures, and minutes on a CPU.

    rllib train file tuned_examples/minigrid_empty.py

Needs the extra `minigrid`: `pip install ".[minigrid]"`.

Protocol: MiniGrid-Empty-Random-5x5-v0, start and heading drawn in each episode. The agent sees the
7x7 fields before it as a 56x56 picture, shrunk to 32x32 RGB, and has 7 actions, of which three
matter. Reaching the green field ends the episode and pays 1 - 0.9 t / 100 at step t; after 100
steps it is truncated. The 1M model with small batches and a high learning rate.
Expected: a mean training return of 0.9, where it stops. There is no published result; a random
policy returns 0.29 (mean of 27 episodes), the shortest way about 0.96.
Time: 13 minutes and 6,000 to 6,500 agent steps on one core; a budget of 30,000 agent steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym

from rllib_dreamer import DreamerConfig
from rllib_dreamer.envs import gymnasium, register_env


def make_minigrid(env_config: Mapping[str, Any]) -> gym.Env:
    """Builds a MiniGrid env that observes a picture.

    Args:
        env_config: `id` of the env, the keys `size` and `action_repeat` of any Gymnasium env, and
            arguments of `gym.make`.
    """
    from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper

    options, kwargs = gymnasium.split_config(env_config)
    env = gym.make(kwargs.pop("id"), **kwargs)
    return gymnasium.wrap(ImgObsWrapper(RGBImgPartialObsWrapper(env)), options)


register_env(make_minigrid, "minigrid")

config = (
    DreamerConfig()
    .environment("minigrid", env_config={"id": "MiniGrid-Empty-Random-5x5-v0", "size": 32})
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

stop = {"env_runners/episode_return_mean": 0.9, "num_env_steps_sampled_lifetime": 30_000}
