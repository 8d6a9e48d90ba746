"""Tests of the checks of memory, for one replay and for several."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import weakref
from pathlib import Path

import psutil
import pytest
from replay_episodes import Env, make

from rllib_dreamer import replay_memory
from rllib_dreamer.replay_memory import GB, MemoryClaim, available_memory, check_memory


def test_memory_check_names_need_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory(10, available=10)
    with pytest.raises(
        ValueError,
        match=r"replay_capacity 1,000 \(steps\) needs 2.0 GB .* only 1.0 GB "
        r".* lower it to at most 450.*replay_storage='disk'",
    ):
        check_memory(2 * 10**9, capacity=1000, available=10**9)
    monkeypatch.setattr(replay_memory, "available_memory", lambda: 10**9)
    with pytest.raises(ValueError, match=r"replay_capacity 1,000,000,000 \(steps\) .* 1\.0 GB"):
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


def note(folder: Path, pid: int, gb: float, started: float | None = None) -> Path:
    """What a replay of another process leaves."""
    if started is None:
        started = psutil.Process(pid).create_time()
    path = folder / f"{pid}_{started}.json"
    path.write_text(json.dumps({"pid": pid, "started": started, "nbytes": int(gb * GB)}))
    return path


def test_replays_of_other_processes_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claim, _ = MemoryClaim(int(2 * GB), tmp_path), MemoryClaim(int(50 * GB), tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        note(tmp_path, other.pid, 3)
        assert claim.others() == [pytest.approx(3 * GB, rel=0.02)]  # less what Python takes
        claim.warn(available=int(5 * GB))
        assert caplog.records == []
        claim.warn(available=int(4 * GB))
        assert "of others on this machine (1) will need 5.0 GB more" in caplog.text
        other.kill()


def test_notes_of_the_dead_are_taken_away(tmp_path: Path) -> None:
    mine = MemoryClaim(10, tmp_path)
    reused = note(tmp_path, psutil.Process().ppid(), 1, started=1.0)
    (tmp_path / "half.json").write_text('{"pid": 1')
    assert mine.others() == []
    assert not reused.exists()
    assert len(list(tmp_path.iterdir())) == 2
    del mine
    assert [path.name for path in tmp_path.iterdir()] == ["half.json"]


def test_a_replay_in_memory_looks_for_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(MemoryClaim, "others", lambda self: [10**15])
    with caplog.at_level(logging.WARNING):
        make()
    assert "need 1000000.0 GB more when full" in caplog.text


def test_a_closed_replay_holds_no_steps_and_claims_no_memory() -> None:
    replay = make()
    replay.add([Env().run(10)])
    storage = replay._storage
    column, note = weakref.ref(storage.columns["reward"]), storage.claim._note
    assert note.exists()
    replay.close()
    assert column() is None
    assert not note.exists()


MEGABYTES_LEFT = """
import psutil, torch
from gymnasium import spaces
from rllib_dreamer.hardware import keep_memory, release_memory
from rllib_dreamer.replay import Replay

keep_memory()
before = psutil.Process().memory_info().rss
box = spaces.Box(-1, 1, (1000,))
replay = Replay(box, box, deter=8, stoch=4, capacity=20_000, batch_size=1, batch_length=1)
above = bytearray(2**20)  # so that the replay is not the end of the heap
for column in replay._storage.columns.values():
    column[:] = 1
full = psutil.Process().memory_info().rss
replay.close()
release_memory()
print((full - before) // 10**6, (psutil.Process().memory_info().rss - before) // 10**6)
"""


def test_the_memory_of_a_closed_replay_goes_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEGABYTES_LEFT], capture_output=True, text=True, check=True
    )
    full, left = map(int, done.stdout.split())
    assert full > 150
    assert left < 20
