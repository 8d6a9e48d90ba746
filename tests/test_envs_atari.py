"""The Atari env against the Arcade Learning Environment itself."""

from __future__ import annotations

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from ale_py import roms
from gymnasium.utils.env_checker import check_env
from PIL import Image

from rllib_dreamer.envs import atari


def raw_ale(game, seed, sticky):
    """An emulator seeded like ale-py's own Gymnasium env."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", sticky)
    ale.setInt(
        "random_seed", int(np.random.SeedSequence(seed).generate_state(2)[1].astype(np.int32))
    )
    ale.loadROM(roms.get_rom_path(game))
    ale.reset_game()
    return ale


def shrink(screen, size=64):
    return np.asarray(Image.fromarray(screen).resize((size, size), Image.Resampling.BILINEAR))


def reference_step(ale, screens, action, repeat=4):
    """Independent pooling: keeps every screen, takes the maximum of the last two, then resizes."""
    reward = 0.0
    for _ in range(repeat):
        reward += ale.act(action)
        screens.append(ale.getScreenRGB())
        if ale.game_over():
            break
    return shrink(np.stack(screens[-2:]).max(0)), reward


def test_game_list_is_that_of_ale():
    two_players = {"combat", "joust", "maze_craze", "warlords"}
    assert sorted(atari.GAMES) == sorted(set(roms.get_all_rom_ids()) - two_players)
    gym.register_envs(ale_py)
    theirs = {name for name in gym.registry if name.startswith("ALE/") and name.endswith("-v5")}
    assert {name for name in atari.names() if name.startswith("ALE/")} == theirs


@pytest.mark.parametrize("game", ["pong", "breakout", "ms_pacman"])
def test_atari100k_equals_a_reference_loop_on_the_emulator(game):
    env = atari.make(f"atari100k/{game}", {"noops": 0})
    observation, _ = env.reset(seed=4)
    ale = raw_ale(game, 4, sticky=0.0)
    screens = [ale.getScreenRGB()] * 2
    np.testing.assert_array_equal(observation, shrink(screens[0]))
    actions, rng = ale.getMinimalActionSet(), np.random.default_rng(0)
    assert env.action_space.n == len(actions)
    for _ in range(500):
        index = int(rng.integers(len(actions)))
        observation, reward, terminated, truncated, _ = env.step(index)
        expected, expected_reward = reference_step(ale, screens, actions[index])
        np.testing.assert_array_equal(observation, expected)
        assert reward == expected_reward
        assert terminated == ale.game_over()
        assert not truncated
        if terminated:  # lives do not end an episode, the game does
            env.reset()
            ale.reset_game()
            screens = [ale.getScreenRGB()] * 2


def test_both_buffers_hold_the_frame_of_the_reset():
    """The first pictures of an episode must not contain the end of the one before."""
    env = atari.make("atari100k/breakout", {"noops": 0})
    env.reset(seed=0)
    for _ in range(60):
        env.step(1)
    observation, _ = env.reset()
    np.testing.assert_array_equal(*env._frames)
    np.testing.assert_array_equal(observation, shrink(env.render()))


def test_ale_v5_equals_gymnasium():
    gym.register_envs(ale_py)
    reference = gym.make("ALE/Pong-v5")
    env = atari.make("ALE/Pong-v5")
    screen, _ = reference.reset(seed=11)
    observation, _ = env.reset(seed=11)
    rng = np.random.default_rng(0)
    for _ in range(200):
        np.testing.assert_array_equal(observation, shrink(screen))
        action = int(rng.integers(6))
        observation, reward, terminated, truncated, _ = env.step(action)
        screen, *expected, _ = reference.step(action)
        assert [reward, terminated, truncated] == expected


def test_sticky_actions_are_on_for_ale_and_off_for_atari100k():
    def trajectory(name, seed):
        env = atari.make(name, {"noops": 0})
        env.reset(seed=seed)
        return np.stack([env.step(2 + step % 2)[0] for step in range(60)])

    assert np.array_equal(trajectory("atari100k/pong", 0), trajectory("atari100k/pong", 1))
    assert not np.array_equal(trajectory("ALE/Pong-v5", 0), trajectory("ALE/Pong-v5", 1))


def test_noops_are_drawn_from_zero_to_thirty():
    env = atari.make("atari100k/pong")
    env.reset(seed=0)
    counts = []
    for _ in range(300):
        env.reset()
        counts.append(env._ale.getEpisodeFrameNumber())
    assert min(counts) == 0
    assert max(counts) == 30


def test_frame_limit_truncates_and_leaves_noops_out():
    env = atari.make("atari100k/pong", {"max_frames": 10})
    env.reset(seed=3)
    ends = [env.step(0)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    assert env._frame_count == 10
    env.reset()
    assert env.step(0)[2:4] == (False, False)


def test_same_seed_same_game():
    def play(env, seed):
        frames = [env.reset(seed=seed)[0]]
        return np.stack([*frames, *(env.step(i % 6)[0] for i in range(30))])

    env = atari.make("ALE/Pong-v5", {"noops": 30})
    first = play(env, 5)
    np.testing.assert_array_equal(first, play(env, 5))
    assert not np.array_equal(first, play(env, 6))
    seeded = atari.make("ALE/Pong-v5", {"noops": 30, "seed": 5})
    np.testing.assert_array_equal(seeded.reset()[0], first[0])


@pytest.mark.parametrize(
    ("config", "shape"), [({}, (64, 64, 3)), ({"gray": True, "size": (96, 64)}, (96, 64, 1))]
)
def test_gymnasium_conformance(config, shape):
    env = atari.make("atari100k/pong", config)
    assert env.observation_space.shape == shape
    check_env(env, skip_render_check=True)


@pytest.mark.parametrize(
    ("name", "nearest"), [("atari100k/pongg", "atari100k/pong"), ("ALE/pacman-v5", "ALE/Pacman-v5")]
)
def test_unknown_game_lists_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"Unknown env '{name}': did you mean .*'{nearest}'"):
        atari.make(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sticky": 1.5}, r"env_config\['sticky'\] must be a probability in \[0, 1\); got 1.5"),
        ({"noops": -1}, r"env_config\['noops'\] must be an int >= 0; got -1"),
        ({"frameskip": 4}, r"unknown key 'frameskip'.*action_repeat"),
    ],
)
def test_bad_options_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        atari.make("atari100k/pong", config)
