"""Saving that is killed at any of its steps, or for which the disk is too small."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import CountingEnv, assert_same, built, parameters_of, tiny_config, train_until

from rllib_dreamer import checkpoint
from rllib_dreamer.dreamer import DreamerTorch

#: What changes files; the folders change places right after the library call is looked up.
STEPS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym")


@pytest.fixture(scope="module")
def algo() -> Iterator[DreamerTorch]:
    with built(tiny_config(CountingEnv, length=30)) as algo:
        train_until(algo, 2)
        yield algo


def kill_at(step: int) -> None:
    """Kills this process at its `step`-th change of the file system from now on."""
    left = step

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
        if event in STEPS or writes:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_in_a_child(algo: DreamerTorch, path: Path, step: int) -> bool:
    """Saves in a copy of this process that is killed at a step; returns whether it was."""
    child = os.fork()
    if child == 0:
        try:
            kill_at(step)
            algo.save_to_path(path)
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def inserts(path: Path) -> int:
    return int(json.loads((path / "replay" / "replay.json").read_text())["inserts"])


def test_a_kill_at_any_step_leaves_a_whole_checkpoint(algo: DreamerTorch, tmp_path: Path) -> None:
    """Over an earlier checkpoint, that one or the new one is there at every moment."""
    first = tmp_path / "first"
    algo.save_to_path(first)
    old = inserts(first)
    updates = algo._updates
    train_until(algo, updates + 2)
    found: list[int] = []
    killed = True
    while killed:
        path = shutil.copytree(first, tmp_path / str(len(found)) / "c")
        killed = save_in_a_child(algo, path, len(found))
        checkpoint.verify(path)
        found.append(inserts(path))
        algo.save_to_path(path)
        assert [p.name for p in path.parent.iterdir()] == ["c"]
    new = found[-1]
    assert new > old
    assert len(found) > 10
    assert found == sorted(found)  # the old one up to some step, and the new one from there on
    assert found.count(new) >= 2  # while the old one is removed, and afterwards
    last = shutil.copytree(first, tmp_path / "last" / "c")
    assert save_in_a_child(algo, last, found.index(new) - 1)
    algo.restore_from_path(last)  # which was written over but for one step
    assert algo._updates == updates


def test_a_kill_at_any_step_of_a_first_save_is_seen(algo: DreamerTorch, tmp_path: Path) -> None:
    for step in range(1000):
        path = tmp_path / str(step)
        if not save_in_a_child(algo, path, step):
            break
        assert not checkpoint.is_complete(path)
        with pytest.raises(ValueError, match="saving was not finished"):
            algo.restore_from_path(path)
    checkpoint.verify(path)
    assert step > 10


@contextmanager
def full_disk(folder: Path, room: int) -> Iterator[None]:
    """Puts a disk in memory at `folder`; without the right to, limits the size of files."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room // 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("share", [0.1, 0.8], ids=["in-the-model", "in-the-replay"])
def test_a_full_disk_is_told_and_harms_nothing(
    algo: DreamerTorch, tmp_path: Path, share: float
) -> None:
    """What was written goes, earlier checkpoints stay, and the algorithm can go on."""
    earlier = Path(algo.save_to_path(tmp_path / "earlier"))
    size = sum(path.stat().st_size for path in earlier.rglob("*"))
    updates = algo._updates
    disk = tmp_path / "disk"
    message = r"(No space left|File too large).*: checkpoint .*/disk/c could not .* MB free"
    with full_disk(disk, int(share * size)):
        with pytest.raises(OSError, match=message) as caught:
            algo.save_to_path(disk / "c")
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert list(disk.iterdir()) == []
    checkpoint.verify(earlier)
    train_until(algo, updates + 1)
    checkpoint.verify(algo.save_to_path(disk / "c"))
    before = parameters_of(algo)
    algo.restore_from_path(earlier)
    assert algo._updates == updates
    algo.restore_from_path(disk / "c")
    assert_same(parameters_of(algo), before)
