from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tiny import IMAGE, VECTOR, assert_same

from rllib_dreamer.spaces import canonical, flatten, is_image, leaf_spaces, restore, unflatten

NESTED = spaces.Dict(
    {
        "b": spaces.Tuple((VECTOR, spaces.Dict({"y": IMAGE, "x": spaces.Discrete(3)}))),
        "a": spaces.MultiBinary(2),
    }
)
_BY_NUMBER: dict[Any, gym.Space] = {10: IMAGE, 9: spaces.Discrete(3)}
_NUMBERS: dict[Any, gym.Space] = {0: VECTOR, 1: spaces.Dict(_BY_NUMBER)}
NUMBERED = spaces.Dict(_NUMBERS)
LONG = spaces.Tuple(tuple(spaces.Discrete(n + 2) for n in range(12)))
SPACES = [
    VECTOR,
    IMAGE,
    NESTED,
    LONG,
    spaces.Box(-1, 1, (), np.float32),
    spaces.Box(-1, 1, (2, 3), np.float32),
    spaces.Box(0, 255, (32, 16), np.uint8),
    spaces.Discrete(4, start=-2),
    spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 2], [-3, 0]]),
    spaces.MultiBinary((2, 3)),
    spaces.Tuple((spaces.Discrete(2), spaces.Tuple((VECTOR,)))),
    NUMBERED,
]


def test_keys_of_leaves_are_sorted_paths() -> None:
    assert list(leaf_spaces(NESTED)) == ["a", "b/0", "b/1/x", "b/1/y"]
    assert leaf_spaces(NESTED)["b/1/y"] is IMAGE


@pytest.mark.parametrize(
    ("space", "root", "key"),
    [
        (IMAGE, None, "image"),
        (spaces.Box(0, 255, (32, 32), np.uint8), None, "image"),
        (VECTOR, None, "vector"),
        (spaces.Discrete(2), None, "vector"),
        (IMAGE, "action", "action"),
    ],
)
def test_key_of_a_single_leaf(space: gym.Space, root: str | None, key: str) -> None:
    assert list(leaf_spaces(space, root)) == [key]
    assert list(flatten(space.sample(), space, root)) == [key]


def test_two_leaves_of_one_path_are_refused() -> None:
    space = spaces.Dict({"a/b": VECTOR, "a": spaces.Dict({"b": IMAGE})})
    with pytest.raises(ValueError, match="two leaves of a space have the path 'a/b'"):
        leaf_spaces(space)


@pytest.mark.parametrize("other", [VECTOR, spaces.Dict({"a": VECTOR})], ids=str)
def test_keys_of_several_types_are_refused(other: gym.Space) -> None:
    """Gymnasium lets them pass; RLlib sorts keys, and a path could stand for two of them."""
    members: dict[Any, gym.Space] = {0: spaces.Dict({"b": VECTOR}), "0": other}
    with pytest.raises(ValueError, match=r"keys of Dict.* several types, \['int', 'str'\]: make"):
        leaf_spaces(spaces.Dict(members))


@pytest.mark.parametrize("member", [VECTOR, spaces.Dict({"a": VECTOR})], ids=str)
def test_an_empty_key_is_refused(member: gym.Space) -> None:
    with pytest.raises(ValueError, match=r"a key of Dict.* is empty: give its entry a name"):
        leaf_spaces(spaces.Dict({"b": spaces.Dict({"": member})}))


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_a_leaf_without_values_is_refused(shape: tuple[int, ...]) -> None:
    leaf = spaces.Box(-1, 1, shape)
    with pytest.raises(ValueError, match=r"the entry 'a/b' of a space has no values, Box.*leave"):
        leaf_spaces(spaces.Dict({"a": spaces.Dict({"b": leaf}), "c": VECTOR}))
    with pytest.raises(ValueError, match="the entry 'action' of a space has no values"):
        leaf_spaces(leaf, "action")


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_flatten_and_unflatten_are_inverse(space: gym.Space) -> None:
    value = space.sample()
    leaves = flatten(value, space)
    assert list(leaves) == list(leaf_spaces(space))
    for key, leaf in leaf_spaces(space).items():
        assert leaf.contains(leaves[key]), key
    back = unflatten(leaves, space)
    assert type(back) is type(value)
    assert_same(back, value)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_canonical_and_restore_are_inverse(space: gym.Space, lead: tuple, kind: Any) -> None:
    for leaf in leaf_spaces(space).values():
        samples = np.stack([leaf.sample() for _ in range(int(np.prod(lead)))])
        value = kind(samples.reshape((*lead, *(leaf.shape or ()))))
        model = canonical(value, leaf)
        assert model.shape[: len(lead)] == lead
        if is_image(leaf):
            assert model.ndim == len(lead) + 3
            continue
        assert model.ndim == len(lead) + 1
        if not isinstance(leaf, spaces.Box):
            assert model.min() >= 0
        assert_same(restore(model, leaf), value)


def test_canonical_counts_classes_from_zero() -> None:
    leaf = spaces.MultiDiscrete([2, 3], start=[5, -1])
    assert canonical(np.array([[6, -1], [5, 1]]), leaf).tolist() == [[1, 0], [0, 2]]
    assert canonical(np.array([3, 4]), spaces.Discrete(2, start=3)).tolist() == [[0], [1]]


def test_tensors_are_counted_from_zero_without_a_copy_from_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA would wait for such a copy, and cannot have it in a graph."""
    for copies in ("new_tensor", "to", "copy_"):
        monkeypatch.setattr(torch.Tensor, copies, lambda *_: pytest.fail("copied"))
    value = torch.tensor([[6, -1], [5, 1]])
    monkeypatch.setattr(torch, "tensor", lambda *_: pytest.fail("copied"))
    leaf = spaces.MultiDiscrete([2, 3], start=[5, -1])
    assert canonical(value, leaf).tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize(
    ("space", "image"),
    [
        (IMAGE, True),
        (spaces.Box(0, 255, (8, 8), np.uint8), True),
        (spaces.Box(0, 255, (8,), np.uint8), False),
        (spaces.Box(0, 1, (8, 8, 3), np.float32), False),
        (spaces.Discrete(2), False),
    ],
)
def test_what_is_an_image(space: gym.Space, image: bool) -> None:
    assert is_image(space) is image
