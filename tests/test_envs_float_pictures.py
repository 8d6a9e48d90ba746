"""Float pictures, as RLlib's own wrappers give them, become uint8 before the model sees them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from ray.rllib.env.wrappers.atari_wrappers import NormalizedImageEnv

from rllib_dreamer.envs import make_env
from rllib_dreamer.envs.float_pictures import with_byte_pictures


class Shades(gym.Env):
    """Observes 32x32 pixels of one shade that rises from 0 to 255, nested or not."""

    action_space = spaces.Discrete(2)

    def __init__(self, low: float, high: float, nested: bool = False) -> None:
        self.low, self.high, self.nested = low, high, nested
        camera = spaces.Box(low, high, (32, 32, 3), np.float32)
        joints = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = (
            spaces.Dict({"cameras": spaces.Tuple([camera]), "joints": joints}) if nested else camera
        )

    def observe(self) -> Any:
        value = self.low + (self.high - self.low) * self.shade / 255
        picture = np.full((32, 32, 3), value, np.float32)
        return (
            {"cameras": (picture,), "joints": np.zeros(2, np.float32)} if self.nested else picture
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.shade = 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.shade += 1
        return self.observe(), 0.0, self.shade == 255, False, {}


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-0.5, 0.5)])
def test_each_shade_comes_back(low: float, high: float) -> None:
    env = make_env(lambda config: Shades(low, high), name="shades")
    assert env.observation_space == spaces.Box(0, 255, (32, 32, 3), np.uint8)
    seen = [env.reset()[0], *(env.step(0)[0] for _ in range(255))]
    assert all(env.observation_space.contains(picture) for picture in seen)
    np.testing.assert_array_equal([picture[0, 0, 0] for picture in seen], np.arange(256))


def test_only_pictures_of_a_nested_observation_change() -> None:
    env = make_env(lambda config: Shades(-1.0, 1.0, nested=True), name="shades")
    before = Shades(-1.0, 1.0, nested=True).observation_space
    assert isinstance(env.observation_space, spaces.Dict) and isinstance(before, spaces.Dict)
    assert env.observation_space["cameras"][0].dtype == np.uint8
    assert env.observation_space["joints"] == before["joints"]
    assert env.observation_space.contains(env.reset()[0])


def test_rllibs_normalized_pictures() -> None:
    class Frames(gym.Env):
        observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            return np.full((64, 64, 3), 200, np.uint8), {}

    env = make_env(lambda config: NormalizedImageEnv(Frames()), name="frames")
    picture, _ = env.reset()
    assert picture.dtype == np.uint8 and np.all(np.abs(picture.astype(int) - 200) <= 1)


def test_nan_is_still_an_error() -> None:
    class Broken(Shades):
        def observe(self) -> Any:
            return np.full((32, 32, 3), np.nan, np.float32)

    env = make_env(lambda config: Broken(0.0, 1.0), name="broken")
    with pytest.raises(ValueError, match=r"'broken'.*NaN"):
        env.reset()


@pytest.mark.parametrize("highest", [1.5, np.inf])
def test_other_boxes_are_left_alone(highest: float) -> None:
    high = np.ones((32, 32, 3), np.float32)
    high[0] = highest
    env = Shades(0.0, 1.0)
    env.observation_space = spaces.Box(np.zeros_like(high), high, dtype=np.float32)
    assert with_byte_pictures(env) is env
    vector = gym.make("CartPole-v1")
    assert with_byte_pictures(vector) is vector
