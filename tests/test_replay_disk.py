"""The replay in the folder of a Tune trial, which is killed between two checkpoints."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig
from tiny import MODEL, CountingEnv, built, start_ray, tiny_config, train_until

from rllib_dreamer.dreamer import DreamerTorch
from rllib_dreamer.replay import Replay

STEPS = 20  # of an iteration
KILLED_AT = 70  # steps, in the fourth iteration; there is a checkpoint every two
LENGTH = 8  # of an episode


class KillingEnv(CountingEnv):
    """Kills its process once, after `KILLED_AT` steps."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.mark, self.steps = Path(config["mark"]), 0

    def step(self, action: np.ndarray) -> Any:
        self.steps += 1
        if self.steps == KILLED_AT and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def trained(folder: Path) -> tune.Result:
    """A trial of six iterations that was killed once."""
    training = {"replay_storage": "disk", "training_ratio": 8}
    config = tiny_config(KillingEnv, training=training, length=LENGTH, mark=str(folder / "mark"))
    config.reporting(min_sample_timesteps_per_iteration=STEPS)
    start_ray()
    run_config = RunConfig(
        name="run",
        storage_path=str(folder),
        stop={"training_iteration": 6},
        checkpoint_config=CheckpointConfig(checkpoint_frequency=2),
        failure_config=FailureConfig(max_failures=1),
        verbose=0,
    )
    (result,) = tune.Tuner(DreamerTorch, param_space=config, run_config=run_config).fit()
    return result


def replay_of(trial: Path) -> Replay:
    """The replay in a trial's folder, opened as its next run would."""
    return Replay(
        CountingEnv.observation_space,
        CountingEnv.action_space,
        deter=MODEL["deter"],
        stoch=MODEL["stoch"],
        capacity=2000,
        batch_size=4,
        batch_length=8,
        directory=trial / "replay",
    )


@pytest.mark.slow
def test_a_killed_trial_goes_on_with_the_steps_of_its_checkpoint(tmp_path: Path) -> None:
    result = trained(tmp_path)
    assert result.error is None and (tmp_path / "mark").exists()
    checkpoint, trial = Path(result.checkpoint.path), Path(result.path)
    assert [p.name for p in (checkpoint / "replay").iterdir()] == ["replay.json"]
    assert result.metrics["dreamer"]["agent_steps"] == 6 * STEPS  # none twice, none of the dead
    replay = replay_of(trial)
    replay.load(checkpoint / "replay")
    assert len(replay) == result.metrics["dreamer"]["replay_steps"] >= 6 * STEPS
    for _ in range(50):
        check_whole(replay.sample())
    replay.close()


def check_whole(batch: dict[str, np.ndarray]) -> None:
    """Within an episode each observation is the count of its steps and the action before it."""
    obs, first = batch["obs/vector"] * 10, batch["is_first"]
    action = batch["action/action"].clip(-1, 1)
    follows = ~first[:, 1:]
    np.testing.assert_allclose((obs[:, 1:, 0] - obs[:, :-1, 0])[follows], 1, atol=1e-5)
    np.testing.assert_allclose(obs[:, 1:, 1:][follows], action[:, :-1][follows], atol=1e-5)
    np.testing.assert_array_equal(obs[:, 1:][~follows], 0)
    reward = np.where(first[:, 1:], 0, action[:, :-1].sum(-1))
    np.testing.assert_allclose(batch["reward"][:, 1:], reward, atol=1e-5)


def opened(checkpoint: Path, **training: Any) -> tuple[int, int]:
    """Updates and steps of an algorithm that is built from a checkpoint, outside of Tune."""
    config = tiny_config(CountingEnv, training=training, length=LENGTH)
    algo = DreamerTorch.from_checkpoint(checkpoint, config=config)
    try:
        return algo._updates, len(algo.replay)
    finally:
        algo.stop()


def test_a_checkpoint_opens_outside_of_its_trial_with_the_replay_or_without(
    tmp_path: Path,
) -> None:
    start_ray()
    config = tiny_config(CountingEnv, training={"replay_storage": "disk"}, length=LENGTH)
    config.reporting(min_sample_timesteps_per_iteration=40)
    run_config = RunConfig(
        storage_path=str(tmp_path),
        stop={"training_iteration": 1},
        checkpoint_config=CheckpointConfig(checkpoint_at_end=True),
        verbose=0,
    )
    (result,) = tune.Tuner(DreamerTorch, param_space=config, run_config=run_config).fit()
    checkpoint, found = Path(result.checkpoint.path), result.metrics["dreamer"]
    with pytest.raises(ValueError, match=r"there is no trial: .*from_checkpoint\(path, config="):
        DreamerTorch.from_checkpoint(checkpoint)
    with_replay = opened(checkpoint, replay_directory=str(Path(result.path) / "replay"))
    assert with_replay == (found["updates"], found["replay_steps"])
    with pytest.raises(ValueError, match=r"empty replay by store_buffer_in_checkpoints=False"):
        opened(checkpoint)
    without = opened(checkpoint, store_buffer_in_checkpoints=False)
    assert without == (found["updates"], 0)
    assert found["updates"] > 0


def test_without_a_trial_the_folder_must_be_named(tmp_path: Path) -> None:
    config = tiny_config(training={"replay_storage": "disk"})
    with (
        pytest.raises(ValueError, match=r"there is no trial: set replay_directory to a folder"),
        built(config),
    ):
        pass
    with built(config.training(replay_directory=str(tmp_path / "mine"))) as algo:
        assert f"in {tmp_path / 'mine'}" in algo.describe()
        assert (tmp_path / "mine" / "replay.json").is_file()


@pytest.mark.parametrize("name", ["c", "c/replay", "c/mine"])
def test_a_checkpoint_cannot_take_the_place_of_the_replay(tmp_path: Path, name: str) -> None:
    replay, folder = tmp_path / name, tmp_path / "c"
    with built(tiny_config(CountingEnv, training={"replay_directory": str(replay)})) as algo:
        train_until(algo, 1)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        message = rf"replay_directory '{replay}' lies in {folder}: .*Save into another folder"
        with pytest.raises(ValueError, match=message):
            algo.save_to_path(folder)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        steps = len(algo.replay)
        algo.save_to_path(tmp_path / "beside")
        train_until(algo, algo._updates + 1)
        algo.restore_from_path(tmp_path / "beside")
        assert len(algo.replay) == steps
