"""Tests of saving and restoring the replay, in memory and on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_episodes import ACT, OBS, D, Env, S, T, assert_equal, check_alignment, make

from rllib_dreamer import replay
from rllib_dreamer.replay import Replay
from rllib_dreamer.replay_storage import write_columns


def busy(directory: Path | None = None, lookback: int = 0) -> tuple[Replay, list[Env]]:
    """A replay in the middle of its life: evicted chunks, open episodes, waiting windows."""
    replay = make(capacity=120, online=True, directory=directory)
    envs = [Env(env, lookback) for env in range(2)]
    for i in range(12):
        done = [env.run(4, end="terminated") for env in envs if (i + env.env) % 3 == 0]
        replay.add(done + [env.run(5) for env in envs])
        if i < 8:
            replay.sample()
    replay.add([envs[0].run(2, end="truncated")])  # leaves a stream free, and a window begun
    return replay, envs


def live_on(replay: Replay, envs: list[Env], rounds: int = 20) -> list[dict[str, np.ndarray]]:
    batches = []
    for _ in range(rounds):
        batches.append(replay.sample())
        replay.add([env.run(2) for env in envs])
    return batches


def twin(replay: Replay, how: str, path: Path) -> Replay:
    """A new replay restored from `replay`, through `how`."""
    other = make(capacity=120, online=True, seed=77)
    if how == "state":
        other.set_state(replay.get_state())
    else:
        replay.save(path)
        other.load(path)
    return other


@pytest.mark.parametrize("how", ["state", "files"])
def test_a_restored_replay_goes_on_exactly_as_the_unbroken_one(how: str, tmp_path: Path) -> None:
    replay, envs = busy()
    restored = twin(replay, how, tmp_path)
    assert restored.stats() == replay.stats()
    assert replay.stats()["online"] > 0
    assert_equal(restored.get_state()["data"], replay.get_state()["data"])
    copies = copy.deepcopy(envs)
    for a, b in zip(live_on(replay, envs), live_on(restored, copies), strict=True):
        assert_equal(a, b)
        check_alignment(a)


def test_an_empty_replay_can_be_saved(tmp_path: Path) -> None:
    restored = twin(make(capacity=120), "files", tmp_path)
    assert len(restored) == 0
    restored.add([Env().run(20)])
    check_alignment(restored.sample())


def test_saved_files_hold_no_pickles_and_only_what_is_stored(tmp_path: Path) -> None:
    replay, _ = busy()
    replay.save(tmp_path)
    metadata = json.loads((tmp_path / "replay.json").read_text())
    names = [f"column_{i:02}.npy" for i in range(len(metadata["columns"]))]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "replay.json"]
    for name in names:
        assert len(np.load(tmp_path / name, allow_pickle=False)) == len(replay)
    state = {k: v for k, v in replay.get_state().items() if k != "data"}
    assert json.loads(json.dumps(state)) == state


def test_saving_again_that_is_cut_off_leaves_nothing_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns are written over, so what remains is of both."""
    full, envs = busy()
    full.save(tmp_path)
    full.add([env.run(30) for env in envs])

    def cut_off(*arguments: Any) -> None:
        write_columns(*arguments)
        raise OSError("no space left")

    monkeypatch.setattr(replay, "write_columns", cut_off)
    with pytest.raises(OSError, match="no space left"):
        full.save(tmp_path)
    with pytest.raises(ValueError, match=r"holds no replay: replay\.json, .* is missing"):
        make(capacity=120, online=True).load(tmp_path)


@pytest.mark.parametrize("how", ["state", "files"])
@pytest.mark.parametrize(
    ("capacity", "chunk_length", "batch_length", "batch_size"),
    [(50, 7, T, 4), (20, 3, T, 4), (300, 7, T, 6), (120, 16, 6, 4), (120, 7, 3, 2), (60, 30, 2, 1)],
)
def test_restores_into_another_capacity_chunk_and_batch(
    capacity: int, chunk_length: int, batch_length: int, batch_size: int, how: str, tmp_path: Path
) -> None:
    replay, envs = busy(lookback=1)
    saved = replay.get_state()["data"]["obs/vector"][:, 0]
    other = make(
        capacity=capacity,
        chunk_length=chunk_length,
        batch_length=batch_length,
        batch_size=batch_size,
        online=True,
    )
    if how == "state":
        other.set_state(replay.get_state())
    else:
        replay.save(tmp_path)
        other.load(tmp_path)
    assert min(len(replay), capacity) - 3 * chunk_length <= len(other) <= capacity
    kept = other.get_state()["data"]["obs/vector"][:, 0]
    assert len(np.unique(kept)) == len(kept)
    assert set(kept) <= set(saved)
    if capacity < len(replay):
        assert min(kept % 10_000) > min(saved % 10_000)
    for batch in live_on(other, envs, 10):
        assert batch["index"].shape == (batch_size, batch_length + 1)
        check_alignment(batch)


def test_refuses_a_state_of_another_env_or_model() -> None:
    state = busy()[0].get_state()
    other = Replay(OBS, ACT, deter=D + 1, stoch=S, capacity=50, batch_size=2, batch_length=T)
    with pytest.raises(ValueError, match=r"columns that differ: deter: .*shape=\(3,\)"):
        other.set_state(state)


def test_disk_gives_the_same_batches_as_memory(tmp_path: Path) -> None:
    (memory, a), (disk, b) = busy(), busy(tmp_path)
    for left, right in zip(live_on(memory, a), live_on(disk, b), strict=True):
        assert_equal(left, right)
    assert type(right["obs/vector"]) is np.ndarray


def reopen(disk: Replay, directory: Path, checkpoint: Path) -> Replay:
    disk.close()
    again = make(capacity=120, online=True, directory=directory, seed=77)
    again.load(checkpoint)
    return again


def test_disk_survives_a_restart_without_being_copied(tmp_path: Path) -> None:
    disk, _ = busy(tmp_path / "replay")
    disk.save(tmp_path / "checkpoint")
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["replay.json"]
    batches = [disk.sample() for _ in range(20)]
    again = reopen(disk, tmp_path / "replay", tmp_path / "checkpoint")
    for batch in batches:
        assert_equal(batch, again.sample())


def test_a_new_run_in_a_used_directory_can_go_back_to_its_beginning(tmp_path: Path) -> None:
    earlier, _ = busy(tmp_path / "steps")
    earlier.close()
    replay = make(capacity=120, directory=tmp_path / "steps")
    replay.save(tmp_path / "empty")
    env = Env()
    replay.add([env.run(20)])
    replay.load(tmp_path / "empty")
    assert len(replay) == 0
    replay.add([Env().run(5)])
    assert len(replay) == 5
    replay.close()


def test_disk_drops_what_was_overwritten_after_the_checkpoint(tmp_path: Path) -> None:
    disk, envs = busy(tmp_path / "replay")
    disk.save(tmp_path / "checkpoint")
    saved = disk.get_state()["data"]["obs/vector"][:, 0]
    live_on(disk, envs, 8)  # killed some time after the checkpoint
    again = reopen(disk, tmp_path / "replay", tmp_path / "checkpoint")
    kept = again.get_state()["data"]["obs/vector"][:, 0]
    assert 0 < len(kept) < len(saved)
    np.testing.assert_array_equal(kept, saved[-len(kept) :])
    fresh = [Env(env) for env in (5, 6)]
    for batch in live_on(again, fresh, 30):
        check_alignment(batch)


def test_a_replay_whose_every_step_was_overwritten_is_not_full(tmp_path: Path) -> None:
    """It waits to be filled again: training must not go on from a handful of steps."""
    disk, envs = busy(tmp_path / "replay")
    assert disk.is_full
    disk.save(tmp_path / "checkpoint")
    live_on(disk, envs, 100)
    again = reopen(disk, tmp_path / "replay", tmp_path / "checkpoint")
    assert len(again) == again.num_sequences == 0 and not again.is_full
    memory = twin(busy(tmp_path / "other")[0], "state", tmp_path)
    assert memory.is_full


def test_disk_state_moves_to_memory_and_back(tmp_path: Path) -> None:
    disk, _ = busy(tmp_path / "a")
    memory = twin(disk, "state", tmp_path)
    back = make(capacity=120, online=True, directory=tmp_path / "b", seed=5)
    memory.save(tmp_path / "checkpoint")
    back.load(tmp_path / "checkpoint")
    for _ in range(10):
        assert_equal(memory.sample(), back.sample())


def test_disk_refuses_what_it_cannot_go_on_with(tmp_path: Path) -> None:
    disk, _ = busy(tmp_path / "replay")
    disk.save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="in use by another replay"):
        make(capacity=120, directory=tmp_path / "replay")
    with pytest.raises(ValueError, match=r"kept its steps on disk, this one is in memory"):
        make(capacity=120).load(tmp_path / "checkpoint")
    disk.close()
    with pytest.raises(ValueError, match=r"holds a replay of 119 steps .*not the one configured"):
        make(capacity=60, directory=tmp_path / "replay")
    second = make(capacity=120, directory=tmp_path / "replay")
    second.add([Env().run(10)])  # a new run takes the directory over
    with pytest.raises(ValueError, match=r"holds the steps of run \w+, the checkpoint needs"):
        second.load(tmp_path / "checkpoint")


def test_disk_knows_which_history_it_holds(tmp_path: Path) -> None:
    """Going on from the first of two checkpoints overwrites what the second one counts on."""
    disk, envs = busy(tmp_path / "replay")
    disk.save(tmp_path / "first")
    disk.add([env.run(2) for env in envs])
    disk.save(tmp_path / "second")
    back = reopen(disk, tmp_path / "replay", tmp_path / "first")
    again = reopen(back, tmp_path / "replay", tmp_path / "second")  # nothing was written yet
    branch = reopen(again, tmp_path / "replay", tmp_path / "first")
    branch.add([Env(7).run(1)])
    branch.close()
    third = make(capacity=120, online=True, directory=tmp_path / "replay")
    with pytest.raises(ValueError, match="went on from an earlier checkpoint than this one"):
        third.load(tmp_path / "second")
    third.load(tmp_path / "first")
