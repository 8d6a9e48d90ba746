"""Pictures of floats as uint8, the form in which the model and the replay take pictures."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TransformObservation
from numpy.typing import NDArray

from rllib_dreamer.spaces import flatten, leaf_spaces, unflatten


def with_byte_pictures(env: gym.Env) -> gym.Env:
    """Gives the float pictures of an env as uint8: the bounds of their space become 0 and 255.

    RLlib's `wrap_atari_for_new_api_stack` and `DMCEnv`, for example, scale pictures to floats. An
    env without such pictures is returned as it is.
    """
    space = env.observation_space
    pictures = {key: leaf for key, leaf in leaf_spaces(space).items() if _is_float_picture(leaf)}
    if not pictures:
        return env

    def convert(observation: Any) -> Any:
        leaves = flatten(observation, space)
        return unflatten(
            leaves | {key: _to_bytes(leaves[key], leaf) for key, leaf in pictures.items()}, space
        )

    return TransformObservation(env, convert, _byte_space(space))


def _is_float_picture(space: gym.Space) -> bool:
    """Whether a space is a float Box (h, w, C) with the same finite bounds everywhere."""
    if not isinstance(space, spaces.Box) or len(space.shape) != 3:
        return False
    if not np.issubdtype(space.dtype, np.floating):
        return False
    low, high = space.low.flat[0], space.high.flat[0]
    uniform = bool((space.low == low).all() and (space.high == high).all())
    return uniform and bool(np.isfinite([low, high]).all()) and bool(low < high)


def _to_bytes(picture: Any, space: Any) -> NDArray[np.uint8]:
    low, high = space.low.flat[0], space.high.flat[0]
    scaled = (np.asarray(picture, np.float32) - low) * (255.0 / (high - low))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _byte_space(space: gym.Space) -> gym.Space:
    """The same nesting, each float picture as a uint8 Box."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _byte_space(member) for key, member in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_byte_space(member) for member in space.spaces])
    if _is_float_picture(space):
        return spaces.Box(0, 255, space.shape, np.uint8)
    return space
