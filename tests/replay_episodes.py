"""Episodes whose every number says where it belongs, and checks that it is there."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_dreamer.replay import Replay
from rllib_dreamer.replay_steps import episode_steps
from rllib_dreamer.replay_storage import step_layout

D, S, T = 3, 2, 4
OBS = spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACT = spaces.Discrete(10**6, start=5)


class Env:
    """Writes episodes whose every number says which env, episode and step it comes from."""

    def __init__(self, env: int = 0, lookback: int = 1, numpy: bool = True) -> None:
        self.env, self.lookback, self.numpy = env, lookback, numpy
        self.episodes = 0
        self.now = self._reset()

    def _reset(self) -> SingleAgentEpisode:
        self.base = self.env * 10_000 + self.episodes * 100
        episode = SingleAgentEpisode(
            id_=f"{self.env}-{self.episodes}", observation_space=OBS, action_space=ACT
        )
        episode.add_env_reset(self._obs(0))
        self.episodes += 1
        return episode

    def _obs(self, t: int) -> np.ndarray:
        return np.array([self.base + t, t], np.float32)

    def run(self, steps: int, *, end: str | None = None) -> SingleAgentEpisode:
        """Steps `steps` times; returns the chunk, ended by "terminated", "truncated" or not."""
        for i in range(steps):
            t = self.now.t
            last = i == steps - 1
            self.now.add_env_step(
                self._obs(t + 1),
                self.base + t + 50,
                float(t + 1) / 4,
                terminated=last and end == "terminated",
                truncated=last and end == "truncated",
                extra_model_outputs={
                    "state_out": {
                        "deter": np.full(D, t / 8, np.float32),
                        "stoch": np.full(S, t, np.int64),
                        "action": np.zeros(1, np.float32),
                    }
                },
            )
        chunk = self.now
        self.now = self._reset() if end else chunk.cut(len_lookback_buffer=self.lookback)
        return chunk.to_numpy() if self.numpy else chunk


def make(capacity: int = 400, batch_size: int = 4, **kwargs: Any) -> Replay:
    options = {"online": False, "seed": 0, "chunk_length": 7, "batch_length": T} | kwargs
    return Replay(OBS, ACT, deter=D, stoch=S, capacity=capacity, batch_size=batch_size, **options)


def steps_of(episode: SingleAgentEpisode, **kwargs: Any) -> dict[str, np.ndarray]:
    layout = step_layout(OBS, ACT, deter=D, stoch=S)
    return episode_steps(episode, OBS, ACT, layout, **kwargs)


def stream_of(replay: Replay, count: int) -> dict[str, np.ndarray]:
    """All steps of a replay with one stream, in order, through its public state."""
    data = replay.get_state()["data"]
    assert len(data["reward"]) == count
    return data


def assert_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
        assert left[name].dtype == right[name].dtype, name


def check_alignment(batch: dict[str, np.ndarray]) -> None:
    """Checks each number of a batch against the observation that it belongs to."""
    code, t = batch["obs/vector"][..., 0], batch["obs/vector"][..., 1]
    last, first = batch["is_last"], batch["is_first"]
    acted = ~last
    np.testing.assert_array_equal(batch["reward"], t / 4)
    np.testing.assert_array_equal(batch["action/action"][acted], (code + 50)[acted])
    np.testing.assert_array_equal(batch["action/action"][last], 0)
    np.testing.assert_array_equal(batch["deter"][acted], np.repeat(t[acted, None] / 8, D, -1))
    np.testing.assert_array_equal(batch["stoch"][acted], np.repeat(t[acted, None], S, -1))
    np.testing.assert_array_equal(first[:, 1:], (t == 0)[:, 1:])
    np.testing.assert_array_equal(last[:, :-1], first[:, 1:])
    assert first[:, 0].all()
    within = ~first[:, 1:]
    np.testing.assert_array_equal(np.diff(code)[within], 1)
    assert not (batch["is_terminal"] & ~last).any()
