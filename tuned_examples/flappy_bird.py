"""Flappy Bird from pixels, resized with SuperSuit.

    rllib train file tuned_examples/flappy_bird.py

Protocol: FlappyBird-v0 of flappy-bird-gymnasium 0.4, which has no env of pictures: the 512x288
screen (without the score) becomes the observation, 64x64 RGB. Every frame is an agent step. Reward
0.1 for a frame alive, 1 for a pipe passed, -0.5 for the upper edge, -1 for death.
On a CUDA machine the 12M model, on a CPU the 1M model with small batches.
Expected: no result of ours yet and none published; with a flap in 10 % of the frames, at random, a
game lasts about 50 frames and returns 3.4, with one in half of them it returns -7.8 (means of 40
games).
Time: not measured.

SuperSuit's `resize_v1` picks single pixels, so that shrinking eight times would lose the edges of
the pipes: blocks of 4x4 pixels are averaged first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from rllib_dreamer import DreamerConfig
from rllib_dreamer.envs import register_env
from rllib_dreamer.envs.gymnasium import quiet_pygame

BLOCK = 4


def average_blocks(picture: np.ndarray, _: gym.Space | None = None) -> np.ndarray:
    """Shrinks a uint8 (h, w, 3) picture by the mean of each 4x4 block."""
    h, w, _channels = picture.shape
    blocks = picture.reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK, 3)
    return blocks.mean((1, 3)).astype(np.uint8)  # (h/4, w/4, 3)


def averaged_space(space: gym.Space) -> spaces.Box:
    """Returns the space of what `average_blocks` makes of an element of `space`."""
    assert space.shape is not None
    return spaces.Box(0, 255, (space.shape[0] // BLOCK, space.shape[1] // BLOCK, 3), np.uint8)


def make_flappy_bird(env_config: Mapping[str, Any]) -> gym.Env:
    """Builds the env; `env_config` goes to `gym.make`."""
    quiet_pygame()
    import flappy_bird_gymnasium  # noqa: F401  # registers the id
    import supersuit
    from gymnasium.wrappers import AddRenderObservation

    # The checker would warn about the vector of the env, which is not used.
    kwargs = {"render_mode": "rgb_array", "use_lidar": False} | dict(env_config)
    env = gym.make("FlappyBird-v0", disable_env_checker=True, **kwargs)
    env = AddRenderObservation(env, render_only=True)  # (512, 288, 3)
    env = supersuit.observation_lambda_v0(env, average_blocks, averaged_space)  # (128, 72, 3)
    return supersuit.resize_v1(env, 64, 64, linear_interp=True)  # (64, 64, 3)


register_env(make_flappy_bird, "flappy-bird")

config = (
    DreamerConfig()
    .environment("flappy-bird")
    .training(model_size="12M", training_ratio=64, replay_capacity=200_000)
    .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
    .reporting(min_time_s_per_iteration=20)
    .debugging(seed=0)
)

if torch.cuda.is_available():
    config.learners(num_learners=0, num_gpus_per_learner=1)
else:
    config.training(model_size="1M", training_ratio=32, batch_size_B=8, batch_length_T=32)

stop = {"num_env_steps_sampled_lifetime": 500_000}
