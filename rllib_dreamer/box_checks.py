"""Which numbers of an observation count as wrong: the same while training and while acting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

FULL_CHECKS = 3
"""Observations of each episode compared with the bounds of their space (all with its shapes)."""


LARGEST_REWARD = float(np.finfo(np.float32).max)


def not_finite(value: NDArray[Any], space: spaces.Box | None) -> int:
    """How many numbers `is_finite` refuses, which takes no time where there is none.

    Args:
        value: (..., *space.shape), any leading axes.
        space: See `is_finite`.
    """
    if value.dtype.kind != "f":
        return 0
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(np.add.reduce(value, axis=None, dtype=np.float32)):
            return 0
    return int(np.count_nonzero(~is_finite(value, space)))  # a sum may also overflow


def is_finite(value: NDArray[Any], space: spaces.Box | None) -> NDArray[np.bool_]:
    """Which numbers are finite, also as float32, the form the model takes.

    Args:
        value: (..., *space.shape), any leading axes.
        space: Of an observation, whose numbers may be -inf, for missing, where the space begins
            there. None for other values.
    """
    with np.errstate(over="ignore"):
        good = np.isfinite(value.astype(np.float32))
    if space is not None:
        good |= np.isneginf(value) & np.isneginf(space.low)
    return good


def is_outside(value: NDArray[Any], space: spaces.Box) -> bool:
    """Whether a number leaves the bounds of its space by more than rounding.

    Args:
        value: (..., *space.shape), any leading axes.
        space: Its space.
    """
    slack = 1e-5 * (1 + np.abs(value)) if value.dtype.kind == "f" else 0
    return bool((value < space.low - slack).any() or (value > space.high + slack).any())
