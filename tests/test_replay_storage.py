"""Tests of columns and of the checks of memory and disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from replay_episodes import ACT, D, S, make

from rllib_dreamer.replay_storage import (
    available_memory,
    check_disk,
    check_memory,
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


def test_memory_check_names_need_and_remedy() -> None:
    check_memory(10, available=10)
    with pytest.raises(
        ValueError,
        match=r"replay_capacity 1,000 \(steps\) needs 2.0 GB .* only 1.0 GB "
        r".* lower it to at most 450.*replay_directory",
    ):
        check_memory(2 * 10**9, capacity=1000, available=10**9)
    with pytest.raises(ValueError, match=r"replay_capacity 1,000,000,000 \(steps\) needs"):
        make(capacity=10**9, chunk_length=10**6)


def test_memory_check_knows_containers(tmp_path: Path) -> None:
    def write(folder: Path, files: dict[str, str]) -> None:
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)

    v2 = {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "inactive_file 300\n"}
    write(tmp_path / "v2", v2)
    assert available_memory(tmp_path / "v2") == 400
    write(
        tmp_path / "v1" / "memory",
        {
            "memory.limit_in_bytes": "5000",
            "memory.usage_in_bytes": "1000",
            "memory.stat": "total_inactive_file 0",
        },
    )
    assert available_memory(tmp_path / "v1") == 4000
    write(tmp_path / "free", v2 | {"memory.max": "max\n"})
    assert available_memory(tmp_path / "free") > 10**6


def test_disk_check_names_need(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"replay_directory .* needs 1000000000.0 GB"):
        check_disk(10**18, tmp_path)


@pytest.mark.parametrize("shape", [(0, 3), (7, 3), (3, 2**14), (2**15 + 1,)])
def test_half_precision_rounds_as_numpy_does(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(0, 1, (*shape, 2)).astype(np.float32)[..., 0]
    half = to_half(values)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, values.astype(np.float16))
    np.testing.assert_array_equal(to_half(values.astype(np.float64)), half)
