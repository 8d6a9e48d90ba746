"""Environments for an evaluation: built as RLlib builds them, without a Ray cluster."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from rllib_dreamer.spaces import is_image, leaf_spaces

EnvSource = str | Callable[..., gym.Env]

_LARGEST_FRAME = 256  # pixels of the shorter side that are kept of a rendered frame


def build_env(env: EnvSource, env_config: Mapping[str, Any] | None = None) -> gym.Env:
    """Builds an environment that answers with pictures to `render()` where it can.

    Args:
        env: A name registered with Ray Tune (those of this package are), a Gymnasium id, the path
            of a class ("package.module.Class"), or a class or function that takes the config.
        env_config: As in `config.environment(env, env_config=...)`.

    Raises:
        ValueError: If it is unknown, or what it needs is not installed.
    """
    config = dict(env_config or {})
    name = env if isinstance(env, str) else getattr(env, "__name__", str(env))
    try:
        creator = _creator(env)
        if creator is not None:
            return creator(_env_context(config))
        assert isinstance(env, str)
        return _gymnasium_env(env, config)
    except (ImportError, gym.error.Error) as error:
        raise ValueError(f"the environment {name!r} cannot be built: {_line(error)}") from error


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
    stride = max(1, min(rendered.shape[:2]) // _LARGEST_FRAME)
    return np.array(rendered[::stride, ::stride])


def can_render(env: gym.Env) -> bool:
    """Tries whether an environment that gives no pictures as observations can be drawn."""
    if env.render_mode != "rgb_array":
        return False
    env.reset(seed=0)
    try:
        return env.render() is not None
    except (ImportError, gym.error.Error, RuntimeError):
        return False  # a missing drawing library must not stop an evaluation without videos


def _creator(env: EnvSource) -> Callable[..., gym.Env] | None:
    """What builds an environment from its context; None for a Gymnasium id."""
    if not isinstance(env, str):
        return env
    from ray.tune.registry import ENV_CREATOR, _global_registry

    from rllib_dreamer.envs import register_envs

    register_envs()
    if _global_registry.contains(ENV_CREATOR, env):
        found: Callable[..., gym.Env] = _global_registry.get(ENV_CREATOR, env)
        return found
    module, _, attribute = env.rpartition(".")
    if module and "/" not in env and ":" not in env and env not in gym.registry:
        loaded = getattr(importlib.import_module(module), attribute)
        if not (isinstance(loaded, type) and issubclass(loaded, gym.Env)):
            raise ValueError(  # the name may be that of an exported policy: no other code is called
                f"the environment {env!r} is not a class of gymnasium.Env: name one, or register "
                "what builds it, tune.register_env(name, creator)."
            )
        return loaded
    return None


def _env_context(config: dict[str, Any]) -> Any:
    from ray.rllib.env.env_context import EnvContext

    return EnvContext(config, worker_index=0)


def _gymnasium_env(env: str, config: dict[str, Any]) -> gym.Env:
    from rllib_dreamer.envs import validate_env_name

    validate_env_name(env)
    if "render_mode" not in config:
        modes = gym.make(env, **config).unwrapped.metadata.get("render_modes", [])
        config = {**config, "render_mode": "rgb_array"} if "rgb_array" in modes else config
    return gym.make(env, **config)


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
