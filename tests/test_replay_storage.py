"""Tests of columns and of the check of the disk."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from replay_episodes import ACT, D, S

from rllib_dreamer import replay_storage
from rllib_dreamer.replay_storage import (
    DiskStorage,
    check_disk,
    step_layout,
    step_nbytes,
    to_half,
)


def test_walker_image_step_takes_at_most_frame_and_five_kib() -> None:
    obs, act = spaces.Box(0, 255, (64, 64, 3), np.uint8), spaces.Box(-1, 1, (6,))
    nbytes = step_nbytes(step_layout(obs, act, deter=2048, stoch=32))
    assert 64 * 64 * 3 + 4096 + 32 < nbytes <= 64 * 64 * 3 + 5 * 1024


def test_refuses_spaces_without_a_shape() -> None:
    with pytest.raises(ValueError, match=r"obs space 'vector' is .*allowed are Box"):
        step_layout(spaces.Text(3), ACT, deter=D, stoch=S)


def test_disk_check_names_need(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"replay_directory .* needs 1000000000.0 GB"):
        check_disk(10**18, tmp_path)


def test_files_that_do_not_fit_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk gets full, also by another trial, after the check; a retry must have the room."""
    layout = step_layout(spaces.Box(-1, 1, (3,)), ACT, deter=D, stoch=S)
    reserved = []

    def full(path: Path) -> None:
        reserved.append(path.name)
        if len(reserved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(replay_storage, "_reserve_blocks", full)
    with pytest.raises(ValueError, match=r"replay_directory .* cannot hold the replay \(No space"):
        DiskStorage(layout, 4, 8, tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    (tmp_path / "column_00.npy").write_bytes(b"of a creation that was killed")
    sizes = []
    monkeypatch.setattr(
        replay_storage, "check_disk", lambda *_: sizes.append(len(list(tmp_path.glob("*.npy"))))
    )
    DiskStorage(layout, 4, 8, tmp_path).close()
    assert sizes == [0]


@pytest.mark.parametrize("shape", [(0, 3), (7, 3), (3, 2**14), (2**15 + 1,)])
def test_half_precision_rounds_as_numpy_does(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(0, 1, (*shape, 2)).astype(np.float32)[..., 0]
    half = to_half(values)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, values.astype(np.float16))
    np.testing.assert_array_equal(to_half(values.astype(np.float64)), half)
