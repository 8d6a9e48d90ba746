"""Where replayed steps lie: one array per column, in memory or in memory-mapped files.

A step is a row in each column: observations, actions, reward, flags and the latents (`deter` in 16
bits, `stoch` as one class index per group). The rows are divided into chunks of equal length, and
the chunks form a ring: chunk number `serial` lies in place `serial % num_chunks`. A step therefore
has a lasting number, `id = serial * chunk_length + offset`, and its row is `id % num_rows`; whether
it is still there is one comparison with the oldest id that is.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from filelock import FileLock, Timeout
from gymnasium import spaces

from rllib_dreamer.atomic import write_text
from rllib_dreamer.replay_memory import GB, MemoryClaim, check_memory
from rllib_dreamer.spaces import leaf_spaces

_SERIAL_ELEMENTS = 2**14
LATENTS = ("deter", "stoch")


class Column(NamedTuple):
    """What one column holds for each step."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes a step takes in this column."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def _leaf_dtype(leaf: gym.Space) -> np.dtype[Any]:
    if not isinstance(leaf, spaces.Box):
        return np.dtype(np.int32)
    return np.dtype(np.uint8 if leaf.dtype == np.uint8 else np.float32)


def step_layout(
    observation_space: gym.Space, action_space: gym.Space, *, deter: int, stoch: int
) -> dict[str, Column]:
    """Returns the columns of a replayed step, by name.

    Args:
        observation_space: The env's observation space; its leaves become `"obs/<key>"`.
        action_space: The env's action space; its leaves become `"action/<key>"`.
        deter: Width D of the deterministic state.
        stoch: Number S of categorical groups of the stochastic state.

    Returns:
        Shape and dtype of each column. uint8 Boxes stay uint8, other Boxes are float32, discrete
        leaves int32, deter float16 and stoch uint8.

    Raises:
        ValueError: A leaf of a space has no fixed shape.
    """
    layout: dict[str, Column] = {}
    for kind, space, root in (("obs", observation_space, None), ("action", action_space, "action")):
        for key, leaf in leaf_spaces(space, root).items():
            if leaf.shape is None:
                raise ValueError(
                    f"{kind} space {key!r} is {leaf}, which has no fixed shape; allowed are Box, "
                    "Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these: wrap the env"
                )
            layout[f"{kind}/{key}"] = Column(leaf.shape, _leaf_dtype(leaf))
    layout["reward"] = Column((), np.dtype(np.float32))
    for name in ("is_first", "is_last", "is_terminal"):
        layout[name] = Column((), np.dtype(np.bool_))
    layout["deter"] = Column((deter,), np.dtype(np.float16))
    layout["stoch"] = Column((stoch,), np.dtype(np.uint8))
    return layout


def step_nbytes(layout: Mapping[str, Column]) -> int:
    """Returns the bytes one step takes over all columns."""
    return sum(column.nbytes for column in layout.values())


def to_half(values: np.ndarray) -> np.ndarray:
    """Returns float32 values in 16 bits.

    PyTorch does this many times faster than NumPy. It is given pieces too small for it to wake its
    threads, for which a busy machine would make the caller wait much longer than the work takes.
    """
    if values.dtype != np.float32:
        return values.astype(np.float16, copy=False)
    if not (values.flags.c_contiguous and values.flags.writeable):
        values = values.copy()  # PyTorch warns of read-only arrays
    source = torch.from_numpy(values)
    if values.size <= _SERIAL_ELEMENTS:
        return source.half().numpy()
    out = np.empty(values.shape, np.float16)
    source, target = source.view(-1), torch.from_numpy(out.reshape(-1))
    for start in range(0, len(source), _SERIAL_ELEMENTS):
        target[start : start + _SERIAL_ELEMENTS].copy_(source[start : start + _SERIAL_ELEMENTS])
    return out


def check_disk(nbytes: int, directory: Path) -> None:
    """Refuses a replay whose files would not fit on the disk of `directory`.

    Raises:
        ValueError: The files need more than is free there.
    """
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise ValueError(
            f"replay_directory {str(directory)!r} needs {nbytes / GB:.1f} GB when the replay is "
            f"full, but only {free / GB:.1f} GB are free on that disk: lower replay_capacity "
            "or choose a directory on another disk"
        )


def _reserve_blocks(path: Path) -> None:
    """Gives a sparse file its disk blocks: writing to a map without them kills the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class StepStorage:
    """A ring of chunks of steps in memory.

    The arrays are reserved at once but the system maps their pages only when they are first
    written: the resident size grows with the steps stored, up to `num_rows * step_nbytes`.

    Attributes:
        columns: One array of shape `(num_rows, *shape)` for each column.
        num_rows: Rows in each column, `num_chunks * chunk_length`.
        run: Names what the files of a replay on disk hold; None in memory.
        claim: Tells other processes of the memory; None on disk.
    """

    def __init__(self, layout: Mapping[str, Column], num_chunks: int, chunk_length: int) -> None:
        """Reserves the columns of `layout` for `num_chunks * chunk_length` steps."""
        self.layout = dict(layout)
        self.num_chunks = num_chunks
        self.chunk_length = chunk_length
        self.num_rows = num_chunks * chunk_length
        self.run: str | None = None
        self.claim: MemoryClaim | None = None
        self.columns = self._make_columns()

    def _make_columns(self) -> dict[str, np.ndarray]:
        return {
            name: np.empty((self.num_rows, *column.shape), column.dtype)
            for name, column in self.layout.items()
        }

    def write(self, first: int, steps: Mapping[str, np.ndarray], start: int, count: int) -> None:
        """Writes `steps[start:start + count]` at id `first`; they must not leave its chunk."""
        row = first % self.num_rows
        if first % self.chunk_length == 0:
            self._mark(first // self.chunk_length)
        for name, column in self.columns.items():
            column[row : row + count] = steps[name][start : start + count]

    def _mark(self, serial: int) -> None:
        """Says that a place of the ring is about to be taken by chunk `serial`."""

    def gather(self, ids: np.ndarray, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Returns copies of the steps `ids` (any shape), one array per column named."""
        rows = ids % self.num_rows
        names = self.columns if names is None else names
        return {name: np.take(self.columns[name], rows, axis=0) for name in names}

    def clear(self) -> None:
        """Forgets all steps, so that chunks may be numbered anew; nothing to do in memory."""

    def commit(self) -> str | None:
        """Makes sure that what was written outlives the machine; nothing to do in memory.

        Returns:
            A name for what is stored now, which a checkpoint keeps; None in memory.
        """
        return None

    def close(self) -> None:
        """Gives up the steps; the next replay may use the same place."""
        self.columns = {}
        self.claim = None


class DiskStorage(StepStorage):
    """The same ring in memory-mapped files of one directory, which is reserved in full at once.

    `chunks.npy` says which chunk lies in each place and is on the disk before the chunk is. A
    checkpoint can so name chunks without copying them: after a restart those whose place was taken
    by a later chunk are known to be gone. `replay.json` lists the commits whose steps lie here.
    Writing after an earlier one was restored strikes out the later ones, whose chunks would get
    other steps under the same numbers. The files belong to one replay at a time.
    """

    def __init__(
        self,
        layout: Mapping[str, Column],
        num_chunks: int,
        chunk_length: int,
        directory: str | Path,
    ) -> None:
        """Opens the files in `directory`, or creates them.

        Raises:
            ValueError: Another replay uses the directory, it holds a replay with other columns or
                another capacity, or the disk has too little room.
        """
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / "lock")
        self._maps: list[np.memmap[Any, Any]] = []
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"replay_directory {str(directory)!r} is in use by another replay: give each "
                "running trial its own directory, or close the other one first"
            ) from None
        try:
            super().__init__(layout, num_chunks, chunk_length)
        except BaseException:
            self._lock.release()
            raise

    def _describe(self) -> dict[str, Any]:
        return {
            "num_chunks": self.num_chunks,
            "chunk_length": self.chunk_length,
            "columns": [[k, list(c.shape), c.dtype.str] for k, c in self.layout.items()],
        }

    def _make_columns(self) -> dict[str, np.ndarray]:
        self._manifest = self.directory / "replay.json"
        exists = self._manifest.is_file()
        if exists:
            found = json.loads(self._manifest.read_text())
            self.run, self._commits = str(found.pop("run")), found.pop("commits")
            if found != self._describe():
                raise ValueError(
                    f"replay_directory {str(self.directory)!r} holds a replay of "
                    f"{found['num_chunks'] * found['chunk_length']:,} steps with columns "
                    f"{[c[0] for c in found['columns']]}, which is not the one configured "
                    f"({self.num_rows:,} steps with columns {list(self.layout)}): keep "
                    "replay_capacity, spaces and model_size as they were, or choose an empty one"
                )
        else:
            self._remove_files()  # of a creation that came to no end
            check_disk(self.num_rows * step_nbytes(self.layout), self.directory)
        columns = self._open_files(create=not exists)
        self._started = self._adopted = False
        if not exists:
            self.clear()
        return columns

    def _open_files(self, *, create: bool) -> dict[str, np.ndarray]:
        """Maps the columns and `chunks.npy`, with all their blocks reserved if they are new."""
        try:
            columns = {
                name: self._map(f"column_{i:02}.npy", column, self.num_rows, create=create)
                for i, (name, column) in enumerate(self.layout.items())
            }
            entry = Column((), np.dtype(np.int64))
            self._chunks = self._map("chunks.npy", entry, self.num_chunks, create=create)
        except OSError as error:
            if not create:
                raise
            self._remove_files()
            raise ValueError(
                f"replay_directory {str(self.directory)!r} cannot hold the replay "
                f"({error.strerror or error}): lower replay_capacity, run fewer trials on that "
                "disk, or choose a directory on another one"
            ) from error
        return columns

    def _remove_files(self) -> None:
        self._maps.clear()
        for path in (*self.directory.glob("column_*.npy"), self.directory / "chunks.npy"):
            path.unlink(missing_ok=True)

    def _map(self, name: str, column: Column, rows: int, *, create: bool) -> np.ndarray:
        path = self.directory / name
        if create:
            shape = (rows, *column.shape)
            array = np.lib.format.open_memmap(path, mode="w+", dtype=column.dtype, shape=shape)
            _reserve_blocks(path)
        else:
            array = np.lib.format.open_memmap(path, mode="r+")
        self._maps.append(array)
        return np.asarray(array)

    def clear(self) -> None:
        """Declares that the files hold nothing and belong to a new run."""
        self._started = True
        self.run, self._commits = uuid.uuid4().hex, []
        self._chunks[:] = -1
        self._write_manifest()

    def _write_manifest(self) -> None:
        found = {**self._describe(), "run": self.run, "commits": self._commits}
        write_text(self._manifest, json.dumps(found))

    def adopt(self, run: str, commit: str, serials: np.ndarray) -> np.ndarray:
        """Goes on with the files of an earlier run as they were at one of its commits.

        Args:
            run: Its name, from a checkpoint.
            commit: What `commit` returned for the checkpoint.
            serials: (n,) chunks that the checkpoint counts on.

        Returns:
            (n,) bool, whether each of them is still there.

        Raises:
            ValueError: The files are those of another run, or of this one after it went on from an
                earlier commit.
        """
        if run != self.run:
            raise ValueError(
                f"replay_directory {str(self.directory)!r} holds the steps of run {self.run}, the "
                f"checkpoint needs those of run {run}: set replay_directory to the one used "
                "when the checkpoint was written (a new run in it replaces the old one)"
            )
        if commit not in self._commits:
            raise ValueError(
                f"replay_directory {str(self.directory)!r} has been written to by a run that went "
                "on from an earlier checkpoint than this one, whose steps it replaced: restore "
                "that run's latest checkpoint"
            )
        self._commits = self._commits[: self._commits.index(commit) + 1]
        self._started, self._adopted = False, True
        return np.asarray(self._chunks[serials % self.num_chunks] == serials)

    def write(self, first: int, steps: Mapping[str, np.ndarray], start: int, count: int) -> None:
        """Writes steps; the first time, gives up those that no adopted commit knows."""
        if not self._started:
            if self._adopted:
                self._write_manifest()
            else:
                self.clear()
            self._started = True
        super().write(first, steps, start, count)

    def _mark(self, serial: int) -> None:
        self._chunks[serial % self.num_chunks] = serial
        self._maps[-1].flush()

    def commit(self) -> str | None:
        """Writes changed pages to the disk, and notes that a checkpoint counts on them.

        Returns:
            The commit's name; None while the files hold nothing of this run.
        """
        if not (self._started or self._adopted):
            return None
        for array in self._maps:
            array.flush()
        self._commits.append(uuid.uuid4().hex)
        self._write_manifest()
        return self._commits[-1]

    def close(self) -> None:
        """Closes the files, which stay, and gives the directory free for another replay."""
        super().close()
        self._maps.clear()
        self._lock.release()


def open_storage(
    layout: Mapping[str, Column],
    num_chunks: int,
    chunk_length: int,
    directory: str | Path | None,
) -> StepStorage:
    """Returns a ring of chunks in `directory`, or in memory without one.

    Raises:
        ValueError: Memory or disk do not suffice, or see `DiskStorage`.
    """
    if directory is not None:
        return DiskStorage(layout, num_chunks, chunk_length, directory)
    num_rows = num_chunks * chunk_length
    nbytes = num_rows * step_nbytes(layout)
    check_memory(nbytes, num_rows)
    storage = StepStorage(layout, num_chunks, chunk_length)
    storage.claim = MemoryClaim(nbytes)
    storage.claim.warn()
    return storage


def write_columns(
    directory: Path, columns: Mapping[str, np.ndarray], spans: list[tuple[int, int]]
) -> None:
    """Writes rows of each column to one .npy file, span by span and without a copy in memory.

    Args:
        directory: Where `column_00.npy`, `column_01.npy`, ... go, in the order of `columns`.
        columns: Arrays of shape (rows, ...).
        spans: (first row, count) of the rows to write, in order.
    """
    total = sum(count for _, count in spans)
    for i, column in enumerate(columns.values()):
        header = {
            "descr": np.lib.format.dtype_to_descr(column.dtype),
            "fortran_order": False,
            "shape": (total, *column.shape[1:]),
        }
        with (directory / f"column_{i:02}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for row, count in spans:
                file.write(column[row : row + count].data)


def read_columns(directory: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Maps the files of `write_columns` without reading them; no pickled objects are accepted."""
    return {
        name: np.load(directory / f"column_{i:02}.npy", mmap_mode="r", allow_pickle=False)
        for i, name in enumerate(names)
    }
