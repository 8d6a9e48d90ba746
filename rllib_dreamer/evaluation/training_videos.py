"""Films of a run while it trains: what its world model imagines, and an evaluation episode.

They lie in the folder `videos` of a trial, as MP4 and, for TensorBoard, as animated GIF in event
files of a run of that name: TensorBoard knows no other moving pictures.
"""

from __future__ import annotations

import io
import logging
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.fs
from PIL import Image
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EVALUATION_RESULTS
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from rllib_dreamer.evaluation import videos
from rllib_dreamer.evaluation.recorder import EPISODE, VIDEOS, forget_episodes, open_loop_frames
from rllib_dreamer.policy.imagination import CONTEXT
from rllib_dreamer.spaces import canonical, leaf_spaces

if TYPE_CHECKING:
    from rllib_dreamer.dreamer import DreamerTorch

logger = logging.getLogger(__name__)

_ROWS = 4  # sequences side by side
_CANDIDATES = 32  # sequences that those are chosen from
_FPS = 20.0
_OPEN_LOOP_FPS = 8.0
_GIF_FRAMES = 100
_PALETTE_FRAMES = 4


class Film(NamedTuple):
    """Frames (T, h, w, C) shown at `fps`, made after `step` env steps."""

    name: str
    frames: np.ndarray
    fps: float
    step: int


class TrainingVideos:
    """Makes films of an algorithm's run at an interval; a thread encodes and writes them.

    Args:
        interval_s: Least seconds between two films of a kind.
        algorithm: What trains; its trial's folder, which may be remote, is where films go.
    """

    def __init__(self, interval_s: float, algorithm: DreamerTorch) -> None:
        self._interval_s, self._algorithm = interval_s, algorithm
        self._due_at = 0.0
        self._rng = np.random.default_rng(0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="videos")
        self._pending: dict[Future[str], str] = {}
        storage = algorithm._storage
        self._filesystem = storage.storage_filesystem if storage else pyarrow.fs.LocalFileSystem()
        self._folder = str(Path(storage.trial_fs_path if storage else algorithm.logdir) / VIDEOS)

    def report(self, result: dict[str, Any]) -> None:
        """Films what an iteration brought; takes pictures out of its result and puts files in."""
        step = result["dreamer"]["env_steps"]
        evaluated = result.get(EVALUATION_RESULTS, {}).get(ENV_RUNNER_RESULTS, {})
        episodes = evaluated.pop(EPISODE, None)
        forget_episodes(self._algorithm.metrics)
        frames = episodes[-1] if isinstance(episodes, list) and episodes else episodes
        if isinstance(frames, np.ndarray):  # NaN or no metric at all if none was recorded
            self._submit(Film("evaluation_episode", frames, _FPS, step))
        learned = result["dreamer"]["updates"] and self._algorithm.replay.num_sequences
        if learned and time.monotonic() >= self._due_at:
            self._film_open_loop(step)
            self._due_at = time.monotonic() + self._interval_s
        files = self._finished()
        if files:
            result[VIDEOS] = files

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.shutdown()
        self._finished()

    def _film_open_loop(self, step: int) -> None:
        """Films what the first learner's world model makes of sequences of the replay."""
        replay = self._algorithm.replay
        context = min(CONTEXT, replay.batch_length - 1)
        rows = _whole(replay.peek(self._rng, _CANDIDATES))
        task = partial(open_loop_frames, rows=rows, context=context)
        frames = self._algorithm._on_learners(task, [0])[0]
        leaves = leaf_spaces(self._algorithm.spaces[DEFAULT_MODULE_ID][0])
        for key, model in frames.items():
            truth = canonical(rows[f"obs/{key}"][:, 1:], leaves[key])
            grid = videos.open_loop_grid(model, truth, context)
            name = "open_loop_" + key.replace("/", "_")
            self._submit(Film(name, grid, _OPEN_LOOP_FPS, step))

    def _submit(self, film: Film) -> None:
        self._pending[self._thread.submit(self._write, film)] = film.name

    def _finished(self) -> dict[str, str]:
        """The films written since the last call. One that fails costs a warning, not the run."""
        done = {future: name for future, name in self._pending.items() if future.done()}
        files = {}
        for future, name in done.items():
            del self._pending[future]
            error = future.exception()
            if error is None:
                files[name] = future.result()
            else:
                logger.warning("the film %s could not be written: %s", name, error)
        return files

    def _write(self, film: Film) -> str:
        """Writes a film to the trial's folder and returns its file."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{film.name}_{film.step:09d}.mp4"
            videos.write_mp4(file, film.frames, film.fps)
            write_event(folder, film)
            self._filesystem.create_dir(self._folder)
            pyarrow.fs.copy_files(
                folder, self._folder, pyarrow.fs.LocalFileSystem(), self._filesystem
            )
        return f"{self._folder}/{file.name}"


def write_event(folder: str | Path, film: Film) -> None:
    """Writes a film as an event file for TensorBoard.

    Args:
        folder: Where to.
        film: The film; of a long one about a hundred frames are shown.
    """
    frames = videos.to_rgb(film.frames)
    stride = -(-len(frames) // _GIF_FRAMES)
    height, width = frames.shape[1:3]
    picture = Summary.Image(
        height=height,
        width=width,
        colorspace=3,
        encoded_image_string=_gif(frames[::stride], film.fps / stride),
    )
    summary = Summary(value=[Summary.Value(tag=f"{VIDEOS}/{film.name}", image=picture)])
    # The suffix tells files of the same second apart.
    writer = EventsWriter(str(Path(folder) / "events"), filename_suffix=f".{film.name}")
    writer.write_event(Event(summary=summary, step=film.step, wall_time=time.time()))
    writer.close()


def _gif(frames: np.ndarray, fps: float) -> bytes:
    """Frames (T, h, w, 3) as an animated GIF that starts over at its end.

    All share one palette, that of a few of them: one for each frame takes ten times as long.
    """
    few = np.linspace(0, len(frames) - 1, _PALETTE_FRAMES).round().astype(int)
    palette = Image.fromarray(np.concatenate(frames[few])).quantize(dither=Image.Dither.NONE)
    first, *others = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    buffer = io.BytesIO()
    timing = {"duration": round(1000 / fps), "loop": 0}
    first.save(buffer, "GIF", save_all=True, append_images=others, optimize=False, **timing)
    return buffer.getvalue()


def _whole(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Chooses sequences, if possible such that lie within one episode."""
    resets = rows["is_first"][:, 2:].sum(1)  # a reset at the first filtered step does no harm
    chosen = np.argsort(resets, kind="stable")[:_ROWS]
    return {key: x[chosen] for key, x in rows.items()}
