"""Action repeat, resizing, checks of what an env sends."""

from __future__ import annotations

import threading
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_match import check_environments_match

from rllib_dreamer.envs import wrappers


class Scripted(gym.Env):
    """Sends the observations and rewards it is given, and ends after `length` steps."""

    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (4, 4, 3), np.uint8),
            "joints": spaces.Dict({"left": spaces.Box(-1, 1, (2,), np.float32)}),
            "mode": spaces.Discrete(3),
        }
    )
    action_space = spaces.Discrete(2)

    def __init__(self, changes=None, reward=1.0, length=5):
        self.changes = changes or {}
        self.reward_sent = reward
        self.length = length
        self.steps = 0

    def observation(self):
        sent = {
            "camera": np.zeros((4, 4, 3), np.uint8),
            "joints": {"left": np.zeros(2, np.float32)},
            "mode": 1,
        }
        return sent | self.changes.get(self.steps, {})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation(), {}

    def step(self, action):
        self.steps += 1
        if action == 1:
            raise ZeroDivisionError("gripper")
        return self.observation(), self.reward_sent, False, self.steps >= self.length, {}


def run(changes=None, steps=5, action=0, bounds=True, **kwargs):
    env = wrappers.CheckedEnv(Scripted(changes, **kwargs), "robot", bounds)
    env.reset()
    return [env.step(action) for _ in range(steps)]


def test_good_output_passes_through():
    results = run()
    assert [result[1:4] for result in results] == [(1.0, False, False)] * 4 + [(1.0, False, True)]


NAN = {"joints": {"left": np.array([0, np.nan], np.float32)}}
WIDE = np.zeros((4, 5, 3), np.uint8)
OUTSIDE = {"joints": {"left": np.array([0, 7], np.float32)}}


@pytest.mark.parametrize(
    ("changes", "step", "key", "what"),
    [
        (NAN, 0, "joints/left", "1 of 2 numbers are NaN or inf"),
        (NAN, 4, "joints/left", "1 of 2 numbers are NaN or inf"),
        (OUTSIDE, 1, "joints/left", "values from 0.0 to 7.0 leave its space"),
        (
            {"camera": np.zeros((4, 5, 3), np.uint8)},
            4,
            "camera",
            r"shape \(4, 5, 3\), but .*\(4, 4, 3\)",
        ),
        ({"camera": np.zeros((4, 4, 3))}, 1, "camera", "dtype float64 cannot be stored as uint8"),
        ({"mode": 3}, 2, "mode", r"3 is not in its space Discrete\(3\)"),
        ({"joints": np.zeros(2)}, 1, "observation", "its nesting is not that of the space"),
    ],
)
def test_bad_output_names_env_step_and_key(changes, step, key, what):
    message = f"Env 'robot', agent step {step} of its episode, key '{key}': .*{what}"
    with pytest.raises(wrappers.EnvOutputError, match=message):
        run({step: changes})


def test_minus_infinity_is_a_missing_value_where_the_space_allows_it():
    def check(low, number):
        env = Scripted()
        env.observation_space = spaces.Box(low, np.inf, (2,), np.float32)
        env.observation = lambda: np.array([0, number], np.float32)
        wrappers.CheckedEnv(env, "robot").reset()

    check(-np.inf, -np.inf)
    check(-np.inf, np.finfo(np.float32).max)
    for low, number in ((0.0, -np.inf), (-np.inf, np.inf), (-np.inf, np.nan)):
        with pytest.raises(wrappers.EnvOutputError, match="1 of 2 numbers are NaN or inf"):
            check(low, number)


def test_large_numbers_whose_sum_overflows_are_let_through():
    env = Scripted()
    env.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    env.observation = lambda: np.full(2, np.finfo(np.float32).max, np.float32)
    wrappers.CheckedEnv(env, "robot").reset()


@pytest.mark.parametrize("reward", [np.nan, np.inf, 1e39, None, np.zeros(2), "much"])
def test_bad_reward_is_named(reward):
    with pytest.raises(wrappers.EnvOutputError, match=r"step 1 .*key 'reward': the reward is"):
        run(reward=reward)


def test_bounds_are_checked_at_the_start_of_each_episode_only_or_not_at_all():
    run({4: OUTSIDE})
    run({1: OUTSIDE}, bounds=False)
    with pytest.raises(wrappers.EnvOutputError, match="NaN"):
        run({1: NAN}, bounds=False)


def test_an_env_that_raises_is_named():
    with pytest.raises(
        RuntimeError,
        match=r"Env 'robot' raised in step\(\) at agent step 1 .*: ZeroDivisionError: gripper",
    ) as error:
        run(action=1)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


class Waiting(Scripted):
    """Waits in its step, for nothing or for what answers that it gave up."""

    def step(self, action):
        if action == 1:
            raise TimeoutError("the robot at 10.0.0.7 did not answer")
        threading.Event().wait(30)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (0, r"Env 'robot' hangs in step\(\) at .*: no answer within 0\.05 s.*sample_timeout_s"),
        (1, r"Env 'robot' raised in step\(\) at .*: TimeoutError: the robot at 10\.0\.0\.7 did"),
    ],
)
def test_an_env_that_hangs_is_told_from_one_that_gives_up(action, message):
    env = wrappers.CheckedEnv(Waiting(), "robot", timeout_s=0.05 if action == 0 else 30)
    env.reset()
    with pytest.raises(RuntimeError, match=message):
        env.step(action)


def test_errors_cross_the_process_border_of_a_vector_env():
    envs = [lambda: wrappers.CheckedEnv(Scripted(), "robot")] * 2
    vector = gym.vector.AsyncVectorEnv(envs, context="fork")
    vector.reset()
    with pytest.raises(RuntimeError, match="Env 'robot' raised in step"):
        vector.step(np.array([0, 1]))
    vector.close(terminate=True)


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    env = wrappers.ActionRepeat(Scripted(length=5, reward=0.5), 2)
    env.reset()
    results = [env.step(0) for _ in range(3)]
    assert [result[1] for result in results] == [1.0, 1.0, 0.5]
    assert [result[3] for result in results] == [False, False, True]
    assert env.unwrapped.steps == 5


class Arriving(Scripted):
    """Succeeds at its second step alone, as an arm that passes through its goal."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def step(self, action):
        return (*super().step(action)[:4], {"is_success": float(self.steps == 2)})


def test_action_repeat_keeps_a_success_at_any_of_its_steps():
    env = wrappers.ActionRepeat(Arriving(), 3)
    env.reset()
    assert [env.step(0)[4] for _ in range(2)] == [{"is_success": 1.0}, {"is_success": 0.0}]


@pytest.mark.parametrize(("repeat", "fps"), [(1, 30), (4, 8), (100, 1)])
def test_action_repeat_shows_fewer_frames_a_second(repeat, fps):
    assert wrappers.ActionRepeat(Arriving(), repeat).metadata["render_fps"] == fps
    assert Arriving.metadata["render_fps"] == 30
    assert "render_fps" not in wrappers.ActionRepeat(Scripted(), repeat).metadata


def test_action_repeat_of_one_is_the_env_itself():
    env = gym.make("CartPole-v1")
    check_environments_match(env, wrappers.ActionRepeat(gym.make("CartPole-v1"), 1), num_steps=50)


def test_action_repeat_refuses_zero():
    with pytest.raises(
        ValueError, match=r"env_config\['action_repeat'\] must be an int >= 1; got 0"
    ):
        wrappers.ActionRepeat(Scripted(), 0)


def test_resize_averages_instead_of_dropping_pixels():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 200
    small = wrappers.resize_picture(stripes, (16, 16))
    assert small.shape == (16, 16, 3)
    assert abs(small.mean() - 100) < 3
    assert small.std() < 10
    assert wrappers.resize_picture(stripes[..., :1], (16, 8)).shape == (16, 8, 1)
    assert wrappers.resize_picture(stripes[..., 0], (16, 8)).shape == (16, 8)
    assert wrappers.resize_picture(stripes, (64, 64)) is stripes


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_resizing_keeps_channels_apart(count):
    """Also where a library that reads pictures would take the last one for alpha."""
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, count), np.uint8)
    small = wrappers.resize_picture(picture, (8, 10))
    assert small.shape == (8, 10, count) and small.dtype == np.uint8
    for channel in range(count):
        alone = wrappers.resize_picture(picture[..., channel], (8, 10))
        np.testing.assert_array_equal(small[..., channel], alone)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (4,), np.float32),
        spaces.Box(0, 255, (4, 84, 84, 3), np.uint8),
        spaces.Dict({"image": spaces.Box(0, 255, (84, 84, 3), np.uint8)}),
    ],
)
def test_resizing_needs_a_single_picture(space):
    env = Scripted()
    env.observation_space = space
    with pytest.raises(
        ValueError, match=r"env_config\['size'\] needs an env that observes one uint8"
    ):
        wrappers.ResizePicture(env, (64, 64))


def test_resizing_refuses_channels_that_come_first():
    def resized(shape):
        env = Scripted()
        env.observation_space = spaces.Box(0, 255, shape, np.uint8)
        return wrappers.ResizePicture(env, (16, 16)).observation_space.shape

    for shape in ((3, 84, 84), (12, 210, 160), (1, 40, 60)):
        with pytest.raises(ValueError, match=r"channels last, \(h, w, C\); got .*np\.moveaxis"):
            resized(shape)
    assert resized((84, 84, 4)) == (16, 16, 4)
    assert resized((8, 8, 20)) == (16, 16, 20)
    assert resized((40, 60)) == (16, 16)


def test_a_missing_extra_says_what_to_install():
    message = r'no_such_simulator is not installed; run: pip install "rllib-dreamer\[dmc\]"'
    with pytest.raises(ImportError, match=message):
        wrappers.import_extra("no_such_simulator", "dmc")
