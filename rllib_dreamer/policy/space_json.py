"""Gymnasium spaces as JSON, so that they can be read without unpickling anything."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """Describes a space in plain dicts, lists, numbers and strings.

    Raises:
        ValueError: If the space is of a kind that the agent does not take either.
    """
    if isinstance(space, spaces.Dict):
        members = [[key, space_to_json(member)] for key, member in space.spaces.items()]
        return {"kind": "Dict", "spaces": members}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "spaces": [space_to_json(member) for member in space.spaces]}
    if isinstance(space, spaces.Box):
        bounds = {"low": _bound(space.low), "high": _bound(space.high)}
        return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Discrete):
        numbers = {"n": int(space.n), "start": int(space.start)}
        return {"kind": "Discrete", "dtype": str(space.dtype), **numbers}
    if isinstance(space, spaces.MultiDiscrete):
        lists = {"nvec": space.nvec.tolist(), "start": np.asarray(space.start).tolist()}
        return {"kind": "MultiDiscrete", "dtype": str(space.dtype), **lists}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "shape": list(space.shape)}
    raise ValueError(
        f"{space} cannot be written as JSON: Box, Discrete, MultiDiscrete, MultiBinary and Dicts "
        "and Tuples of them can."
    )


def space_from_json(described: dict[str, Any]) -> gym.Space:
    """The inverse of `space_to_json`.

    Raises:
        ValueError: If the kind of space is unknown.
    """
    kind = described["kind"]
    if kind == "Dict":
        return spaces.Dict([(key, space_from_json(sub)) for key, sub in described["spaces"]])
    if kind == "Tuple":
        return spaces.Tuple([space_from_json(sub) for sub in described["spaces"]])
    if kind == "Box":
        dtype, shape = np.dtype(described["dtype"]), tuple(described["shape"])
        low, high = (_array(described[side], shape, dtype) for side in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        dtype = np.dtype(described["dtype"])
        return spaces.Discrete(described["n"], start=described["start"], dtype=dtype.type)
    if kind == "MultiDiscrete":
        dtype = np.dtype(described["dtype"])
        nvec, start = (np.array(described[name], dtype) for name in ("nvec", "start"))
        return spaces.MultiDiscrete(nvec, dtype=dtype.type, start=start)
    if kind == "MultiBinary":
        return spaces.MultiBinary(described["shape"])
    raise ValueError(f"space: got the kind {kind!r}, which this version cannot read: update it.")


def _bound(values: np.ndarray) -> Any:
    """One number if all are equal, else nested lists; infinities as text, which JSON has not."""
    same = values.size > 0 and (values == values.flat[0]).all()
    return _finite(values.flat[0].item() if same else values.tolist())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if np.isfinite(value) else str(value)


def _array(value: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    values = np.asarray(value, object)
    numbers = np.vectorize(float if dtype.kind == "f" else int, otypes=[dtype])(values)
    return np.array(np.broadcast_to(numbers, shape), dtype)
