"""Frames to MP4, and the grid that shows what a world model expects to see.

The files are H.264 in yuv420p with the index in front, which every browser and phone plays. That
format wants even sizes, and small frames would be a stamp on today's screens: frames are enlarged
by a whole factor without smoothing, so that each source pixel stays visible.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import matplotlib.image
import numpy as np
from numpy.typing import NDArray

CONTEXT_COLOR = (46, 160, 67)
"""Border of steps that the model has observed: green."""

OPEN_LOOP_COLOR = (218, 54, 51)
"""Border of steps that the model imagines: red."""

Frames = NDArray[Any]
Images = NDArray[np.uint8]


def to_rgb(frames: Frames) -> Images:
    """Turns frames of any channel count into RGB bytes.

    One channel becomes gray. More than three are taken as stacked frames, newest last: of them
    the last three channels are shown if the count is a multiple of three, else the last one.

    Args:
        frames: (..., h, w, C) uint8 in [0, 255] or float in [0, 1] (values outside are clipped).

    Returns:
        (..., h, w, 3) RGB.

    Raises:
        ValueError: if there is no channel axis, or the dtype is neither uint8 nor float.
    """
    if frames.ndim < 3 or frames.size == 0:
        raise ValueError(
            f"frames: got shape {frames.shape}; must be (..., height, width, channels): add a "
            "channel axis to gray frames."
        )
    if frames.dtype != np.uint8 and not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames: got dtype {frames.dtype}; must be uint8 or a float in [0, 1].")
    newest = frames[..., -3:] if frames.shape[-1] % 3 == 0 else frames[..., -1:]
    if newest.dtype != np.uint8:
        newest = (255.0 * np.nan_to_num(newest).clip(0.0, 1.0) + 0.5).astype(np.uint8)
    return np.array(np.broadcast_to(newest, (*newest.shape[:-1], 3)), np.uint8)  # C -> 3


def upscale(frames: Images, min_side: int = 256) -> Images:
    """Enlarges frames by a whole factor, nearest neighbour, to even sizes.

    Args:
        frames: (..., h, w, 3) RGB.
        min_side: the shorter side comes out at least this long, in pixels; larger frames stay.

    Returns:
        (..., H, W, 3) with H and W even; an odd side that needs no enlarging repeats its last row
        or column.
    """
    factor = max(1, -(-min_side // min(frames.shape[-3:-1])))
    large = frames.repeat(factor, -3).repeat(factor, -2)  # (..., factor * h, factor * w, 3)
    pad = [(0, 0)] * (large.ndim - 3) + [(0, side % 2) for side in large.shape[-3:-1]] + [(0, 0)]
    return np.pad(large, pad, mode="edge")


def encode_mp4(frames: Frames, fps: float = 20.0, *, min_side: int = 256) -> bytes:
    """Encodes frames as an MP4 film.

    Args:
        frames: (T, h, w, C) uint8 or float frames, T >= 1, see `to_rgb`.
        fps: frames shown per second.
        min_side: least length of the shorter side in pixels, see `upscale`.

    Returns:
        The content of the file.

    Raises:
        ValueError: if `frames` is not four-dimensional or empty, or `fps` is not positive.
    """
    if frames.ndim != 4 or not frames.size:
        raise ValueError(
            f"frames: got shape {frames.shape}; must be (steps, height, width, channels), none 0."
        )
    if not fps > 0:
        raise ValueError(f"fps: got {fps}; must be positive, e.g. 20.")
    height, width = upscale(to_rgb(frames[0]), min_side).shape[:2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path),
            (width, height),
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            quality=None,
            macro_block_size=2,
            output_params=["-crf", "18", "-preset", "veryfast", "-movflags", "+faststart"],
        )
        writer.send(None)
        for frame in frames:  # one at a time: a long film enlarged is gigabytes
            writer.send(np.ascontiguousarray(upscale(to_rgb(frame), min_side)))
        writer.close()
        return path.read_bytes()


def write_mp4(path: Path, frames: Frames, fps: float = 20.0, *, min_side: int = 256) -> Path:
    """Writes frames as an MP4 film.

    Args:
        path: the file to write; its folder is made if need be.
        frames: (T, h, w, C) uint8 or float frames.
        fps: frames shown per second.
        min_side: least length of the shorter side in pixels.

    Returns:
        `path`.

    Raises:
        ValueError: see `encode_mp4`.
    """
    content = encode_mp4(frames, fps, min_side=min_side)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def poster_png(frame: Frames, *, min_side: int = 256) -> bytes:
    """Encodes one frame as a PNG, to stand in for a film that has not started.

    Args:
        frame: (h, w, C) uint8 or float frame.
        min_side: least length of the shorter side in pixels.

    Returns:
        The content of the file.
    """
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, upscale(to_rgb(frame), min_side), format="png")
    return buffer.getvalue()


def open_loop_grid(
    model: Frames, truth: Frames, context: int, *, tile: int = 96, border: int = 3
) -> Images:
    """Lays out truth, model and error in three rows, one column per sequence.

    The error row shows (model - truth + 1) / 2: mid-gray where the two agree. Tiles have a green
    border while the model observes and a red one while it imagines.

    Args:
        model: (B, T, h, w, C) frames: `context` reconstructions, then imagined ones.
        truth: (B, T, h, w, C) real frames.
        context: observed steps at the start of each sequence, 0 to T.
        tile: least length of a tile's shorter side in pixels.
        border: width of the border in pixels.

    Returns:
        (T, 3 * (H + 2 * border), B * (W + 2 * border), 3) RGB, for enlarged frames of H x W.

    Raises:
        ValueError: if the shapes differ or are not five-dimensional, or `context` is outside
            0 to T.
    """
    if model.shape != truth.shape or model.ndim != 5:
        raise ValueError(
            f"model, truth: got shapes {model.shape} and {truth.shape}; both must be the same "
            "(sequences, steps, height, width, channels)."
        )
    B, T = model.shape[:2]
    if not 0 <= context <= T:
        raise ValueError(f"context: got {context}; must be 0 to {T}, the number of steps.")
    real, seen = to_rgb(truth), to_rgb(model)
    error = ((seen.astype(np.int16) - real.astype(np.int16) + 256) // 2).clip(0, 255)
    rows = np.stack([real, seen, error.astype(np.uint8)])  # (3, B, T, h, w, 3)
    tiles = upscale(rows, tile)
    edge = ((0, 0),) * 3 + ((border, border),) * 2 + ((0, 0),)
    framed = np.pad(tiles, edge)  # (3, B, T, H + 2 * border, W + 2 * border, 3)
    inside = np.zeros(framed.shape[3:5], bool)
    inside[border : border + tiles.shape[3], border : border + tiles.shape[4]] = True
    framed[:, :, :context, ~inside] = CONTEXT_COLOR
    framed[:, :, context:, ~inside] = OPEN_LOOP_COLOR
    grid = framed.transpose(2, 0, 3, 1, 4, 5)  # (T, 3, H, B, W, 3)
    return grid.reshape(T, 3 * framed.shape[3], B * framed.shape[4], 3)
