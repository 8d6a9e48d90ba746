"""Whether an episode reached its goal, as environments tell it in the info of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

SUCCESS_KEYS = ("success", "is_success")
"""Keys of an info: of robosuite and Meta-World, and of Gymnasium-Robotics."""


def _is_success(told: Any) -> bool:
    """Whether a value tells a success; of several, as tasks with two arms tell, all must."""
    values = np.asarray(told, object)  # which takes text too
    return values.size > 0 and bool(np.all(values))


def success_of(infos: Iterable[Mapping[str, Any]]) -> bool | None:
    """Whether any of the infos of an episode tells a success; None if none has such a key."""
    told = [_is_success(info[key]) for info in infos for key in SUCCESS_KEYS if key in info]
    return any(told) if told else None


def last_info(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last of the infos of an action repeat, with a success that any of them tells.

    Args:
        infos: One of each env step, at least one.
    """
    merged = dict(infos[-1])
    for key in SUCCESS_KEYS:
        told = [info[key] for info in infos if key in info]
        if told:
            merged[key] = next((value for value in told if _is_success(value)), told[-1])
    return merged
