"""Which numbers of an observation count as wrong: the same while training and while acting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

FULL_CHECKS = 3
"""Observations of each episode compared with the bounds of their space (all with its shapes)."""


def not_finite(value: NDArray[Any], space: spaces.Box | None) -> int:
    """How many numbers are NaN or infinite, or would be as float32, the form the model takes.

    Args:
        value: (..., *space.shape), any leading axes.
        space: Of an observation, whose numbers may be -inf, for missing, where the space begins
            there. None for other values.
    """
    if value.dtype.kind != "f":
        return 0
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(np.add.reduce(value, axis=None, dtype=np.float32)):
            return 0
        single = value.astype(np.float32)  # a sum may also overflow
    bad = ~np.isfinite(single)
    if space is not None:
        bad &= ~(np.isneginf(value) & np.isneginf(space.low))
    return int(bad.sum())


def is_outside(value: NDArray[Any], space: spaces.Box) -> bool:
    """Whether a number leaves the bounds of its space by more than rounding.

    Args:
        value: (..., *space.shape), any leading axes.
        space: Its space.
    """
    slack = 1e-5 * (1 + np.abs(value)) if value.dtype.kind == "f" else 0
    return bool((value < space.low - slack).any() or (value > space.high + slack).any())
