"""What `--resume` makes of an experiment's state, without Ray running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.rllib.algorithms.ppo import PPO
from ray.train._internal.session import _TrainingResult
from ray.train._internal.storage import StorageContext
from ray.tune import Checkpoint, CheckpointConfig, PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.registry import register_trainable
from ray.tune.utils.serialization import TuneFunctionEncoder, _loads_with_cloudpickle

from rllib_dreamer.checkpoint import MARK, SCORE
from rllib_dreamer.cli import train
from rllib_dreamer.cli.app import run

STATE = "experiment_state-2026-01-31_09-05-00.json"
RUNNER = {"_session_str": "s", "_start_time": 0.0, "_total_time": 0.0, "_iteration": 0}
SCORES = [9.0, 1.0, 2.0, 5.0]


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trial of PPO on CartPole that keeps three checkpoints, killed before it removed one."""

    @contextmanager
    def no_session(*args: Any) -> Iterator[bool]:
        yield False

    class Results(list[Any]):
        errors: tuple[()] = ()

    monkeypatch.setattr(train, "ray_session", no_session)
    monkeypatch.setattr(train, "lacking_resources", lambda config: None)
    monkeypatch.setattr(train.tune, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(train, "ResultGrid", lambda analysis: Results())
    register_trainable("PPO", PPO)
    storage = StorageContext(str(tmp_path), "run", trial_dir_name="trial")
    keep = CheckpointConfig(num_to_keep=3, checkpoint_score_attribute=SCORE)
    config = {"env": "CartPole-v1", "seed": 3}
    trial = Trial("PPO", config=config, storage=storage, checkpoint_config=keep)
    trial.placement_group_factory = PlacementGroupFactory([{"CPU": 1}])
    for index, score in enumerate(SCORES):
        checkpoint = tmp_path / "run" / "trial" / f"checkpoint_{index:06}"
        checkpoint.mkdir(parents=True)
        mark = {"training_iteration": index + 1, SCORE: score}
        (checkpoint / ".metadata.json").write_text(json.dumps({MARK: mark}))
    state = {"trial_data": [trial.get_json_state()], "runner_data": RUNNER}
    (tmp_path / "run" / STATE).write_text(json.dumps(state, cls=TuneFunctionEncoder))
    return tmp_path / "run"


def resume(experiment: Path, *words: str, run_name: str = "PPO", env: str = "CartPole-v1") -> int:
    return run(["train", "--run", run_name, "--env", env, "--resume", str(experiment), *words])


def kept(experiment: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in experiment.glob("trial/checkpoint_*"))


def mended(experiment: Path) -> Trial:
    state = _loads_with_cloudpickle((experiment / STATE).read_text())
    ((trial_json, metadata_json),) = state["trial_data"]
    trial = Trial.from_json_state(trial_json)
    trial.restore_run_metadata(metadata_json)
    return trial


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ([], 3),
        (["--keep-checkpoints-num", "1"], 1),
        (["--keep-checkpoints-num", "0"], None),
    ],
)
def test_resuming_removes_no_checkpoint(
    experiment: Path, words: list[str], limit: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(experiment, *words) == 0
    assert "resuming after iteration 4\n" in capsys.readouterr().out
    assert kept(experiment) == [0, 1, 2, 3]
    manager = mended(experiment).run_metadata.checkpoint_manager
    assert manager.checkpoint_config.num_to_keep == limit
    assert manager.latest_checkpoint_result.metrics[SCORE] == 5.0


def test_the_limit_holds_from_the_next_checkpoint_on(experiment: Path) -> None:
    assert resume(experiment) == 0
    manager = mended(experiment).run_metadata.checkpoint_manager
    folder = experiment / "trial" / "checkpoint_000004"
    folder.mkdir()
    checkpoint = Checkpoint.from_directory(str(folder))
    manager.register_checkpoint(_TrainingResult(checkpoint, {SCORE: 7.0}))
    assert kept(experiment) == [0, 3, 4]


def test_a_checkpoint_that_is_named_is_where_its_trial_goes_on(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(experiment / "trial" / "checkpoint_000001") == 0
    assert "resuming after iteration 2\n" in capsys.readouterr().out
    assert kept(experiment) == [0, 1, 2, 3]
    found = mended(experiment)
    assert found.run_metadata.checkpoint_manager.latest_checkpoint_result.metrics[SCORE] == 1.0
    assert found.storage.current_checkpoint_index == 3  # the next one is the fourth


def test_a_checkpoint_that_is_named_has_to_be_whole(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (experiment / "trial" / "checkpoint_000003" / ".metadata.json").unlink()
    assert resume(experiment / "trial" / "checkpoint_000003") == 2
    assert "checkpoint_000003 is not complete" in capsys.readouterr().err
    assert kept(experiment) == [0, 1, 2, 3]


def test_what_has_changed_is_told_entry_by_entry(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"token": "secret", "room": 2, "doors": {2: "a", 10: "b"}}
    for room, more in ((2, {}), (3, {"wind": 4})):
        capsys.readouterr()
        config = json.dumps(given | more | {"room": room})
        assert resume(experiment, "--set", f"env_config={config}") == 0
    out = capsys.readouterr().out
    assert "\nchanged since: env_config.room 2 -> 3, env_config.wind nothing -> 4\n" in out
    assert resume(experiment, "--set", f"env_config={config}", "--set", "lr=0.25") == 0
    assert "\nchanged since: lr 5e-05 -> 0.25\n" in capsys.readouterr().out


def test_a_cluster_that_is_too_small_is_told(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "lacking_resources", lambda config: "needs 4 GPUs")
    assert resume(experiment) == 0
    assert "waiting for the cluster to grow: needs 4 GPUs\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"env": "MountainCar-v0"}, "was trained with --env CartPole-v1, which cannot go on"),
        ({"run_name": "APPO"}, "was trained with --run PPO, which cannot go on with APPO"),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_written(
    experiment: Path, given: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in experiment.rglob("*") if path.is_file()}
    assert resume(experiment, "--keep-checkpoints-num", "1", **given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    after = {path: path.read_bytes() for path in experiment.rglob("*") if path.is_file()}
    assert {path: text for path, text in after.items() if path.suffix != ".lock"} == before
