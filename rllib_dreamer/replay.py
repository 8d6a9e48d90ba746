"""The replay: steps of all envs as they were lived, sampled as sequences that carry their latents.

Step t holds the observation of env step t, the reward that arrived with it (0 at a reset), its
flags, the action chosen after it, and the latents of its posterior. Sequences are T + 1 steps long:
step 0 is context, whose latents and action start the recurrent state; steps 1 to T are trained on,
and their fresh latents are written back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from rllib_dreamer.atomic import write_text
from rllib_dreamer.replay_memory import GB
from rllib_dreamer.replay_steps import episode_steps
from rllib_dreamer.replay_storage import (
    LATENTS,
    Column,
    DiskStorage,
    open_storage,
    read_columns,
    step_layout,
    step_nbytes,
    to_half,
    write_columns,
)
from rllib_dreamer.replay_streams import StreamIndex

if TYPE_CHECKING:
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

MAX_CHUNK_LENGTH = 1024
MIN_CHUNKS = 256
_FORMAT = 1


def default_chunk_length(capacity: int) -> int:
    """Returns the steps per chunk for a capacity: 1024, or less so that there are 256 chunks."""
    return max(1, min(MAX_CHUNK_LENGTH, capacity // MIN_CHUNKS))


def _check_argument(condition: bool, field: str, given: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field} is {given!r}, allowed is {allowed}: change {field}")


class Replay:
    """Stores the steps of all envs, oldest chunk out first, and samples sequences of them.

    All methods may be called from several threads.

    Attributes:
        layout: Shape and dtype of each column.
        batch_size: Sequences in a batch, B.
        batch_length: Trained steps in a sequence, T.
        bytes_per_step: Bytes that each step takes.
        nbytes_at_capacity: Bytes that the full replay takes.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        deter: int,
        stoch: int,
        capacity: int,
        batch_size: int,
        batch_length: int,
        online: bool = True,
        seed: int | None = None,
        directory: str | Path | None = None,
        chunk_length: int | None = None,
    ) -> None:
        """Reserves the replay.

        Args:
            observation_space: The env's observation space.
            action_space: The env's action space.
            deter: Width D of the deterministic state.
            stoch: Number S of categorical groups; their class indices must be below 256.
            capacity: Steps to hold at most. Whole chunks are evicted, and each stream has one chunk
                that is still being filled: a full replay of n streams holds at least
                `capacity - (n + 2) * chunk_length` steps.
            batch_size: Sequences in a batch, B.
            batch_length: Trained steps in a sequence, T; sequences are T + 1 steps long.
            online: Whether each window of T + 1 new steps is sampled once before anything is drawn
                at random.
            seed: Makes the batches repeatable.
            directory: Keeps the steps in memory-mapped files there, instead of in memory.
            chunk_length: Steps in a chunk; by default 1024, fewer for a small capacity.

        Raises:
            ValueError: An argument is out of range, or memory or disk do not suffice.
        """
        _check_argument(batch_size >= 1, "batch_size_B", batch_size, ">= 1")
        _check_argument(batch_length >= 1, "batch_length_T", batch_length, ">= 1")
        _check_argument(capacity >= 2, "replay_capacity", capacity, ">= 2")
        chunk_length = default_chunk_length(capacity) if chunk_length is None else chunk_length
        allowed = f"1 to replay_capacity // 2 = {capacity // 2}"
        _check_argument(1 <= chunk_length <= capacity // 2, "chunk_length", chunk_length, allowed)
        num_chunks = capacity // chunk_length
        least = f">= {batch_length + chunk_length} (steps), one chunk and batch_length_T"
        _check_argument(
            (num_chunks - 1) * chunk_length >= batch_length, "replay_capacity", capacity, least
        )
        self.batch_size, self.batch_length = batch_size, batch_length
        self._spaces = observation_space, action_space
        self._online = online
        self.layout = step_layout(observation_space, action_space, deter=deter, stoch=stoch)
        self.bytes_per_step = step_nbytes(self.layout)
        self.nbytes_at_capacity = num_chunks * chunk_length * self.bytes_per_step
        self._storage = open_storage(self.layout, num_chunks, chunk_length, directory)
        self._index = self._new_index()
        self._rng = np.random.default_rng(seed)
        self._lock = threading.RLock()
        self._inserts = self._samples = 0

    def _new_index(self) -> StreamIndex:
        return StreamIndex(
            self._storage.num_chunks,
            self._storage.chunk_length,
            self.batch_length + 1,
            online=self._online,
        )

    def __len__(self) -> int:
        """Steps stored."""
        return self._index.size

    @property
    def num_sequences(self) -> int:
        """Number of sequences that can be sampled, overlapping ones included."""
        with self._lock:
            return self._index.num_sequences

    @property
    def is_full(self) -> bool:
        """Whether new steps take the place of old ones."""
        with self._lock:
            return self._index.is_full

    def stats(self) -> dict[str, float]:
        """Returns what the replay holds and has done.

        Returns:
            `steps` and `gb` (1e9 bytes) stored, `streams`, `inserts` (steps ever added), `samples`
            (sequences ever sampled), `online` (sequences waiting in the online queue).
        """
        with self._lock:
            return {
                "steps": float(len(self)),
                "gb": len(self) * self.bytes_per_step / GB,
                "streams": float(len(self._index.streams)),
                "inserts": float(self._inserts),
                "samples": float(self._samples),
                "online": float(self._index.num_windows),
            }

    def add(self, episodes: Sequence[SingleAgentEpisode]) -> int:
        """Adds episodes and chunks of episodes, in the order in which they were lived.

        Args:
            episodes: What `EnvRunner.sample()` returns, with lists or with arrays. An episode that
                cannot be stored leaves the replay as it was before that episode.

        Returns:
            Agent steps added, i.e. actions taken. An episode that ends stores one step more.

        Raises:
            ValueError: See `episode_steps`.
        """
        with self._lock:
            return sum(self._add_episode(episode) for episode in episodes)

    def end_all_but(self, episodes: Sequence[SingleAgentEpisode]) -> None:
        """Ends the open episodes that no env goes on with, whose streams then take new ones.

        Args:
            episodes: What all envs have just sent. A runner that died, an env that was built anew
                or a restored checkpoint leaves other episodes open; should one of them go on after
                all, its steps count as an episode of their own.
        """
        with self._lock:
            self._index.release_all_but({episode.id_ for episode in episodes})

    def _add_episode(self, episode: SingleAgentEpisode) -> int:
        length = len(episode)
        if length == 0:
            return 0
        index, begin = self._index, int(episode.t_started)
        stream = index.continued(episode.id_, begin)
        carried = None if stream is None else stream.reward
        steps = episode_steps(episode, *self._spaces, self.layout, carried_reward=carried)
        steps["is_first"][0] |= stream is None
        number = index.open(episode.id_, begin)
        self._append(number, steps, 0, len(steps["reward"]))
        reward = float(episode.rewards.data[-1])
        index.advance(number, begin + length, reward, done=bool(episode.is_done))
        self._inserts += len(steps["reward"])
        return length

    def _append(self, number: int, steps: Mapping[str, np.ndarray], start: int, count: int) -> None:
        for first, piece in self._index.extend(number, count):
            self._storage.write(first, steps, start, piece)
            start += piece

    def sample(self) -> dict[str, np.ndarray]:
        """Samples a batch of sequences.

        Sequences of the online queue come first, then starts drawn uniformly over all streams.

        Returns:
            For each column an array (B, T + 1, ...), and `index`, int64 (B, T + 1), the lasting ids
            of the steps. All are copies. Step 0 of each row has `is_first`, and a step before one
            with `is_first` has `is_last`, also where an episode was abandoned.

        Raises:
            ValueError: There is no sequence of T + 1 steps yet.
        """
        with self._lock:
            self._check_filled()
            index = self._index.draw(self._rng, self.batch_size)  # (B, T+1)
            batch = self._storage.gather(index)
            self._samples += self.batch_size
        batch["is_first"][:, 0] = True
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]
        batch["index"] = index
        return batch

    def peek(self, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        """Draws sequences to look at; what `sample` will give stays the same.

        Args:
            rng: Draws the starts.
            count: Sequences, n.

        Returns:
            For each column an array (n, T + 1, ...).

        Raises:
            ValueError: There is no sequence of T + 1 steps yet.
        """
        with self._lock:
            self._check_filled()
            return self._storage.gather(self._index.draw_at_random(rng, count))

    def _check_filled(self) -> None:
        if self._index.num_sequences == 0:
            streams = len(self._index.streams)
            raise ValueError(
                f"replay holds {len(self)} steps in {streams} streams, sampling needs "
                f"batch_length_T + 1 = {self.batch_length + 1} consecutive steps of one "
                "stream: add more steps first, lower batch_length_T, or raise replay_capacity"
            )

    def refresh_latents(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Brings the latents of a batch sampled earlier up to date, in place.

        Args:
            batch: From `sample`. Steps evicted meanwhile keep the latents they have.

        Returns:
            The same batch.
        """
        with self._lock:
            stored = self._index.stored(batch["index"])  # (B, T+1)
            fresh = self._storage.gather(batch["index"][stored], LATENTS)
        for name in LATENTS:
            batch[name][stored] = fresh[name]
        return batch

    def update_latents(self, index: np.ndarray, deter: np.ndarray, stoch: np.ndarray) -> None:
        """Writes fresh latents back; steps evicted meanwhile are left alone.

        Args:
            index: (B, T) int64 ids, the trained part `batch["index"][:, 1:]`.
            deter: (B, T, D) floats.
            stoch: (B, T, S) class indices.

        Raises:
            ValueError: Shapes do not belong together.
        """
        index = np.asarray(index)
        values = {"deter": np.asarray(deter), "stoch": np.asarray(stoch)}
        for name, value in values.items():
            expected = (*index.shape, *self.layout[name].shape)
            if value.shape != expected:
                raise ValueError(
                    f"update_latents got {name} of shape {value.shape} for index of shape "
                    f"{index.shape}, allowed is {expected}: drop the context step of both"
                )
        values["deter"] = to_half(values["deter"])
        with self._lock:
            stored = self._index.stored(index)
            if not stored.all():
                index = index[stored]
                values = {name: value[stored] for name, value in values.items()}
            rows = index % self._storage.num_rows
            for name, value in values.items():
                self._storage.columns[name][rows] = value

    # Saving.

    def _metadata(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "run": self._storage.run,
            "columns": [[k, list(c.shape), c.dtype.str] for k, c in self.layout.items()],
            "inserts": self._inserts,
            "samples": self._samples,
            "rng": self._rng.bit_generator.state,
            "index": self._index.get_state(),
        }

    def get_state(self) -> dict[str, Any]:
        """Returns a copy of everything as arrays and plain values; for large replays see `save`."""
        with self._lock:
            spans = self._index.spans()
            rows = [np.arange(first, first + held) for first, held in spans]
            ids = np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64)
            return {**self._metadata(), "run": None, "data": self._storage.gather(ids)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Replaces everything by a state, dropping the oldest steps if the capacity is smaller.

        Args:
            state: From `get_state` of a replay with the same spaces and latents. Capacity, batch
                size, batch length and storage may differ.

        Raises:
            ValueError: The state has other columns.
        """
        with self._lock:
            self._restore(state, state["data"])

    def save(self, path: str | Path) -> None:
        """Writes the replay into a directory, without a copy in memory.

        Steps kept on disk are not written again: the files name them, and stay valid only together
        with the replay's own directory. `replay.json` is written last; without it, as a kill leaves
        it, nothing is there to load.

        Args:
            path: Directory, made if it does not exist.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with self._lock:
            commit = self._storage.commit()
            (path / "replay.json").unlink(missing_ok=True)
            if commit is None:
                write_columns(path, self._storage.columns, self._index.spans())
            metadata = {**self._metadata(), "commit": commit}
            if commit is None:
                metadata["run"] = None
            write_text(path / "replay.json", json.dumps(metadata))

    def load(self, path: str | Path) -> None:
        """Reads what `save` wrote; unpickles nothing.

        Args:
            path: The directory. Batch size and batch length may differ from the saved replay's, and
                so may the capacity of a replay in memory; its spaces and latents may not.

        Raises:
            ValueError: Nothing was saved to its end there, the saved columns differ, or the steps
                were kept in another directory.
        """
        path = Path(path)
        if not (path / "replay.json").is_file():
            raise ValueError(f"{path} holds no replay: replay.json, written last, is missing")
        metadata = json.loads((path / "replay.json").read_text())
        with self._lock:
            data = None
            if metadata["run"] is None:
                data = read_columns(path, [name for name, *_ in metadata["columns"]])
            self._restore(metadata, data)

    def _restore(self, metadata: Mapping[str, Any], data: Mapping[str, np.ndarray] | None) -> None:
        self._check_columns(metadata)
        state = metadata["index"]
        if data is None:
            skip = self._adopt(metadata)
        else:
            skip = 0
            self._storage.clear()
        self._index = self._new_index()
        start = 0
        for number, held in self._index.restore(state, skip):
            if data is None:
                list(self._index.extend(number, held))  # in place already
            else:
                self._append(number, data, start, held)
            start += held
        self._rng.bit_generator.state = metadata["rng"]
        self._inserts, self._samples = metadata["inserts"], metadata["samples"]

    def _check_columns(self, metadata: Mapping[str, Any]) -> None:
        saved = {k: Column(tuple(shape), np.dtype(d)) for k, shape, d in metadata["columns"]}
        names = sorted(k for k in saved | self.layout if saved.get(k) != self.layout.get(k))
        if metadata["format"] != _FORMAT or names:
            differing = ", ".join(f"{k}: {saved.get(k)} saved" for k in names)
            raise ValueError(
                f"saved replay (format {metadata['format']}) does not fit this one (format "
                f"{_FORMAT}); columns that differ: {differing or 'none'}: restore with the env and "
                "model_size it was saved with, or start with an empty replay"
            )

    def _adopt(self, metadata: Mapping[str, Any]) -> int:
        """Goes on with steps kept on disk; returns how many of the oldest saved chunks are gone."""
        state = metadata["index"]
        if not isinstance(self._storage, DiskStorage):
            raise ValueError(
                "saved replay kept its steps on disk, this one is in memory: set "
                "replay_directory to that of the saved run, or start with an empty replay by "
                "store_buffer_in_checkpoints=False"
            )
        serials = state["oldest_serial"] + np.arange(len(state["chunks"]), dtype=np.int64)
        there = self._storage.adopt(metadata["run"], metadata["commit"], serials)
        gone = np.flatnonzero(~there)
        return int(gone[-1]) + 1 if len(gone) else 0

    def close(self) -> None:
        """Gives memory, or the directory of a replay on disk, free: there are no steps any more."""
        with self._lock:
            self._storage.close()
