"""Tests of rllib_dreamer.evaluation.videos."""

from __future__ import annotations

import io
from pathlib import Path

import imageio_ffmpeg
import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from rllib_dreamer.evaluation import videos


def read_film(path: Path) -> tuple[dict, NDArray[np.uint8]]:
    """Decodes a film to its metadata and (T, h, w, 3) frames."""
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    w, h = meta["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(h, w, 3) for frame in reader]
    return meta, np.stack(frames)


def moving_square(steps: int, size: int) -> NDArray[np.uint8]:
    """A white square that moves over black: (T, size, size, 3)."""
    frames = np.zeros((steps, size, size, 3), np.uint8)
    for step in range(steps):
        frames[step, 4:12, 2 * step : 2 * step + 8] = 255
    return frames


def test_film_can_be_read_back(tmp_path: Path) -> None:
    frames = moving_square(6, 32)
    path = videos.write_mp4(tmp_path / "new" / "film.mp4", frames, fps=10)
    meta, decoded = read_film(path)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["fps"] == 10
    assert decoded.shape == (6, 256, 256, 3)
    small = decoded[:, 4::8, 4::8].astype(int)  # the middle of each enlarged pixel
    assert np.abs(small - frames).mean() < 5
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is fully loaded


def test_a_long_film_is_enlarged_frame_by_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    enlarge = videos.upscale
    monkeypatch.setattr(
        videos, "upscale", lambda x, side: shapes.append(x.shape) or enlarge(x, side)
    )
    videos.encode_mp4(moving_square(5, 32))
    assert set(shapes) == {(32, 32, 3)} and len(shapes) >= 5


@pytest.mark.parametrize(("h", "w"), [(33, 47), (100, 87), (301, 257), (400, 300)])
def test_upscale_gives_even_sizes_and_keeps_pixels(h: int, w: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, h, w, 3), np.uint8)
    large = videos.upscale(frames, 256)
    assert large.shape[1] % 2 == large.shape[2] % 2 == 0
    factor = large.shape[1] // h
    assert min(large.shape[1:3]) >= 256
    np.testing.assert_array_equal(large[:, : h * factor : factor, : w * factor : factor], frames)


def test_upscale_leaves_large_frames_alone() -> None:
    frames = np.zeros((1, 300, 256, 3), np.uint8)
    assert videos.upscale(frames, 256).shape == frames.shape


def test_to_rgb_of_gray_stacks_and_floats() -> None:
    frames = np.arange(2 * 2 * 12, dtype=np.uint8).reshape(2, 2, 12)
    gray = videos.to_rgb(frames[..., :1])
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
    np.testing.assert_array_equal(videos.to_rgb(frames[..., :4])[..., 1], frames[..., 3])
    np.testing.assert_array_equal(videos.to_rgb(frames), frames[..., -3:])
    floats = videos.to_rgb(np.array([[[-0.5, 0.5, 1.5]]], np.float32))
    np.testing.assert_array_equal(floats, [[[0, 128, 255]]])


def test_grid_rows_and_borders() -> None:
    B, T, size, border = 2, 4, 8, 3
    truth = np.full((B, T, size, size, 3), 100, np.uint8)
    model = truth.copy()
    model[1, 3] = 200  # the second sequence is wrong at the last step
    grid = videos.open_loop_grid(model, truth, context=2, tile=size, border=border)
    tile = size + 2 * border
    assert grid.shape == (T, 3 * tile, B * tile, 3)
    for step in range(T):
        color = videos.CONTEXT_COLOR if step < 2 else videos.OPEN_LOOP_COLOR
        np.testing.assert_array_equal(grid[step, 0, 0], color)
        np.testing.assert_array_equal(grid[step, -1, -1], color)
        np.testing.assert_array_equal(grid[step, tile + border - 1, tile + 5], color)
    centers = grid[:, tile // 2 :: tile, tile // 2 :: tile, 0]  # (T, row, sequence)
    np.testing.assert_array_equal(centers[0], [[100, 100], [100, 100], [128, 128]])
    np.testing.assert_array_equal(centers[3], [[100, 100], [100, 200], [128, 178]])


def test_grid_without_context_is_red_and_encodes() -> None:
    frames = moving_square(3, 16)[None]
    grid = videos.open_loop_grid(frames, frames / 255.0, context=0)
    np.testing.assert_array_equal(grid[0, 0, 0], videos.OPEN_LOOP_COLOR)
    assert grid.shape[2] == 96 + 6
    assert videos.encode_mp4(grid)[4:8] == b"ftyp"


def test_poster_is_the_frame() -> None:
    frame = moving_square(1, 64)[0]
    png = videos.poster_png(frame)
    image = matplotlib.image.imread(io.BytesIO(png), format="png")
    np.testing.assert_array_equal((255 * image[::4, ::4, :3]).round(), frame)


def test_errors_name_the_field() -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"frames: got shape \(8, 8, 3\)"):
        videos.encode_mp4(frames[0])
    with pytest.raises(ValueError, match=r"frames: got shape \(0, 8, 8, 3\)"):
        videos.encode_mp4(frames[:0])
    with pytest.raises(ValueError, match="fps: got 0"):
        videos.encode_mp4(frames, fps=0)
    with pytest.raises(ValueError, match="frames: got dtype int64"):
        videos.to_rgb(frames.astype(np.int64))
    with pytest.raises(ValueError, match="model, truth: got shapes"):
        videos.open_loop_grid(frames, frames, context=0)
    with pytest.raises(ValueError, match="context: got 3; must be 0 to 2"):
        videos.open_loop_grid(frames[None], frames[None], context=3)
