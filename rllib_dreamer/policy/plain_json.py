"""Configs and results in what JSON has, and back: numpy's numbers and infinities included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_FLOAT = "__float__"
"""Only key of the object that stands for an infinity, which JSON has not: {"__float__": "-inf"}."""


def to_plain(value: Any) -> Any:
    """A value in dicts with text as keys, lists, numbers, text, bools and None.

    Tuples and arrays become lists, NaN, which stands for unknown, None, and any other object its
    text. `from_plain` gives infinities back.
    """
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else {_FLOAT: str(value)}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def from_plain(value: Any) -> Any:
    """What `to_plain` was given, as far as JSON can tell."""
    if isinstance(value, Mapping):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: from_plain(item) for key, item in value.items()}
    return [from_plain(item) for item in value] if isinstance(value, list) else value
