"""Environments for an evaluation: built as RLlib builds them, without a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np

from rllib_dreamer.envs import (
    EnvSource,
    checked_creator,
    is_gymnasium_id,
    register_envs,
    validate_env_name,
)
from rllib_dreamer.envs.gymnasium import quiet_pygame
from rllib_dreamer.spaces import is_image, leaf_spaces

MAX_FRAMES = 3000
"""Pictures that are kept of an episode; later ones are left out."""

_LARGEST_FRAME = 256  # pixels of the shorter side that are kept of a rendered frame, at most


def build_env(env: EnvSource, env_config: Mapping[str, Any] | None = None) -> gym.Env:
    """Builds an environment that answers with pictures to `render()` where it can.

    Args:
        env: As in `config.environment(env)`: a name registered with Ray Tune (those of this package
            are), a Gymnasium id, the path of a class ("package.module.Class"), or a class or
            function that takes the config.
        env_config: As in `config.environment(env, env_config=...)`.

    Raises:
        ValueError: If it is unknown, what it needs is not installed (OpenGL too), or its code
            fails.
    """
    register_envs()
    config = dict(env_config or {})
    try:
        if isinstance(env, str):
            validate_env_name(env)
        creator = checked_creator(env)
        if is_gymnasium_id(creator.env):
            config = _drawn(creator, config)
        return creator(_env_context(config))
    except ValueError:
        raise
    except Exception as error:  # the code of a user
        told = isinstance(error, (ImportError, RuntimeError, gym.error.Error))
        kind = "" if told else f"{type(error).__name__}: "
        name = env if isinstance(env, str) else getattr(env, "__name__", str(env))
        text = f"the environment {name!r} cannot be built: {kind}{_line(error)}"
        raise ValueError(text) from error


def check_spaces(env: gym.Env, observation_space: gym.Space, action_space: gym.Space) -> None:
    """Checks that an environment is of the kind that a policy was trained on.

    Raises:
        ValueError: If a leaf of a space has another name, type, shape or dtype.
    """
    pairs = {
        "observation_space": (env.observation_space, observation_space),
        "action_space": (env.action_space, action_space),
    }
    for name, (given, trained) in pairs.items():
        if _signature(given) != _signature(trained):
            raise ValueError(
                f"the environment's {name} is {given}; the policy was trained on {trained}: give "
                "the environment and env_config of the training (a custom connector counts too)."
            )


def frame_of(env: gym.Env | None, obs: Mapping[str, Any], space: gym.Space) -> np.ndarray | None:
    """A picture (h, w, C) of the current step: of the observation, else rendered, else None.

    Args:
        env: The environment, just reset or stepped; None if it cannot be reached to be drawn.
        obs: The leaves of its observation.
        space: The observation space.
    """
    for key, leaf in leaf_spaces(space).items():
        if is_image(leaf):
            picture = np.asarray(obs[key])
            return picture if picture.ndim == 3 else picture[..., None]
    if env is None or env.render_mode != "rgb_array":
        return None
    rendered = np.asarray(env.render(), np.uint8)
    stride = -(-min(rendered.shape[:2]) // _LARGEST_FRAME)
    return np.array(rendered[::stride, ::stride])


def can_render(env: gym.Env) -> bool:
    """Tries whether an environment that gives no pictures as observations can be drawn."""
    if env.render_mode != "rgb_array":
        return False
    env.reset(seed=0)
    try:
        return env.render() is not None
    except Exception:  # a missing drawing library must not stop an evaluation
        return False


def _env_context(config: dict[str, Any]) -> Any:
    from ray.rllib.env.env_context import EnvContext

    return EnvContext(config, worker_index=0)


def _drawn(creator: Callable[..., gym.Env], config: dict[str, Any]) -> dict[str, Any]:
    """The config with `render_mode="rgb_array"`, if the env has it and no other is asked for."""
    if "render_mode" in config:
        return config
    quiet_pygame()
    with closing(creator(config)) as built:
        modes = built.metadata.get("render_modes") or []
    return config | {"render_mode": "rgb_array"} if "rgb_array" in modes else config


def _signature(space: gym.Space) -> list[tuple[str, str, Any, str]]:
    """What must agree: bounds may differ, they say nothing about the form of values."""
    return [
        (key, type(leaf).__name__, _size(leaf), str(leaf.dtype))
        for key, leaf in leaf_spaces(space).items()
    ]


def _size(leaf: gym.Space) -> Any:
    if isinstance(leaf, gym.spaces.Discrete):
        return int(leaf.n)
    return leaf.nvec.tolist() if isinstance(leaf, gym.spaces.MultiDiscrete) else leaf.shape


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
