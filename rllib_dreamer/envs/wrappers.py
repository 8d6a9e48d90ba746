"""What the envs of this package share: options, action repeat, pictures, checks of their output."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NoReturn, SupportsFloat, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rllib_dreamer.box_checks import FULL_CHECKS, LARGEST_REWARD, is_outside, not_finite
from rllib_dreamer.envs.deadline import Deadline, DeadlineExpired
from rllib_dreamer.envs.success import last_info
from rllib_dreamer.near_names import nearest
from rllib_dreamer.spaces import flatten, is_image, leaf_spaces

Options = TypeVar("Options")
StepResult = tuple[Any, float, bool, bool, dict[str, Any]]


class EnvOutputError(ValueError):
    """An env returned something that is NaN, infinite or outside its declared space."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: Dotted name of the module.
        extra: The extra of this package that brings it.

    Raises:
        ImportError: It, or something it needs, is not installed; says the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{error.name or module} is not installed; run: pip install "rllib-dreamer[{extra}]"'
        ) from error


def parse_options(cls: type[Options], env_config: Mapping[str, Any] | None, env_id: str) -> Options:
    """Builds the options dataclass of a family from an `env_config`.

    Raises:
        ValueError: `env_config` has a key that the family does not know, or a wrong value.
    """
    given = dict(env_config or {})
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known = list(defaults)
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"env_config of {env_id!r} has an unknown key {key!r}: {nearest(key, known)} "
                f"All keys: {', '.join(known)}."
            )
        if isinstance(defaults[key], bool):
            require(isinstance(value, bool), key, value, "True or False")
    if given.get("seed") is not None:
        require_count("seed", given["seed"], minimum=0)
    return cls(**given)


def require(condition: bool, field: str, given: object, allowed: str) -> None:
    """Raises a ValueError that names the `env_config` field unless `condition` holds."""
    if not condition:
        raise ValueError(f"env_config[{field!r}] must be {allowed}; got {given!r}. Change it.")


def require_choice(field: str, given: object, allowed: tuple[str, ...]) -> None:
    """Raises a ValueError unless `given` is one of `allowed`."""
    require(given in allowed, field, given, "one of " + ", ".join(map(repr, allowed)))


def require_count(field: str, given: object, minimum: int = 1) -> None:
    """Raises a ValueError unless `given` is an int of at least `minimum`."""
    is_int = isinstance(given, int | np.integer) and not isinstance(given, bool)
    require(is_int and given >= minimum, field, given, f"an int >= {minimum}")  # type: ignore[operator]


def first_seed(env_config: Mapping[str, Any]) -> int | None:
    """Seed of the first episode: that of the config, shifted so that runners differ.

    Args:
        env_config: RLlib's `EnvContext` knows the index of its runner; any other is that of 0.
    """
    worker = getattr(env_config, "worker_index", 0) or 0
    seed = env_config.get("seed")
    return None if seed is None else seed + 1000 * worker


def film_fps(steps_per_second: float, action_repeat: int) -> int:
    """Pictures a second, one each agent step, at which a film keeps the env's own time."""
    return max(1, round(steps_per_second / action_repeat))


def parse_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) in pixels from one number or a pair.

    Raises:
        ValueError: It is neither, or a side is below 1.
    """
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    valid = len(sides) == 2 and all(isinstance(side, int) and side >= 1 for side in sides)
    require(valid, "size", size, "an int or (height, width) in pixels, each >= 1")
    return sides[0], sides[1]


def image_space(size: tuple[int, int], channels: int = 3) -> spaces.Box:
    """Returns the space of a uint8 picture of `size` (height, width)."""
    return spaces.Box(0, 255, (*size, channels), np.uint8)


class ActionRepeat(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Repeats each action, sums the rewards and stops at the end of the episode.

    The info is that of the last step; a success that an earlier one tells is kept in it.

    Args:
        env: The env; a time limit inside it goes on counting its own steps.
        repeat: Env steps per agent step, >= 1.
    """

    def __init__(self, env: gym.Env, repeat: int) -> None:
        """See the class."""
        require_count("action_repeat", repeat)
        gym.utils.RecordConstructorArgs.__init__(self, repeat=repeat)
        gym.Wrapper.__init__(self, env)
        self.repeat = repeat
        if env.metadata.get("render_fps"):
            fps = film_fps(env.metadata["render_fps"], repeat)
            self.metadata = {**env.metadata, "render_fps": fps}

    def step(self, action: Any) -> StepResult:
        """Steps up to `repeat` times; returns the last observation and the sum of rewards."""
        total, infos = 0.0, []
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            infos.append(info)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, last_info(infos)


def resize_picture(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resizes an (h, w) or (h, w, C) uint8 picture, any C >= 1, with Pillow's bilinear filter.

    The filter widens with the scale, so it averages when it shrinks (source: the official code
    resizes Atari frames with Pillow's BILINEAR). No channel has an influence on another.

    Args:
        picture: uint8 (h, w) or (h, w, C).
        size: (height, width) of the result.
    """
    if picture.shape[:2] == size:
        return picture
    if picture.ndim == 3 and picture.shape[-1] != 3:
        # One by one: Pillow takes the last of 2 or 4 for alpha, and other numbers not at all.
        channels = [resize_picture(channel, size) for channel in np.moveaxis(picture, -1, 0)]
        return np.stack(channels, axis=-1)  # (h, w, C)
    image = import_extra("PIL.Image", "atari")
    resized = image.fromarray(picture).resize((size[1], size[0]), image.Resampling.BILINEAR)
    return np.asarray(resized)


class ResizePicture(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Resizes the pictures of an env whose observation is a single uint8 picture.

    Args:
        env: The env; its observation space is a uint8 Box of shape (h, w) or (h, w, C).
        size: (height, width) in pixels.

    Raises:
        ValueError: The observation is another, or a picture (C, h, w) with the channels first.
    """

    def __init__(self, env: gym.Env, size: tuple[int, int]) -> None:
        """See the class."""
        gym.utils.RecordConstructorArgs.__init__(self, size=size)
        gym.ObservationWrapper.__init__(self, env)
        space = env.observation_space
        if not is_image(space):
            raise ValueError(
                f"env_config['size'] needs an env that observes one uint8 picture, got {space}"
                ". Remove 'size', or set observation='pixels'."
            )
        shape = space.shape or ()
        if len(shape) == 3 and shape[0] < min(shape[1:]):
            raise ValueError(
                f"env_config['size'] needs pictures with the channels last, (h, w, C); got {shape}"
                ", whose first axis is the smallest. Wrap the env so that it moves its channels "
                "last, np.moveaxis(picture, 0, -1), or remove 'size'."
            )
        self.size = size
        self.observation_space = spaces.Box(0, 255, (*size, *shape[2:]), np.uint8)

    def observation(self, observation: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the resized picture."""
        return resize_picture(observation, self.size)


class CheckedEnv(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Stops an env that raises, hangs or sends NaN or values outside its space; says where it did.

    Shapes and finiteness are checked at each step, bounds and dtypes in the first steps of each
    episode, where mistakes in a space show. An env with wrong output never reaches the replay:
    the error surfaces in the env runner, which discards the episode. A number of -inf counts as a
    missing value where the space allows it.

    Args:
        env: The env.
        env_id: Its name, for error messages.
        bounds: If False, values outside the bounds of their space are let through.
        timeout_s: Seconds that the env may take for a step or a reset; None for any time.
        first_seed: Seed of the first reset if that is given none.
    """

    def __init__(
        self,
        env: gym.Env,
        env_id: str,
        bounds: bool = True,
        timeout_s: float | None = None,
        first_seed: int | None = None,
    ) -> None:
        """See the class."""
        gym.utils.RecordConstructorArgs.__init__(
            self, env_id=env_id, bounds=bounds, timeout_s=timeout_s, first_seed=first_seed
        )
        gym.Wrapper.__init__(self, env)
        self.env_id = env_id
        self.bounds = bounds
        self._leaves = leaf_spaces(env.observation_space)
        self._nested = isinstance(env.observation_space, spaces.Dict | spaces.Tuple)
        self._deadline = Deadline(timeout_s)
        self._first_seed = first_seed
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Resets the env and checks its first observation."""
        seed = self._first_seed if seed is None else seed
        self._first_seed = None
        self._step = 0
        try:
            with self._deadline:
                observation, info = self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._named(error, "reset()") from error
        self._check(observation)
        return observation, info

    def step(self, action: Any) -> StepResult:
        """Steps the env and checks its observation and reward."""
        self._step += 1
        try:
            with self._deadline:
                observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise self._named(error, "step()") from error
        number = self._checked_reward(reward)
        self._check(observation)
        return observation, number, bool(terminated), bool(truncated), info

    def _named(self, error: Exception, call: str) -> Exception:
        where = f"{call} at agent step {self._step} of its episode"
        if isinstance(error, DeadlineExpired):
            return RuntimeError(
                f"Env {self.env_id!r} hangs in {where}: no answer within "
                f"{self._deadline.seconds:g} s. If it needs longer, raise "
                "config.env_runners(sample_timeout_s=...)."
            )
        return RuntimeError(
            f"Env {self.env_id!r} raised in {where}: {type(error).__name__}: {error}"
        )

    def _fail(self, key: str, what: str) -> NoReturn:
        raise EnvOutputError(
            f"Env {self.env_id!r}, agent step {self._step} of its episode, key {key!r}: {what}"
        )

    def _checked_reward(self, reward: SupportsFloat) -> float:
        try:
            value = float(reward)
        except (TypeError, ValueError):
            value = math.nan
        if not abs(value) <= LARGEST_REWARD:  # also of NaN
            self._fail("reward", f"the reward is {reward!r}; it must be finite (as float32).")
        return value

    def _values(self, observation: Any) -> dict[str, Any]:
        if not self._nested:
            return dict.fromkeys(self._leaves, observation)
        try:
            return flatten(observation, self.env.observation_space)
        except (KeyError, IndexError, TypeError) as error:
            space = self.env.observation_space
            self._fail("observation", f"its nesting is not that of the space {space} ({error!r}).")

    def _check(self, observation: Any) -> None:
        values = self._values(observation)
        full = self.bounds and self._step < FULL_CHECKS
        for key, space in self._leaves.items():
            if isinstance(space, spaces.Box):
                value = np.asarray(values[key])
                if value.shape != space.shape:
                    self._fail(key, f"shape {value.shape}, but its space says {space.shape}.")
                self._check_finite(key, value, space)
                if full:
                    self._check_box(key, value, space)
            elif full and not space.contains(values[key]):
                self._fail(key, f"{values[key]!r} is not in its space {space}.")

    def _check_finite(self, key: str, value: NDArray[Any], space: spaces.Box) -> None:
        bad = not_finite(value, space)
        if bad:
            self._fail(key, f"{bad} of {value.size} numbers are NaN or inf (as float32).")

    def _check_box(self, key: str, value: NDArray[Any], space: spaces.Box) -> None:
        if space.dtype is not None and not np.can_cast(value.dtype, space.dtype, "same_kind"):
            self._fail(key, f"dtype {value.dtype} cannot be stored as {space.dtype} of its space.")
        if is_outside(value, space):
            self._fail(
                key,
                f"values from {value.min()} to {value.max()} leave its space {space}. Correct the "
                "space, or set env_config['check_spaces']=False to accept them.",
            )
