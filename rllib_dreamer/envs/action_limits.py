"""Actions in [-1, 1] as the controls of a simulator."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

UNBOUNDED = 1e9
"""Limits beyond this (lqr: 1e10) mean "no limit"; such actions are passed on unscaled."""


class ActionLimits(NamedTuple):
    """The affine map of [-1, 1] onto limits, center + scale * action; all float64 (n,)."""

    center: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def between(cls, low: NDArray[Any], high: NDArray[Any]) -> ActionLimits:
        """For limits (n,), lowest and highest, in the simulator's units."""
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        bounded = (np.abs(low) < UNBOUNDED) & (np.abs(high) < UNBOUNDED)
        center = np.where(bounded, (low + high) / 2, 0.0)
        return cls(center, np.where(bounded, (high - low) / 2, 1.0))

    def control(self, action: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The control (n,) for an action (n,), which is clipped to [-1, 1] first."""
        return self.center + self.scale * np.clip(np.asarray(action, np.float64), -1.0, 1.0)
