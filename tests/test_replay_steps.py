"""Tests of the conversion of episodes to steps: what belongs to which observation."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from replay_episodes import ACT, OBS, D, Env, S, assert_equal, make, steps_of
from tiny import assert_same

from rllib_dreamer.replay import Replay
from rllib_dreamer.replay_steps import episode_steps
from rllib_dreamer.replay_storage import step_layout, step_nbytes


def test_chunk_that_goes_on_leaves_its_last_observation_to_the_next() -> None:
    env = Env()
    a, b = steps_of(env.run(3)), steps_of(env.run(2, end="truncated"))
    np.testing.assert_array_equal(a["obs/vector"][:, 1], [0, 1, 2])
    np.testing.assert_array_equal(b["obs/vector"][:, 1], [3, 4, 5])
    np.testing.assert_array_equal(a["reward"], [0, 0.25, 0.5])
    np.testing.assert_array_equal(b["reward"], [0.75, 1, 1.25])
    np.testing.assert_array_equal(a["action/action"], [50, 51, 52])
    np.testing.assert_array_equal(b["action/action"], [53, 54, 0])
    np.testing.assert_array_equal(a["is_first"], [True, False, False])
    assert not b["is_first"].any()
    assert not a["is_last"].any()
    np.testing.assert_array_equal(b["is_last"], [False, False, True])
    assert not b["is_terminal"].any()
    np.testing.assert_array_equal(b["deter"][:, 0], [3 / 8, 4 / 8, 0])
    np.testing.assert_array_equal(b["stoch"][:, 0], [3, 4, 0])


def test_termination_is_told_from_truncation() -> None:
    steps = steps_of(Env().run(2, end="terminated"))
    np.testing.assert_array_equal(steps["is_last"], [False, False, True])
    np.testing.assert_array_equal(steps["is_terminal"], [False, False, True])


def test_lists_and_arrays_convert_alike() -> None:
    for end in (None, "terminated"):
        a, b = Env(numpy=True), Env(numpy=False)
        assert_equal(steps_of(a.run(2)), steps_of(b.run(2)))
        listed = b.run(3, end=end)
        assert_equal(steps_of(a.run(3, end=end)), steps_of(listed))
        assert not listed.is_numpy


def test_arrays_that_cannot_be_written_to_convert_alike(recwarn: pytest.WarningsRecorder) -> None:
    a, b = Env().run(3, end="truncated"), Env().run(3, end="truncated")
    state = b.extra_model_outputs["state_out"].data
    for array in (b.observations.data, b.actions.data, b.rewards.data, *state.values()):
        array.flags.writeable = False  # as they come out of Ray's object store
    assert_equal(steps_of(a), steps_of(b))
    assert not [w for w in recwarn if "writ" in str(w.message)]


def test_zero_state_index_becomes_class_zero() -> None:
    episode = Env().run(2)
    episode.extra_model_outputs["state_out"].data["stoch"][0] = -1
    np.testing.assert_array_equal(steps_of(episode)["stoch"][:, 0], [0, 1])


def test_dtypes_of_nested_spaces_and_bytes_of_a_step() -> None:
    obs = spaces.Dict(
        {
            "cam": spaces.Box(0, 255, (4, 4, 3), np.uint8),
            "body": spaces.Tuple((spaces.Box(-1, 1, (2,), np.float64), spaces.Discrete(3))),
        }
    )
    act = spaces.Dict({"arm": spaces.Box(-1, 1, (2,)), "grip": spaces.MultiBinary(2)})
    layout = step_layout(obs, act, deter=D, stoch=S)
    episode = SingleAgentEpisode(observation_space=obs, action_space=act)
    episode.add_env_reset(obs.sample())
    for _ in range(8):
        state = {"deter": np.zeros(D, np.float32), "stoch": np.zeros(S, np.int64)}
        episode.add_env_step(
            obs.sample(), act.sample(), 1.0, extra_model_outputs={"state_out": state}
        )
    steps = episode_steps(episode.to_numpy(), obs, act, layout)
    kinds = {name: (value.dtype.name, value.shape[1:]) for name, value in steps.items()}
    assert kinds == {
        "obs/body/0": ("float32", (2,)),
        "obs/body/1": ("int32", ()),
        "obs/cam": ("uint8", (4, 4, 3)),
        "action/arm": ("float32", (2,)),
        "action/grip": ("int32", (2,)),
        "reward": ("float32", ()),
        "is_first": ("bool", ()),
        "is_last": ("bool", ()),
        "is_terminal": ("bool", ()),
        "deter": ("float16", (D,)),
        "stoch": ("uint8", (S,)),
    }
    assert step_nbytes(layout) == sum(value[0].nbytes for value in steps.values())
    replay = Replay(obs, act, deter=D, stoch=S, capacity=64, batch_size=2, batch_length=3)
    replay.add([episode])
    assert replay.sample()["obs/cam"].shape == (2, 4, 4, 4, 3)


def test_refuses_an_episode_without_latents() -> None:
    episode = SingleAgentEpisode(
        observations=[OBS.sample()] * 2, actions=[5], rewards=[1.0], len_lookback_buffer=0
    )
    with pytest.raises(ValueError, match=r"no 'state_out'.*random_actions"):
        steps_of(episode)


def test_refuses_a_continued_chunk_whose_first_reward_is_unknown() -> None:
    env = Env(lookback=0)
    env.run(2)
    with pytest.raises(ValueError, match=r"env step 2 .*episode_lookback_horizon=1"):
        steps_of(env.run(2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [1, 3])
def test_refuses_a_reward_that_is_not_finite(value: float, step: int) -> None:
    """Also the last reward of a chunk that goes on, which the next chunk would store."""
    env = Env()
    replay = make()
    replay.add([env.run(2)])
    chunk = env.run(3)
    chunk.rewards.data[chunk.rewards.lookback + step - 1] = value
    before = replay.get_state()
    with pytest.raises(ValueError, match=rf"'reward' has {value} at env step {2 + step} .* 0-0"):
        replay.add([chunk])
    assert_same(replay.get_state(), before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_an_observation_that_is_not_finite(value: float) -> None:
    env = Env()
    replay = make()
    replay.add([env.run(2)])
    chunk = env.run(3, end="terminated")
    chunk.observations.data[chunk.observations.lookback + 3, 1] = value
    before = replay.get_state()
    with pytest.raises(ValueError, match=rf"'obs/vector' has {value} at env step 5 .* -inf"):
        replay.add([chunk])
    assert_same(replay.get_state(), before)


def test_a_value_is_missing_only_where_the_space_says_so() -> None:
    chunk = Env().run(3)
    chunk.observations.data[chunk.observations.lookback + 1, 1] = -np.inf
    bounded = spaces.Box(np.array([-np.inf, 0.0], np.float32), np.inf)
    layout = step_layout(bounded, ACT, deter=D, stoch=S)
    with pytest.raises(ValueError, match="'obs/vector' has -inf at env step 1"):
        episode_steps(chunk, bounded, ACT, layout)
    chunk.observations.data[chunk.observations.lookback + 1] = (-np.inf, 3e38)
    chunk.observations.data[chunk.observations.lookback + 2] = 3e38  # a sum that overflows
    assert episode_steps(chunk, bounded, ACT, layout)["obs/vector"][1, 0] == -np.inf


def test_a_missing_value_is_kept() -> None:
    chunk = Env().run(3)
    chunk.observations.data[chunk.observations.lookback + 1, 1] = -np.inf
    assert steps_of(chunk)["obs/vector"][1, 1] == -np.inf


def test_a_reward_too_large_for_32_bits_is_refused() -> None:
    chunk = Env(numpy=False).run(3)
    chunk.rewards.data[-1] = 1e300
    with pytest.raises(ValueError, match=r"'reward' has 1e\+300 at env step 3.*of 32 bits"):
        steps_of(chunk)
