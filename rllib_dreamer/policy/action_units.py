"""Actions between the model's form and the environment's units, as RLlib converts them."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rllib_dreamer.spaces import canonical, restore

CONVERSIONS = ("unsquash", "clip", "none")
"""RLlib's `normalize_actions`, else its `clip_actions`, else neither."""


def conversion_of(settings: Mapping[str, object]) -> str:
    """The conversion that a config asks for."""
    if settings.get("normalize_actions", True):
        return "unsquash"
    return "clip" if settings.get("clip_actions", False) else "none"


def to_env(leaf: Tensor, space: gym.Space, conversion: str) -> Tensor:
    """Action leaf of the model (n, size) -> (n, *space.shape) in the env's units.

    With "unsquash", [-1, 1] maps onto the bounds of a bounded Box, low + (a + 1) (high - low) / 2,
    and what lies outside is clipped; "clip" only clips.
    """
    leaf = restore(leaf, space)
    if not isinstance(space, spaces.Box) or conversion == "none":
        return leaf
    low, high = _bounds(space, leaf.device)
    if conversion == "unsquash":
        if not _bounded(space):
            return leaf
        leaf = low + (leaf + 1.0) * (high - low) / 2.0
    return torch.minimum(torch.maximum(leaf, low), high)


def to_model(leaf: Tensor, space: gym.Space, conversion: str) -> Tensor:
    """The inverse of `to_env`, (n, *space.shape) -> (n, size), up to what was clipped."""
    if isinstance(space, spaces.Box):
        leaf = leaf.float()
        if conversion == "unsquash" and _bounded(space):
            low, high = _bounds(space, leaf.device)
            width = torch.where(high > low, high - low, torch.ones_like(low))
            leaf = (leaf - low) / width * 2.0 - 1.0
    return canonical(leaf, space)


def to_array(leaf: Tensor, space: gym.Space) -> np.ndarray:
    """A leaf in the env's units as an array of the space's dtype.

    For a Box of integers numbers are rounded and clipped to its bounds first: a cast would wrap.
    """
    array = leaf.cpu().numpy()
    if not isinstance(space, spaces.Box) or np.dtype(space.dtype).kind not in "iu":
        return array.astype(space.dtype)
    within = np.rint(array).clip(space.low, space.high)
    with np.errstate(invalid="ignore"):  # the highest of 64 bits is beyond them as a float
        return np.where(within >= space.high, space.high, within.astype(space.dtype))


def _bounded(space: spaces.Box) -> bool:
    return bool(space.bounded_below.all() and space.bounded_above.all())


def _bounds(space: spaces.Box, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bounds as float32, rounded inwards so that an action within them is within the space."""
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    low = np.where(low < space.low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > space.high, np.nextafter(high, np.float32(-np.inf)), high)
    return torch.from_numpy(low).to(device), torch.from_numpy(high).to(device)
