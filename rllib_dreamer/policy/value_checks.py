"""Checks of observations and actions that a user hands over, before the model sees them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from rllib_dreamer.box_checks import FULL_CHECKS, is_outside, not_finite
from rllib_dreamer.spaces import flatten, is_image, leaf_spaces

Bounded = tuple[slice, ...] | None
"""Index of the values that are held against the bounds of their space."""
ALL: Bounded = ()
NONE: Bounded = None


def first_steps(lead: tuple[int, ...]) -> Bounded:
    """Of sequences (C,) or (B, C) of observations those that training compares with bounds."""
    return (*(slice(None) for _ in lead[1:]), slice(FULL_CHECKS))


def check_observation(
    obs: Any, space: gym.Space, lead: tuple[int, ...] = (), bounded: Bounded = ALL
) -> dict[str, np.ndarray]:
    """Returns the leaves of an observation, checked and in the dtypes of their spaces.

    Args:
        obs: An observation with the leading axes `lead`.
        space: The observation space.
        lead: For example (n,) for a batch.
        bounded: Of the observations that have to keep to the bounds of their boxes; by default
            all. What an env sends later in an episode is not compared in training either.

    Raises:
        ValueError: If it is nested otherwise, or a leaf is of another shape, dtype or range.
    """
    leaves = leaf_spaces(space)
    values = _leaves(obs, space, "observation")
    arrays = {}
    for key, leaf in leaves.items():
        name = f"obs[{key!r}]"
        array = _of_form(name, values[key], leaf, lead)
        if isinstance(leaf, spaces.Box):
            _check_finite(name, array, leaf)
            _check_bounds(name, array, leaf, bounded)
        arrays[key] = _stored(array, leaf)
    return arrays


def check_future(actions: Any, space: gym.Space, lead: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns the leaves of the actions for `DreamerPolicy.imagine`, checked.

    Args:
        actions: Leaves (C - 1 + H, ...) or (B, C - 1 + H, ...).
        space: The action space.
        lead: Leading axes (C,) or (B, C) of the observations.

    Raises:
        ValueError: If shapes or dtypes do not fit, a number is NaN or infinite, or no action is
            left for the future.
    """
    leaves = leaf_spaces(space, root="action")
    values = _leaves(actions, space, "action", root="action")
    first = next(iter(leaves))
    shape = np.shape(values[first])
    steps = shape[len(lead) - 1] if len(shape) >= len(lead) else 0
    if steps < lead[-1]:
        raise ValueError(
            f"actions[{first!r}]: got shape {shape} for {lead[-1]} observations; must have at "
            f"least {lead[-1]} steps: the {lead[-1] - 1} between the observations, then those of "
            "the future."
        )
    arrays = {}
    for key, leaf in leaves.items():
        name = f"actions[{key!r}]"
        array = _of_form(name, values[key], leaf, (*lead[:-1], steps))
        _check_finite(name, array, None)
        arrays[key] = _stored(array, leaf)
    return arrays


def leading_axes(obs: Any, space: gym.Space) -> tuple[int, ...]:
    """The axes (C,) or (B, C) in front of a sequence of observations.

    Raises:
        ValueError: If there is another number of them, or one is empty.
    """
    key, leaf = next(iter(leaf_spaces(space).items()))
    shape = np.shape(_leaves(obs, space, "observation")[key])
    lead = shape[: len(shape) - len(leaf.shape or ())]
    if len(lead) not in (1, 2) or 0 in lead:
        raise ValueError(
            f"obs[{key!r}]: got shape {shape}; must be (steps, {_dims(leaf)}) or "
            f"(rows, steps, {_dims(leaf)})."
        )
    return lead


def _leaves(value: Any, space: gym.Space, what: str, root: str | None = None) -> dict[str, Any]:
    try:
        return flatten(value, space, root)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{what}: got {type(value).__name__}, not nested like its space {space}: "
            f"{type(error).__name__} {error}."
        ) from error


def _of_form(name: str, value: Any, space: gym.Space, lead: tuple[int, ...]) -> np.ndarray:
    """The value as an array, of the shape, kind of dtype and classes of its space."""
    array = np.asarray(value)
    if array.shape != (*lead, *(space.shape or ())):
        raise ValueError(_wrong_shape(name, array, space, lead))
    dtype = np.dtype(space.dtype)
    discrete = not isinstance(space, spaces.Box)
    same = array.dtype == np.uint8 if is_image(space) else _fits(array.dtype, dtype, discrete)
    if not same:
        hint = "give pixels in 0..255" if is_image(space) else "convert it first"
        raise ValueError(f"{name}: got dtype {array.dtype}; must be {dtype}: {hint}.")
    if discrete:
        _check_classes(name, array, space)
    return array


def _check_finite(name: str, array: np.ndarray, space: spaces.Box | None) -> None:
    bad = not_finite(array, space)
    if bad:
        raise ValueError(
            f"{name}: got {bad} of {array.size} numbers that are NaN or inf (as float32); all "
            "must be finite: look for where they come from."
        )


def _check_bounds(name: str, array: np.ndarray, space: spaces.Box, bounded: Bounded) -> None:
    """Refuses what leaves the bounds, and integers that the space's dtype cannot hold."""
    held = array if bounded is NONE else array[bounded]
    changed = np.dtype(space.dtype).kind in "iu" and bool((_stored(held, space) != held).any())
    if changed or (bounded is not NONE and is_outside(held, space)):
        raise ValueError(
            f"{name}: got values from {held.min()} to {held.max()}, outside its space {space}: "
            "give the units of the training (env_config check_spaces=False lifts bounds)."
        )


def _stored(array: np.ndarray, space: gym.Space) -> np.ndarray:
    """The array in the dtype of its space, classes as int64."""
    dtype = np.dtype(space.dtype) if isinstance(space, spaces.Box) else np.dtype(np.int64)
    return np.ascontiguousarray(array, dtype).reshape(array.shape)


def _wrong_shape(name: str, array: np.ndarray, space: gym.Space, lead: tuple[int, ...]) -> str:
    expected = (*lead, *(space.shape or ()))
    text = f"{name}: got shape {array.shape}; must be {expected}"
    if not lead and array.ndim == len(expected) + 1:
        return f"{text}: for a batch call policy.reset(n={array.shape[0]}) first."
    if len(lead) == 1 and array.shape == expected[1:]:
        return f"{text}: policy.reset() without n is for single observations."
    return f"{text}, as in the space {space}."


def _fits(given: np.dtype, wanted: np.dtype, discrete: bool) -> bool:
    """Whether a conversion keeps the meaning: any real numbers for floats, integers for classes."""
    if discrete:
        return given.kind in "iub"
    return given.kind in "fiub" if wanted.kind == "f" else np.can_cast(given, wanted, "same_kind")


def _check_classes(name: str, array: np.ndarray, space: gym.Space) -> None:
    if isinstance(space, spaces.MultiBinary):
        low, high = np.asarray(0), np.asarray(1)
    else:
        assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
        low = np.asarray(space.start)
        high = low + np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
    if (array < low).any() or (array > high).any():
        raise ValueError(f"{name}: got {array.min()} to {array.max()}, outside its space {space}.")


def _dims(space: gym.Space) -> str:
    return ", ".join(map(str, space.shape or ())) or "scalar"
