"""Times the replay beside RLlib's own EpisodeReplayBuffer: adding, sampling, bytes a step.

    python benchmarks/replay.py --capacity 50000 --json replay.json

Both buffers get the same episodes, 64x64x3 uint8 frames with the latents of the model size given,
in the same run and in turn, after both were filled to their capacity. RLlib's buffer neither
returns latents in a batch nor takes them back; its batches are 64 steps long, ours 65. Filling is
timed once, ours before RLlib's; the memory of ours is the size of a step in its arrays, that of
RLlib's what the resident memory of the process grew by.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import psutil
import typer
from common import Figure, figure, median_ratio, report, timed
from gymnasium import spaces
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer

from rllib_dreamer.hardware import release_memory
from rllib_dreamer.replay import Replay

OBS = spaces.Box(0, 255, (64, 64, 3), np.uint8)
ACT = spaces.Box(-1, 1, (6,), np.float32)
EPISODE_LENGTH = 500
B, T, S = 16, 64, 32
TARGETS = {"add 1": 50.0, "add 64": 50.0, "sample": 6.0, "bytes": 17408.0}
LABELS = {
    "fill": "first filling, whole episodes",
    "add 1": "add, chunks of 1 step",
    "add 64": "add, chunks of 64 steps",
    "sample": f"sample {B}x{T + 1}",
    "write back": f"write back latents {B}x{T}",
    "refresh": f"refresh latents {B}x{T + 1}",
    "bytes": "memory",
}
UNITS = dict.fromkeys(LABELS, "us/step") | dict.fromkeys(("sample", "write back", "refresh"), "ms")
UNITS["bytes"] = "bytes/step"
ONCE = ("fill", "bytes")


class Source:
    """Endless chunks of episodes; they are built outside what is timed."""

    def __init__(self, deter: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._frames = rng.integers(0, 256, (256, *OBS.shape), np.uint8)
        self._deter = rng.uniform(-1, 1, (256, deter)).astype(np.float32)
        self._stoch = rng.integers(0, 16, (256, S))
        self._action = rng.uniform(-1, 1, (256, 6)).astype(np.float32)
        self._now = SingleAgentEpisode(observation_space=OBS, action_space=ACT)
        self._now.add_env_reset(self._frames[0])

    def chunk(self, steps: int) -> SingleAgentEpisode:
        """Returns the next chunk as an env runner would hand it over."""
        for _ in range(steps):
            t = self._now.t + 1
            i = t % 256
            state = {"deter": self._deter[i], "stoch": self._stoch[i]}
            self._now.add_env_step(
                self._frames[i],
                self._action[i],
                1.0,
                truncated=t == EPISODE_LENGTH,
                extra_model_outputs={"state_out": state},
            )
            if self._now.is_done:
                break
        done = self._now
        if done.is_done:
            self._now = SingleAgentEpisode(observation_space=OBS, action_space=ACT)
            self._now.add_env_reset(self._frames[0])
        else:
            self._now = done.cut(len_lookback_buffer=1)
        return done.to_numpy()


class Filling(NamedTuple):
    """How a buffer took its first steps."""

    microseconds: float  # a step
    nbytes: float  # resident memory a step


def fill(buffer: Any, source: Source, steps: int) -> Filling:
    """Adds at least `steps` steps, as whole episodes."""
    process = psutil.Process()
    release_memory()  # what is filled from free memory of this process would not count
    before, seconds, added = process.memory_info().rss, 0.0, 0
    while added < steps:
        chunk = source.chunk(EPISODE_LENGTH)
        seconds += timed(partial(buffer.add, [chunk])).wall
        added += len(chunk)
    grown = process.memory_info().rss - before
    return Filling(1e6 * seconds / added, grown / added)


def time_adding(buffer: Any, source: Source, length: int, steps: int) -> float:
    """Returns microseconds a step for adding chunks of `length` steps."""
    chunks = [source.chunk(length) for _ in range(steps // length)]
    seconds = timed(lambda: [buffer.add([chunk]) for chunk in chunks]).wall
    return 1e6 * seconds / sum(map(len, chunks))


def write_back(replay: Replay) -> tuple[float, float]:
    """Returns milliseconds for writing the latents of a batch back and for refreshing them."""
    batch = replay.sample()
    index, stoch = batch["index"][:, 1:], batch["stoch"][:, 1:].astype(np.int64)
    deter = batch["deter"][:, 1:].astype(np.float32)
    written = timed(lambda: replay.update_latents(index, deter, stoch))
    refreshed = timed(lambda: replay.refresh_latents(batch))
    return 1e3 * written.wall, 1e3 * refreshed.wall


def measure(
    replay: Replay, peer: EpisodeReplayBuffer, source: Source, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Times both buffers in turn, `rounds` times each."""
    results: dict[str, dict[str, list[float]]] = {key: {} for key in LABELS}

    def note(key: str, who: str, value: float) -> None:
        results[key].setdefault(who, []).append(value)

    for _ in range(rounds):
        for who, buffer in (("ours", replay), ("rllib", peer)):
            note("add 1", who, time_adding(buffer, source, 1, 256))
            note("add 64", who, time_adding(buffer, source, 64, 512))
            note("sample", who, 1e3 * timed(buffer.sample).wall)
        written, refreshed = write_back(replay)
        note("write back", "ours", written)
        note("refresh", "ours", refreshed)
    return results


def figures(results: dict[str, dict[str, list[float]]]) -> list[Figure]:
    """The rows: ours beside RLlib's, where it does the same."""
    rows = []
    for key, label in LABELS.items():
        ours, peer = results[key]["ours"], results[key].get("rllib")
        beside: dict[str, Any] = {}
        if peer:
            theirs = f"RLlib {median(peer):.4g} {UNITS[key]}"
            beside = {"beside": theirs, "ratio": median_ratio(ours, peer)}
        row = figure(f"replay {label}", ours, UNITS[key], target=TARGETS.get(key), **beside)
        rows.append(row._replace(least=None, most=None) if key in ONCE else row)
    return rows


def main(
    capacity: Annotated[int, typer.Option(help="Steps that both hold when timed.")] = 20_000,
    deter: Annotated[int, typer.Option(help="Width of deter; 2048 is model size 12M.")] = 2048,
    rounds: Annotated[int, typer.Option(help="Times each number is taken.")] = 15,
    directory: Annotated[Path | None, typer.Option(help="Keeps ours on disk, there.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Writes all numbers.")] = None,
) -> None:
    """Times both buffers."""
    source = Source(deter)
    replay = Replay(
        OBS,
        ACT,
        deter=deter,
        stoch=S,
        capacity=capacity,
        batch_size=B,
        batch_length=T,
        online=False,
        seed=0,
        directory=directory,
    )
    peer = EpisodeReplayBuffer(capacity=capacity, batch_size_B=B, batch_length_T=T)
    ours, rllib = fill(replay, source, capacity), fill(peer, copy.deepcopy(source), capacity)
    results = measure(replay, peer, source, rounds)
    results["fill"] = {"ours": [ours.microseconds], "rllib": [rllib.microseconds]}
    results["bytes"] = {"ours": [replay.bytes_per_step], "rllib": [rllib.nbytes]}
    title = f"replay of {capacity:,} steps; filling took {ours.nbytes:,.0f} bytes a step of memory"
    report(title, figures(results), out)


if __name__ == "__main__":
    typer.run(main)
