"""Tests of the replay: sampling, write-back, eviction, threads, RLlib's own chunks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from replay_episodes import D, Env, S, T, assert_equal, check_alignment, make, stream_of

from rllib_dreamer.replay import Replay, default_chunk_length


def test_refuses_an_observation_of_another_shape_and_stores_nothing_of_it() -> None:
    replay, env = make(), Env()
    episode = env.run(3)
    episode.observations.data = episode.observations.data[:, :1]
    with pytest.raises(ValueError, match=r"'obs/vector' takes \(2,\) for each of 3 steps"):
        replay.add([episode])
    assert len(replay) == 0
    assert replay.stats()["streams"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 1}, "replay_capacity is 1, allowed is >= 2"),
        (
            {"capacity": 14, "batch_length": 8},
            "replay_capacity is 14, allowed is >= 15 .steps., one chunk",
        ),
        ({"batch_size": 0}, "batch_size_B is 0, allowed is >= 1"),
        ({"batch_length": 0}, "batch_length_T is 0, allowed is >= 1"),
        ({"chunk_length": 0}, "chunk_length is 0, allowed is 1 to replay_capacity // 2 = 200"),
    ],
)
def test_refuses_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refuses_to_sample_before_one_whole_sequence() -> None:
    replay, env = make(), Env()
    replay.add([env.run(T)])
    with pytest.raises(ValueError, match=rf"holds {T} steps in 1 streams.*= {T + 1} consecutive"):
        replay.sample()
    replay.add([env.run(1)])
    assert replay.num_sequences == 1
    check_alignment(replay.sample())


def test_refuses_latents_that_do_not_fit_their_index() -> None:
    replay = make()
    replay.add([Env().run(10)])
    batch = replay.sample()
    with pytest.raises(ValueError, match=r"deter of shape \(4, 5, 3\) for index of shape \(4, 4\)"):
        replay.update_latents(batch["index"][:, 1:], batch["deter"], batch["stoch"][:, 1:])


def test_sequences_cross_ends_of_episodes_and_keep_their_alignment() -> None:
    replay, env = make(batch_size=64), Env()
    ends = ["terminated", "truncated", None, None, "terminated"] * 6
    stored = 0
    for i, end in enumerate(ends):
        length = 1 + i % 5
        assert replay.add([env.run(length, end=end)]) == length
        stored += length + (end is not None)
    assert len(replay) == stored
    assert replay.stats()["streams"] == 1
    batch = replay.sample()
    check_alignment(batch)
    assert batch["obs/vector"].shape == (64, T + 1, 2)
    seams = batch["is_first"][:, 1:]
    assert seams.any()
    assert (batch["is_terminal"][:, :-1] & seams).any()
    assert (~batch["is_terminal"][:, :-1] & seams).any()


def test_chunks_of_any_cut_give_the_same_stream() -> None:
    whole, pieces, lists = make(), make(), make()
    a, b, c = Env(), Env(lookback=0), Env(numpy=False)
    whole.add([a.run(9, end="terminated"), a.run(11)])
    for steps, end in ((4, None), (1, None), (4, "terminated"), (1, None), (10, None)):
        pieces.add([b.run(steps, end=end)])
        lists.add([c.run(steps, end=end)])
    assert_equal(stream_of(whole, 21), stream_of(pieces, 21))
    assert_equal(stream_of(whole, 21), stream_of(lists, 21))


def test_a_chunk_without_steps_adds_nothing() -> None:
    replay, env = make(), Env()
    replay.add([env.run(3)])
    assert replay.add([env.run(0)]) == 0
    replay.add([env.run(4)])
    assert len(replay) == 7
    check_alignment(replay.sample())


def test_envs_side_by_side_keep_to_their_streams() -> None:
    replay = make(batch_size=128)
    envs = [Env(env) for env in range(3)]
    for i in range(12):
        done = [e.run(2, end="terminated") for e in envs if (i + e.env) % 3 == 0]
        replay.add(done + [e.run(3) for e in envs])
    assert replay.stats()["streams"] == 3
    check_alignment(replay.sample())


def test_envs_that_end_together_keep_to_their_streams() -> None:
    replay = make(capacity=2000, batch_size=64)
    envs = [Env(env) for env in range(3)]
    for end in (None, "terminated", None, "truncated", None, None):
        replay.add([env.run(4, end=end) for env in envs])
    env_of = replay.sample()["obs/vector"][..., 0] // 10_000
    assert (env_of == env_of[:, :1]).all()


def test_abandoned_episode_ends_where_the_next_begins() -> None:
    replay, env, other = make(batch_size=64), Env(), Env(1)
    replay.add([env.run(6)])
    env.run(2)  # lost on the way
    replay.add([env.run(6)])  # what follows cannot be joined
    replay.add([other.run(3, end="truncated")])
    assert replay.stats()["streams"] == 2
    data = stream_of(replay, 16)
    joined = data["obs/vector"][:12, 1]
    np.testing.assert_array_equal(joined, [*range(6), *range(8, 14)])
    np.testing.assert_array_equal(np.flatnonzero(data["is_first"]), [0, 6, 12])
    batch = replay.sample()
    np.testing.assert_array_equal(batch["is_last"][:, :-1], batch["is_first"][:, 1:])
    assert batch["is_last"].any()
    assert not stream_of(replay, 16)["is_last"][:12].any()  # the copy alone was marked


def test_every_start_is_equally_likely_over_streams_of_unequal_length() -> None:
    replay = make(batch_size=500)
    replay.add([Env(0).run(30), Env(1).run(T), Env(2).run(12)])
    starts = 30 - T + 12 - T
    assert replay.num_sequences == starts
    drawn = np.concatenate([replay.sample()["index"][:, 0] for _ in range(40)])
    counts = np.unique(drawn, return_counts=True)[1]
    expected = 40 * 500 / starts
    assert len(counts) == starts
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 70  # 33 degrees of freedom: 99.98 %


def test_same_seed_same_batches_other_seed_others() -> None:
    replays = [make(seed=seed) for seed in (3, 3, 4)]
    for replay in replays:
        replay.add([Env().run(60)])
    a, b, c = ([r.sample()["index"] for _ in range(5)] for r in replays)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_peeking_changes_no_later_sample() -> None:
    looked_at, other = (make(online=True) for _ in range(2))
    for replay in (looked_at, other):
        replay.add([Env().run(40)])
    rows = looked_at.peek(np.random.default_rng(0), 6)
    assert rows["reward"].shape == (6, T + 1)
    assert not rows["is_first"][:, 1:].any()
    assert looked_at.stats() == other.stats()
    for _ in range(4):
        assert_equal(looked_at.sample(), other.sample())
    with pytest.raises(ValueError, match="replay holds 0 steps"):
        make().peek(np.random.default_rng(0), 1)


def test_online_queue_gives_each_window_once_and_before_any_other() -> None:
    replay = make(online=True, batch_size=3)
    envs = [Env(0), Env(1)]
    for _ in range(6):
        replay.add([env.run(5) for env in envs])  # 30 steps a stream: 6 windows of 5
    assert replay.stats()["online"] == 12
    batches = [replay.sample() for _ in range(4)]
    for batch in batches:
        check_alignment(batch)
    codes = np.concatenate([batch["obs/vector"][..., 0] for batch in batches])
    expected = np.concatenate([np.arange(30), 10_000 + np.arange(30)])
    np.testing.assert_array_equal(np.sort(codes.ravel()), expected)
    assert replay.stats()["online"] == 0
    windows = {int(start) for batch in batches for start in batch["index"][:, 0]}
    starts = {int(start) for _ in range(20) for start in replay.sample()["index"][:, 0]}
    assert len(windows) == 12
    assert starts - windows  # at random from here on: not the windows again
    replay.add([envs[0].run(4)])
    assert replay.stats()["online"] == 0
    replay.add([envs[0].run(1)])
    assert replay.stats()["online"] == 1


def test_online_queue_drops_what_was_evicted_and_stays_short() -> None:
    replay, env = make(capacity=40, online=True, batch_size=2), Env()
    for _ in range(100):
        replay.add([env.run(10, end="truncated")])
    assert replay.stats()["online"] <= 40 // (T + 1) + 1
    while replay.stats()["online"]:
        check_alignment(replay.sample())
    check_alignment(replay.sample())


@pytest.mark.parametrize("capacity", [20, 36, 100, 400])
def test_capacity_is_kept_and_the_oldest_steps_go(capacity: int) -> None:
    replay, env = make(capacity=capacity, batch_size=32), Env()
    codes: list[float] = []
    for i in range(60):
        length = 3 + i % 9
        replay.add([env.run(length, end="terminated")])
        codes += [env.base - 100 + t for t in range(length + 1)]
        assert len(replay) <= capacity
        if replay.num_sequences:
            check_alignment(replay.sample())
    kept = len(replay)
    assert kept >= capacity - 2 * 7
    np.testing.assert_array_equal(stream_of(replay, kept)["obs/vector"][:, 0], codes[-kept:])


def test_streams_age_out_with_their_chunks() -> None:
    replay, live = make(capacity=42, batch_size=16), Env(9)
    replay.add([Env(env).run(6) for env in range(4)])  # four runners that die
    assert replay.stats()["streams"] == 4
    for _ in range(12):
        replay.add([live.run(8)])
        if replay.num_sequences:
            check_alignment(replay.sample())
    assert replay.stats()["streams"] == 1
    assert stream_of(replay, len(replay))["obs/vector"][0, 0] >= 90_000


def test_more_streams_than_chunks_still_works() -> None:
    replay = make(capacity=30, chunk_length=10, batch_size=8)
    envs = [Env(env) for env in range(7)]
    for _ in range(20):
        replay.add([env.run(4) for env in envs])
        assert len(replay) <= 30
        if replay.num_sequences:
            check_alignment(replay.sample())


def test_default_chunks_leave_room_for_many_streams() -> None:
    assert default_chunk_length(1_000_000) == 1024
    assert default_chunk_length(10_000) == 39
    assert default_chunk_length(5) == 1
    replay = make(capacity=10_000, chunk_length=None)
    assert 10_000 - 39 <= replay.nbytes_at_capacity // replay.bytes_per_step <= 10_000


def test_latents_written_back_are_seen_by_the_next_sample_and_nothing_else_moves() -> None:
    replay = make(capacity=100, batch_size=64)
    replay.add([Env().run(2 * T)])
    before = stream_of(replay, 2 * T)
    batch = replay.sample()
    index = batch["index"][:, 1:]
    deter = np.repeat(index[..., None] + 0.5, D, -1).astype(np.float32)
    stoch = np.repeat(index[..., None] + 100, S, -1)
    replay.update_latents(index, deter, stoch)
    after = replay.sample()
    written = np.isin(after["index"], index)
    assert written.any() and not written.all()  # step 0 of the stream is never trained on
    np.testing.assert_array_equal(after["deter"][written][:, 0], after["index"][written] + 0.5)
    np.testing.assert_array_equal(after["stoch"][written][:, 0], after["index"][written] + 100)
    np.testing.assert_array_equal(after["deter"][~written][:, 0], 0)
    changed = stream_of(replay, 2 * T)
    for name in before.keys() - {"deter", "stoch"}:
        np.testing.assert_array_equal(before[name], changed[name])


def test_latents_of_evicted_steps_are_dropped() -> None:
    replay, env = make(capacity=35, batch_size=32), Env()
    replay.add([env.run(35)])
    batch = replay.sample()
    replay.add([env.run(14)])  # two chunks of seven go, and their places are taken
    before = stream_of(replay, 35)
    index = batch["index"][:, 1:]
    assert (index < 14).any() and (index >= 14).any()
    replay.update_latents(index, np.full((*index.shape, D), 9.0), np.full((*index.shape, S), 99))
    after = stream_of(replay, 35)
    ids = np.arange(14, 49)
    touched = np.isin(ids, index)
    assert not touched[-14:].any()
    np.testing.assert_array_equal(after["deter"][touched], 9.0)
    np.testing.assert_array_equal(after["deter"][~touched], before["deter"][~touched])
    np.testing.assert_array_equal(after["stoch"][~touched], before["stoch"][~touched])


def test_refresh_brings_old_batches_up_to_date_and_spares_evicted_steps() -> None:
    replay, env = make(capacity=35, batch_size=32), Env()
    replay.add([env.run(35)])
    old = replay.sample()
    expected = {name: value.copy() for name, value in old.items()}
    index = np.arange(14, 35)[None]
    replay.add([env.run(14)])
    replay.update_latents(index, np.full((1, 21, D), 9.0), np.full((1, 21, S), 99))
    replay.refresh_latents(old)
    still = old["index"] >= 14
    expected["deter"][still], expected["stoch"][still] = 9, 99
    assert_equal(old, expected)


def test_adding_sampling_and_writing_back_at_once_tears_nothing() -> None:
    replay = make(capacity=300, batch_size=16, online=True)
    envs = [Env(env) for env in range(3)]
    replay.add([env.run(20) for env in envs])
    stop, failures = threading.Event(), []

    def learn() -> None:
        try:
            while not stop.is_set():
                batch = replay.sample()
                check_alignment(batch)
                index, t = batch["index"][:, 1:], batch["obs/vector"][:, 1:, 1:]
                acted = np.where(batch["is_last"][:, 1:, None], 0, t)
                replay.update_latents(index, np.repeat(acted / 8, D, -1), np.repeat(acted, S, -1))
        except Exception as error:  # handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=learn) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(150):
        done = [env.run(3, end="terminated") for env in envs if (i + env.env) % 4 == 0]
        replay.add(done + [env.run(2) for env in envs])
        assert len(replay) <= 300
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@pytest.fixture(scope="module")
def runner_samples() -> Iterator[list[list[SingleAgentEpisode]]]:
    """Chunks from RLlib's own env runner, whose module's latents name what it has seen."""
    torch = pytest.importorskip("torch")
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.core.rl_module.torch import TorchRLModule
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    class Echo(TorchRLModule):
        def setup(self) -> None:
            self.unused = torch.nn.Linear(1, 1)

        def get_initial_state(self) -> dict[str, Any]:
            return {"deter": torch.zeros(D), "stoch": torch.full((S,), -1)}

        def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            obs, state = batch[Columns.OBS][:, -1], batch[Columns.STATE_IN]
            steps = torch.clamp(state["stoch"], min=-1) + 1
            return {
                Columns.ACTIONS: (obs[:, :1, None] > 0).long()[..., 0],
                Columns.STATE_OUT: {"deter": obs[:, :D], "stoch": steps},
            }

    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_envs_per_env_runner=2, num_env_runners=0)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=Echo))
        .debugging(seed=0)
    )
    runner = SingleAgentEnvRunner(config=config)
    yield [runner.sample(num_timesteps=n) for n in (2, 14, 40, 2, 2, 2, 60)]
    runner.stop()


def test_chunks_of_the_env_runner_come_out_as_lived(
    runner_samples: list[list[SingleAgentEpisode]],
) -> None:
    cartpole = gym.make("CartPole-v1")
    replay = Replay(
        cartpole.observation_space,
        cartpole.action_space,
        deter=D,
        stoch=S,
        capacity=1000,
        batch_size=64,
        batch_length=T,
        online=False,
        seed=0,
        chunk_length=7,
    )
    added = sum(replay.add(sample) for sample in runner_samples)
    assert added == sum(len(e) for sample in runner_samples for e in sample) >= 122
    ended = sum(e.is_done for sample in runner_samples for e in sample)
    assert ended > 3
    assert len(replay) == added + ended
    batch = replay.sample()
    acted, first = ~batch["is_last"], batch["is_first"].copy()
    obs = batch["obs/vector"]
    assert obs.dtype == np.float32
    np.testing.assert_array_equal(batch["deter"][acted], obs[acted][:, :D].astype(np.float16))
    np.testing.assert_array_equal(batch["action/action"][acted], obs[acted][:, 0] > 0)
    np.testing.assert_array_equal(batch["reward"][:, 1:], ~first[:, 1:])
    np.testing.assert_array_equal(batch["is_terminal"], batch["is_last"])
    follows = (acted[:, :-1] & acted[:, 1:]) & ~first[:, 1:]
    steps = batch["stoch"][..., 0].astype(int)  # counts env steps since the reset
    np.testing.assert_array_equal(np.diff(steps)[follows], 1)
    np.testing.assert_array_equal(steps[:, 1:][first[:, 1:]], 0)
