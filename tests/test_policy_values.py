"""What a policy takes and gives: ranges, infinities, rounding to the types of its spaces."""

from __future__ import annotations

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from ray.rllib.utils.spaces.space_utils import unsquash_action
from tiny import CONTINUOUS, IMAGE, MIXED, VECTOR
from walking import ACTIONS, ARM, make_policy

from rllib_dreamer.box_checks import FULL_CHECKS
from rllib_dreamer.envs.wrappers import CheckedEnv, EnvOutputError
from rllib_dreamer.policy import action_units, space_json
from rllib_dreamer.policy.policy import DreamerPolicy

BOUNDED = spaces.Box(-1.0, 1.0, (3,), np.float32)
HALF_OPEN = spaces.Box(-np.inf, 1.0, (3,), np.float32)
FREE = spaces.Box(-np.inf, np.inf, (3,), np.float32)
DOUBLE = spaces.Box(-np.inf, np.inf, (3,), np.float64)
COUNTS = spaces.Box(-3, 9, (3,), np.int8)

VALUES: list[tuple[spaces.Box, Any, str | None]] = [
    (BOUNDED, [0.0, 1.0, -1.0], None),
    (BOUNDED, [0.0, 1.0 + 1e-6, 0.0], None),
    (BOUNDED, [0.0, 7.0, 0.0], r"got values from 0\.0 to 7\.0, outside its space"),
    (BOUNDED, [0.0, np.inf, 0.0], "got 1 of 3 numbers that are NaN or inf"),
    (BOUNDED, [0.0, -np.inf, 0.0], "got 1 of 3 numbers that are NaN or inf"),
    (HALF_OPEN, [0.0, -np.inf, 0.0], None),
    (FREE, [np.inf, -np.inf, 0.0], "got 1 of 3 numbers that are NaN or inf"),
    (FREE, [np.nan, np.nan, 0.0], "got 2 of 3 numbers that are NaN or inf"),
    (FREE, [1e39, 0.0, 0.0], "got 1 of 3 numbers that are NaN or inf"),
    (DOUBLE, [1e39, -1e39, 0.0], "got 2 of 3 numbers that are NaN or inf"),
    (FREE, [3e38, 3e38, 3e38], None),
    (COUNTS, np.array([0, 9, 9], np.int64), None),
    (COUNTS, np.array([0, 10, 0], np.int64), "got values from 0 to 10, outside its space"),
    (COUNTS, np.array([0, 256, 0], np.int64), "got values from 0 to 256, outside its space"),
]


class Sends(gym.Env):
    """Sends one observation, over and over."""

    action_space = ARM

    def __init__(self, space: gym.Space, value: np.ndarray) -> None:
        self.observation_space, self.value = space, value

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        return self.value, {}


def ids(value: Any) -> str:
    return str(value)


class TestObservations:
    @pytest.mark.parametrize(("space", "value", "message"), VALUES, ids=ids)
    def test_what_training_refuses_is_refused(
        self, space: spaces.Box, value: Any, message: str | None
    ) -> None:
        policy, value = make_policy(space, ARM), np.asarray(value)
        env = CheckedEnv(Sends(space, value), "sends")
        if message is None:
            env.reset()
            assert np.isfinite(policy.act(value)).all()
            return
        with pytest.raises(EnvOutputError):
            env.reset()
        with pytest.raises(ValueError, match=rf"obs\['vector'\]: {message}"):
            policy.act(value)
        assert torch.isfinite(policy.state.deter).all()
        assert np.isfinite(policy.act(np.zeros(3, space.dtype))).all()

    def test_bounds_hold_where_an_episode_begins_as_in_training(self) -> None:
        policy = make_policy(BOUNDED, ARM)
        outside = np.array([0.0, 7.0, 0.0], np.float32)
        for _ in range(FULL_CHECKS):
            with pytest.raises(ValueError, match="outside its space"):
                policy.act(outside)
            policy.act(BOUNDED.sample())
        policy.act(outside)
        with pytest.raises(ValueError, match="NaN or inf"):
            policy.act(np.full(3, np.nan))
        policy.reset()
        with pytest.raises(ValueError, match="outside its space"):
            policy.act(outside)

    def test_bounds_do_not_hold_where_the_training_let_them_pass(self) -> None:
        agent = make_policy(BOUNDED, ARM).agent
        policy = DreamerPolicy(agent, BOUNDED, ARM, env_config={"check_spaces": False})
        policy.act(np.array([0.0, 7.0, 0.0]))
        with pytest.raises(ValueError, match="NaN or inf"):
            policy.act(np.array([0.0, np.inf, 0.0]))


class TestImagine:
    def test_checks_the_beginning_of_the_episode(self) -> None:
        policy, actions = make_policy(BOUNDED, ARM), np.zeros((2, 8, 2), np.float32)
        obs = np.zeros((2, 5, 3), np.float32)
        obs[1, FULL_CHECKS] = 7.0
        policy.imagine(obs, actions)
        obs[1, FULL_CHECKS - 1] = 7.0
        with pytest.raises(ValueError, match=r"got values from 0\.0 to 7\.0, outside its space"):
            policy.imagine(obs, actions)

    def test_refuses_actions_that_are_infinite(self) -> None:
        free = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        policy, actions = make_policy(BOUNDED, free), np.zeros((8, 2))
        for number in (np.nan, np.inf, -np.inf, 1e39):
            actions[3, 0] = number
            with pytest.raises(ValueError, match=r"actions\['action'\]: got 1 of 16 numbers that"):
                policy.imagine(np.zeros((5, 3)), actions)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
    def test_integers_are_rounded_and_stay_within_their_bounds(
        self, dtype: type, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        space = spaces.Box(0, 100, (3,), dtype)
        policy = make_policy(space, ARM)
        raw = torch.tensor([-40.0, 12.7, 300.0])

        def predictions(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"vector": raw.expand(len(outputs["vector"]), 3)}

        monkeypatch.setattr(policy.agent.world.decoder, "predictions", predictions)
        found = policy.imagine(np.zeros((5, 3), dtype), np.zeros((6, 2), np.float32)).obs
        assert found.dtype == dtype and found.tolist() == [[0, 13, 100]] * 2


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32])
def test_the_widest_integers_do_not_wrap(dtype: type) -> None:
    limits = np.iinfo(dtype)
    space = spaces.Box(limits.min, limits.max, (2,), dtype)
    found = action_units.to_array(torch.tensor([[-1e30, 1e30]]), space)
    assert found.tolist() == [[limits.min, limits.max]]


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_classes_keep_their_dtype_in_json(dtype: type) -> None:
    space = spaces.Discrete(5, start=2, dtype=dtype)
    text = json.dumps(space_json.space_to_json(space))
    found = space_json.space_from_json(json.loads(text))
    assert found == space and found.dtype == dtype
    assert found.sample().dtype == dtype


class TestSpaces:
    @pytest.mark.parametrize(
        "space",
        [
            VECTOR,
            IMAGE,
            MIXED,
            ACTIONS,
            spaces.Box(np.array([-np.inf, 0]), np.array([np.inf, 1]), dtype=np.float64),
            spaces.Tuple([spaces.MultiBinary((2, 3)), spaces.MultiDiscrete([3, 4], start=[1, 2])]),
            spaces.Box(-3, 9, (0,), np.int64),
            spaces.Dict({0: VECTOR, 1: spaces.Discrete(2)}),
        ],
    )
    def test_go_through_json(self, space: gym.Space) -> None:
        text = json.dumps(space_json.space_to_json(space), allow_nan=False)
        assert space_json.space_from_json(json.loads(text)) == space

    def test_refuse_what_cannot_be_written_or_read(self) -> None:
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            space_json.space_to_json(spaces.Text(5))
        with pytest.raises(ValueError, match="got the kind 'Text'"):
            space_json.space_from_json({"kind": "Text"})


class TestActionUnits:
    def test_there_and_back(self) -> None:
        for space in (*ACTIONS.spaces.values(), CONTINUOUS, spaces.Box(-np.inf, np.inf, (2,))):
            for conversion in action_units.CONVERSIONS:
                value = torch.as_tensor(np.asarray(space.sample())).unsqueeze(0)
                model = action_units.to_model(value, space, conversion)
                back = action_units.to_env(model, space, conversion)
                torch.testing.assert_close(back.double(), value.double(), atol=1e-5, rtol=1e-5)

    def test_unsquashes_and_clips_as_rllib_does(self) -> None:
        arm = ACTIONS["arm"]
        raw = torch.tensor([[-1.5, 0.25], [0.5, 1.7]])
        for row, found in zip(raw, action_units.to_env(raw, arm, "unsquash"), strict=True):
            np.testing.assert_allclose(found, unsquash_action(row.numpy(), arm))
        clipped = action_units.to_env(torch.tensor([[-3.0, 6.0]]), arm, "clip")
        np.testing.assert_array_equal(clipped, [[-2.0, 5.0]])
        assert action_units.to_env(raw, arm, "none") is not None

    @pytest.mark.parametrize("conversion", ["unsquash", "clip"])
    def test_stays_within_bounds_that_float32_has_not(self, conversion: str) -> None:
        space = spaces.Box(-0.1, np.array([0.1, 0.7]), (2,), np.float64)
        for value in (-5.0, 5.0):
            found = action_units.to_env(torch.full((1, 2), value), space, conversion)
            assert space.contains(action_units.to_array(found, space)[0])

    def test_follows_the_config(self) -> None:
        assert action_units.conversion_of({"normalize_actions": True}) == "unsquash"
        both = {"normalize_actions": False, "clip_actions": True}
        assert action_units.conversion_of(both) == "clip"
        assert action_units.conversion_of({"normalize_actions": False}) == "none"

    def test_refuses_an_unknown_conversion(self) -> None:
        agent = make_policy(BOUNDED, ARM).agent
        with pytest.raises(ValueError, match="conversion: got 'scale'; must be one of"):
            DreamerPolicy(agent, BOUNDED, ARM, conversion="scale")
