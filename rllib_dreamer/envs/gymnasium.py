"""Any Gymnasium id: action repeat, pictures from `render()`, and checks around `gym.make`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rllib_dreamer.envs import rendering, wrappers
from rllib_dreamer.near_names import nearest


@dataclass(frozen=True)
class GymnasiumOptions:
    """The keys of `env_config` that this package reads; every other goes to `gym.make`."""

    observation: str = "state"
    size: int | tuple[int, int] | None = None
    action_repeat: int = 1
    check_spaces: bool = True

    def __post_init__(self) -> None:
        """Checks each value; raises a ValueError that names the key."""
        wrappers.require_choice("observation", self.observation, ("state", "pixels", "both"))
        wrappers.require_count("action_repeat", self.action_repeat)
        if self.size is not None:
            wrappers.parse_size(self.size)


class RenderedPicture(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Observes the env's `render()`, alone or beside its own observation as a Dict.

    Args:
        env: An env made with `render_mode="rgb_array"`.
        size: (height, width) in pixels.
        both: If True, the observation is `{"image": picture, "vector": own observation}`.
    """

    def __init__(self, env: gym.Env, size: tuple[int, int], both: bool) -> None:
        """See the class."""
        gym.utils.RecordConstructorArgs.__init__(self, size=size, both=both)
        gym.Wrapper.__init__(self, env)
        self.size = size
        self.both = both
        image = wrappers.image_space(size)
        parts: dict[str, gym.Space] = {"image": image, "vector": env.observation_space}
        self.observation_space = spaces.Dict(parts) if both else image

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Resets the env and draws it."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observation(observation), info

    def step(self, action: Any) -> Any:
        """Steps the env and draws it once."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._observation(observation), reward, terminated, truncated, info

    def _observation(self, state: Any) -> Any:
        picture: NDArray[np.uint8] = np.asarray(self.env.render(), np.uint8)
        picture = np.array(wrappers.resize_picture(picture, self.size))
        return {"image": picture, "vector": state} if self.both else picture


def split_config(env_config: Mapping[str, Any]) -> tuple[GymnasiumOptions, dict[str, Any]]:
    """Returns our options and the keyword arguments left for `gym.make`."""
    ours = {field.name for field in fields(GymnasiumOptions)}
    given = {k: v for k, v in env_config.items() if k in ours}
    options = wrappers.parse_options(GymnasiumOptions, given, "gymnasium")
    return options, {k: v for k, v in env_config.items() if k not in ours}


def quiet_pygame() -> None:
    """Keeps pygame, which draws many of these envs, away from displays and sound cards."""
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def make(env_id: str, env_config: Mapping[str, Any] | None = None) -> gym.Env:
    """Builds a Gymnasium env by its id.

    Raises:
        ValueError: The id is unknown, or the env does not take a key of `env_config`.
    """
    options, kwargs = split_config(env_config or {})
    if options.observation != "state":
        kwargs.setdefault("render_mode", "rgb_array")
        quiet_pygame()
    rendering.setup_rendering(required=options.observation != "state" and _is_mujoco(env_id))
    kwargs.setdefault("disable_env_checker", True)  # `CheckedEnv` says more
    try:
        env = gym.make(env_id, **kwargs)
    except gym.error.UnregisteredEnv as error:
        hint = nearest(env_id, gym.registry)
        raise ValueError(f"Unknown env {env_id!r}: {hint} Or register it with Ray Tune.") from error
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is None or refused[1] not in kwargs:
            raise
        raise ValueError(
            f"env_config of {env_id!r} has a key that neither this package nor the env takes: "
            f"{error}. Remove it."
        ) from error
    return wrap(env, options)


def _is_mujoco(env_id: str) -> bool:
    """Whether an env is drawn by MuJoCo, as far as its class tells; others need no OpenGL of it."""
    spec = gym.registry.get(env_id)
    return spec is not None and "mujoco" in str(spec.entry_point).lower()


def wrap(env: gym.Env, options: GymnasiumOptions) -> gym.Env:
    """Adds action repeat, pictures and resizing, innermost first."""
    if options.action_repeat > 1:
        env = wrappers.ActionRepeat(env, options.action_repeat)
    if options.observation != "state":
        size = wrappers.parse_size(options.size or 64)
        return RenderedPicture(env, size, options.observation == "both")
    if options.size is not None:
        env = wrappers.ResizePicture(env, wrappers.parse_size(options.size))
    return env
