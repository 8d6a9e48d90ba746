"""Nested Gymnasium spaces as flat dicts of leaves, and values along with them.

The model, the replay and the catalog see observations and actions only as flat dicts keyed by the
path of the leaf (`"camera/front"`; the members of a Tuple are `"0"`, `"1"`, ...). Keys are sorted,
so that the order in which features are concatenated depends on the space alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


def is_image(space: gym.Space) -> bool:
    """True for a uint8 Box of shape (H, W) or (H, W, C): what is encoded as a picture."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)


def _members(space: gym.Space) -> list[tuple[str, Any, gym.Space]] | None:
    """The members of a Dict or Tuple, as name in a path, key and space; None for a leaf."""
    if isinstance(space, spaces.Dict):
        return [(str(key), key, member) for key, member in space.spaces.items()]
    if isinstance(space, spaces.Tuple):
        return [(str(i), i, member) for i, member in enumerate(space.spaces)]
    return None


def _paths(
    space: gym.Space, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], gym.Space]]:
    """The leaves of a space, each with the names that lead to it.

    Raises:
        ValueError: If a key is empty, or keys of a Dict are of several types, as 0 and "0", which
            RLlib cannot put in order, and which may have the same text.
    """
    members = _members(space)
    if members is None:
        yield path, space
        return
    types = sorted({type(key).__name__ for _, key, _ in members})
    if len(types) > 1:
        raise ValueError(
            f"the keys of {space} are of several types, {types}: make all of them str."
        )
    for name, _, member in members:
        if not name:
            raise ValueError(f"a key of {space} is empty: give its entry a name.")
        yield from _paths(member, (*path, name))


def _root_name(space: gym.Space) -> str:
    return "image" if is_image(space) else "vector"


def leaf_spaces(space: gym.Space, root: str | None = None) -> dict[str, gym.Space]:
    """Returns the leaves of a nested space, by path, in sorted order.

    Args:
        space: Any Gymnasium space; Dict and Tuple are descended into.
        root: The key of a space that is itself a leaf. By default "image" for a uint8 Box of rank
            two or three and "vector" for any other.

    Raises:
        ValueError: If two leaves have the same path, a leaf has no values, or the keys of a Dict
            are empty or of several types.
    """
    leaves: dict[str, gym.Space] = {}
    for names, leaf in _paths(space):
        path = "/".join(names) or root or _root_name(space)
        if path in leaves:
            raise ValueError(f"two leaves of a space have the path {path!r}: rename one.")
        if 0 in (leaf.shape or ()):
            raise ValueError(f"the entry {path!r} of a space has no values, {leaf}: leave it out.")
        leaves[path] = leaf
    return dict(sorted(leaves.items()))


def flatten(value: Any, space: gym.Space, root: str | None = None) -> dict[str, Any]:
    """Returns the leaves of `value`, an element of `space`, under the keys of `leaf_spaces`.

    Leaves are handed through untouched: they may be arrays or tensors with leading batch axes.
    """
    members = _members(space)
    if members is None:
        return {root or _root_name(space): value}
    leaves: dict[str, Any] = {}
    for name, key, member in members:
        if _members(member) is None:
            leaves[name] = value[key]
        else:
            leaves |= {f"{name}/{sub}": leaf for sub, leaf in flatten(value[key], member).items()}
    return dict(sorted(leaves.items()))


def unflatten(leaves: dict[str, Any], space: gym.Space, root: str | None = None) -> Any:
    """The inverse of `flatten`: puts leaves back into the nesting of `space`."""
    members = _members(space)
    if members is None:
        return leaves[root or _root_name(space)]
    children: dict[Any, Any] = {}
    for name, key, member in members:
        if _members(member) is None:
            children[key] = leaves[name]
        else:
            prefix = f"{name}/"
            inner = {k[len(prefix) :]: v for k, v in leaves.items() if k.startswith(prefix)}
            children[key] = unflatten(inner, member)
    return tuple(children.values()) if isinstance(space, spaces.Tuple) else children


def canonical(leaf: Any, space: gym.Space) -> Any:
    """Brings a leaf (..., *space.shape) into the model's form.

    Images become (..., h, w, C); vectors (..., n); class indices (..., n), counted from zero.
    """
    lead = leaf.shape[: leaf.ndim - len(space.shape or ())]
    if is_image(space):
        return leaf if len(space.shape or ()) == 3 else leaf[..., None]
    if isinstance(space, spaces.Discrete) and space.start:
        leaf = leaf - int(space.start)
    elif isinstance(space, spaces.MultiDiscrete) and np.any(space.start):
        leaf = leaf - _like(space.start, leaf)
    return leaf.reshape((*lead, -1))


def restore(leaf: Any, space: gym.Space) -> Any:
    """The inverse of `canonical` for action leaves: (..., n) -> (..., *space.shape)."""
    leaf = leaf.reshape((*leaf.shape[:-1], *(space.shape or ())))
    if isinstance(space, spaces.Discrete) and space.start:
        return leaf + int(space.start)
    if isinstance(space, spaces.MultiDiscrete) and np.any(space.start):
        return leaf + _like(space.start, leaf)
    return leaf


def _like(value: np.ndarray, leaf: Any) -> Any:
    """The array for an array; for a tensor one on its device, without a copy from the host."""
    if isinstance(leaf, np.ndarray):
        return value
    like = leaf.new_empty(value.shape)
    for place, number in np.ndenumerate(value):
        like[place].fill_(int(number))
    return like
