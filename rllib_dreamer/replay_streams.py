"""Which steps of the replay belong together, and where a sequence may start. No data lies here.

A stream is the run of consecutive steps of one env: episode after episode, through many chunks.
Sequences are windows of a stream and cross the ends of episodes freely. An episode goes on in its
stream; a new episode takes a stream whose episode has ended, or a new one. Chunks are evicted
oldest first, whichever stream they belong to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Stream:
    """The consecutive steps of one env.

    Attributes:
        start: Position, counted from the beginning of the stream, of the oldest step stored.
        stop: Position after the newest step.
        window: Position at which the next window of the online queue begins.
        serials: The chunks that hold the steps, oldest first; all but the last are full.
        episode: Id of the episode going on in this stream, None if it has ended.
        next_t: Env step of that episode which comes next.
        reward: The reward that came with the observation of step `next_t`.
    """

    start: int = 0
    stop: int = 0
    window: int = 0
    serials: deque[int] = field(default_factory=deque)
    episode: str | None = None
    next_t: int = 0
    reward: float = 0.0

    def __len__(self) -> int:
        """Steps stored."""
        return self.stop - self.start


class StreamIndex:
    """Keeps the streams of a ring of chunks and draws sequences from them.

    Attributes:
        streams: The streams that have steps stored, by number.
        size: Steps stored.
        next_serial: Number of the next chunk to be taken.
    """

    def __init__(
        self, num_chunks: int, chunk_length: int, sequence_length: int, *, online: bool
    ) -> None:
        """Starts empty.

        Args:
            num_chunks: Places in the ring.
            chunk_length: Steps in a chunk.
            sequence_length: Steps in a sequence, T + 1.
            online: Whether each stream is cut into windows that are drawn once before all others.
        """
        self.num_chunks = num_chunks
        self.chunk_length = chunk_length
        self.sequence_length = sequence_length
        self.streams: dict[int, Stream] = {}
        self.size = 0
        self.next_serial = 0
        self._first_serial = 0
        self._restoring = False
        self._next_stream = 0
        self._episodes: dict[str, int] = {}
        self._free: list[int] = []
        self._owners = [-1] * num_chunks
        # More windows than fit into the ring can't be stored any longer; the oldest fall out.
        most = num_chunks * chunk_length // sequence_length + 1
        self._windows: deque[tuple[int, int]] = deque(maxlen=most if online else 0)

    @property
    def oldest_serial(self) -> int:
        """The oldest chunk that is still stored."""
        return max(self._first_serial, self.next_serial - self.num_chunks)

    @property
    def is_full(self) -> bool:
        """Whether every place in the ring holds a chunk."""
        return self.next_serial - self.oldest_serial >= self.num_chunks

    @property
    def num_sequences(self) -> int:
        """Number of steps at which a whole sequence starts."""
        return sum(self._starts())

    @property
    def num_windows(self) -> int:
        """Windows waiting in the online queue, those evicted meanwhile included."""
        return len(self._windows)

    def _starts(self) -> list[int]:
        return [max(0, len(s) - self.sequence_length + 1) for s in self.streams.values()]

    def stored(self, ids: np.ndarray) -> np.ndarray:
        """Returns whether each of the step `ids` is still stored, as bool of the same shape."""
        oldest, end = self.oldest_serial, self.next_serial
        return (ids >= oldest * self.chunk_length) & (ids < end * self.chunk_length)

    # Writing.

    def continued(self, episode: str, t: int) -> Stream | None:
        """Returns the stream that env step `t` of an episode continues without a gap, if any."""
        stream = self.streams.get(self._episodes.get(episode, -1))
        return stream if stream is not None and stream.next_t == t else None

    def open(self, episode: str, t: int) -> int:
        """Returns the number of the stream in which the episode goes on from env step `t`.

        If a piece of the episode before `t` never arrived, what follows it counts as an episode of
        its own.
        """
        if self.continued(episode, t) is not None:
            return self._episodes[episode]
        if episode in self._episodes:
            self._release(self._episodes[episode])
        if self._free:
            number = self._free.pop(0)  # of the env that ended first, which begins first
        else:
            number, self._next_stream = self._next_stream, self._next_stream + 1
            self.streams[number] = Stream()
        self._episodes[episode] = number
        self.streams[number].episode = episode
        return number

    def release_all_but(self, episodes: AbstractSet[str]) -> None:
        """Ends all open episodes but those with the given ids; their streams take new ones."""
        for episode, number in list(self._episodes.items()):
            if episode not in episodes:
                self._release(number)

    def _release(self, number: int) -> None:
        stream = self.streams[number]
        if stream.episode is not None:
            del self._episodes[stream.episode]
            stream.episode = None
            self._free.append(number)

    def extend(self, number: int, count: int) -> Iterator[tuple[int, int]]:
        """Makes room for `count` more steps of a stream.

        Yields:
            (first id, number of steps) of one piece after another, each within one chunk. A piece
            has to be written before the next one is asked for.
        """
        stream = self.streams[number]
        while count:
            if len(stream) == len(stream.serials) * self.chunk_length:
                self._take_chunk(number)
            offset = len(stream) - (len(stream.serials) - 1) * self.chunk_length
            piece = min(count, self.chunk_length - offset)
            stream.stop += piece
            self.size += piece
            count -= piece
            yield stream.serials[-1] * self.chunk_length + offset, piece

    def _take_chunk(self, number: int) -> None:
        serial = self.next_serial
        if serial - self.num_chunks >= self._first_serial:
            self._evict(serial - self.num_chunks, keep=number)
        self._owners[serial % self.num_chunks] = number
        self.streams[number].serials.append(serial)
        self.next_serial += 1

    def _evict(self, serial: int, keep: int) -> None:
        number = self._owners[serial % self.num_chunks]
        stream = self.streams[number]
        dropped = min(self.chunk_length, len(stream))
        stream.serials.popleft()
        stream.start += dropped
        self.size -= dropped
        if not stream.serials and number != keep and not self._restoring:
            self._remove(number)

    def _remove(self, number: int) -> None:
        self._release(number)
        self._free = [free for free in self._free if free != number]
        del self.streams[number]

    def advance(self, number: int, next_t: int, reward: float, *, done: bool) -> None:
        """Notes how an episode goes on after steps were added, and queues what became complete.

        Args:
            number: The stream.
            next_t: Env step of the episode which comes next.
            reward: The reward that came with its observation.
            done: Whether the episode has ended.
        """
        stream = self.streams[number]
        stream.next_t, stream.reward = next_t, reward
        while stream.stop - stream.window >= self.sequence_length:
            self._windows.append((number, stream.window))
            stream.window += self.sequence_length
        if done:
            self._release(number)

    # Drawing.

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws sequences: windows of the online queue first, then any start with equal chance.

        Returns:
            (count, sequence_length) int64 step ids.
        """
        starts = self._pop_windows(count)
        if len(starts) < count:
            starts += self._draw_starts(rng, count - len(starts))
        return np.stack([self._ids(stream, position) for stream, position in starts])

    def draw_at_random(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """As `draw`, without the online queue."""
        return np.stack([self._ids(*start) for start in self._draw_starts(rng, count)])

    def _pop_windows(self, count: int) -> list[tuple[Stream, int]]:
        starts: list[tuple[Stream, int]] = []
        while self._windows and len(starts) < count:
            number, position = self._windows.popleft()
            stream = self.streams.get(number)
            if stream is not None and position >= stream.start:
                starts.append((stream, position))
        return starts

    def _draw_starts(self, rng: np.random.Generator, count: int) -> list[tuple[Stream, int]]:
        streams = list(self.streams.values())
        ends = np.cumsum(self._starts())
        drawn = rng.integers(ends[-1], size=count)
        owners = np.searchsorted(ends, drawn, side="right")
        # Counted back from the end: draw `end - 1` is the last start of its stream.
        return [
            (s := streams[k], s.stop - self.sequence_length - int(ends[k] - 1 - n))
            for k, n in zip(owners, drawn, strict=True)
        ]

    def _ids(self, stream: Stream, position: int) -> np.ndarray:
        length = self.chunk_length
        chunk, offset = divmod(position - stream.start, length)
        last = (position - stream.start + self.sequence_length - 1) // length
        first_ids = np.array([stream.serials[k] * length for k in range(chunk, last + 1)])
        steps = np.arange(offset, offset + self.sequence_length)
        return first_ids[steps // length] + steps % length

    # Saving.

    def chunks(self) -> list[tuple[int, int]]:
        """Returns (stream number, steps held) of each stored chunk, oldest first."""
        held = []
        for serial in range(self.oldest_serial, self.next_serial):
            number = self._owners[serial % self.num_chunks]
            stream = self.streams[number]
            full = (len(stream.serials) - 1) * self.chunk_length
            is_head = stream.serials[-1] == serial
            held.append((number, len(stream) - full if is_head else self.chunk_length))
        return held

    def spans(self) -> list[tuple[int, int]]:
        """Returns (first row, steps held) of each stored chunk, oldest first."""
        serials = range(self.oldest_serial, self.next_serial)
        return [
            (serial % self.num_chunks * self.chunk_length, held)
            for serial, (_, held) in zip(serials, self.chunks(), strict=True)
        ]

    def get_state(self) -> dict[str, Any]:
        """Returns everything but the data, as plain values that JSON can hold."""
        names = ("start", "window", "episode", "next_t", "reward")
        return {
            "chunk_length": self.chunk_length,
            "sequence_length": self.sequence_length,
            "oldest_serial": self.oldest_serial,
            "chunks": [list(chunk) for chunk in self.chunks()],
            "streams": [
                {"number": number, **{name: getattr(stream, name) for name in names}}
                for number, stream in self.streams.items()
            ],
            "next_stream": self._next_stream,
            "free": list(self._free),
            "windows": [list(window) for window in self._windows],
        }

    def restore(self, state: Mapping[str, Any], skip: int = 0) -> Iterator[tuple[int, int]]:
        """Puts back a state; the index must be a new one.

        Ring and sequences may have other lengths than those of the state.

        Args:
            state: From `get_state`.
            skip: Number of oldest chunks that are not there any more.

        Yields:
            (stream number, steps held) of each other chunk, for which the caller calls `extend`
            before it goes on.
        """
        self._restoring = True  # a stream evicted down to nothing may still get newer chunks
        self._next_stream = state["next_stream"]
        if self.chunk_length == state["chunk_length"]:  # keeps the ids of the steps
            self.next_serial = self._first_serial = state["oldest_serial"] + skip
        for entry in state["streams"]:
            self.streams[entry["number"]] = Stream(start=entry["start"], stop=entry["start"])
        for number, held in state["chunks"][:skip]:
            self.streams[number].start += held
            self.streams[number].stop += held
        for number, held in state["chunks"][skip:]:
            yield number, held
        self._restoring = False
        same = self.sequence_length == state["sequence_length"]
        for entry in state["streams"]:
            stream = self.streams.get(entry["number"])
            if stream is None:
                continue
            stream.window = entry["window"] if same else stream.stop
            stream.next_t, stream.reward = entry["next_t"], entry["reward"]
            stream.episode = entry["episode"]
            if stream.episode is not None:
                self._episodes[stream.episode] = entry["number"]
        self._free = [number for number in state["free"] if number in self.streams]
        for number in [number for number, stream in self.streams.items() if not stream.serials]:
            self._remove(number)
        if same:
            self._windows.extend((number, position) for number, position in state["windows"])
